"""Checks between two optimizer steps: whether the last one was finite, whether to stop, and that all processes agree.
Nothing about models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import StopRequest, any_process, gather
from meme_llava.errors import NonFiniteError, UserError

MAX_SKIPPED_IN_A_ROW = 3
MAX_LISTED_RECORDS = 8


@dataclass
class FiniteCheck:
    """What the running optimizer step was made of, and whether its losses and gradients are finite.

    If they are not, no process may apply the update; `mark_loss` makes one process's loss reach all of them, through
    their gradients.
    """

    record_ids: list[list[str]] = field(default_factory=list)  # of every device batch of this process
    finite: list[torch.Tensor] = field(default_factory=list)  # of every loss of this process so far
    gradients_are_finite: bool = True

    def begin(self, record_ids: list[list[str]]) -> None:
        """Forget the last step."""
        self.record_ids, self.finite, self.gradients_are_finite = record_ids, [], True

    def mark_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, or one that gives no finite gradient. No device waits for this."""
        finite = torch.isfinite(loss.detach())
        self.finite.append(finite)
        return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)

    def list_suspects(self) -> list[str]:
        """This process's records in batches whose loss was not finite."""
        return [
            record_id
            for finite, record_ids in zip(self.finite, self.record_ids, strict=False)
            if not bool(finite)
            for record_id in record_ids
        ]


class StepGuard:
    """Stops after too many steps that are not finite, and stops all processes when one is asked to."""

    def __init__(self, soundness: FiniteCheck, request: StopRequest):
        self._soundness = soundness
        self._request = request
        self._skipped_in_a_row = 0
        self.stopped_by: str | None = None

    def after_step(self, step: int) -> None:
        """Say that a step was skipped, if it was. Raises NonFiniteError after too many in a row."""
        if self._soundness.gradients_are_finite:
            self._skipped_in_a_row = 0
        else:
            self._report_skipped(step)

    def ask_to_stop(self) -> bool:
        """Whether a signal asks any process to stop; all processes call it together."""
        if self.stopped_by is None and any_process(self._request.name is not None):
            self.stopped_by = next(name for name in gather(self._request.name) if name is not None)
        return self.stopped_by is not None

    def _report_skipped(self, step: int) -> None:
        self._skipped_in_a_row += 1
        suspects = [record_id for found in gather(self._soundness.list_suspects()) for record_id in found]
        trained = [r for found in gather(self._soundness.record_ids) for batch in found for r in batch]
        what = "the loss of these records" if suspects else "the gradient of these records"
        text = f"{what} is not finite: {_list_some(suspects or trained)}"
        if is_main_process():
            print(f"step {step} is skipped, no weight changed: {text}", flush=True)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}, were not finite. At last {text}. No such "
                "step changed a weight, and the newest checkpoint is sound. Look at these records, or lower --low_lr "
                "and --high_lr."
            )


def _list_some(record_ids: Sequence[str]) -> str:
    unique = list(dict.fromkeys(record_ids))
    more = f" and {len(unique) - MAX_LISTED_RECORDS} more" if len(unique) > MAX_LISTED_RECORDS else ""
    return ", ".join(repr(record_id) for record_id in unique[:MAX_LISTED_RECORDS]) + more


class FirstGradientCheck:
    """Sees that every tensor that should learn gets a gradient in the first step.

    Args:
        names: of those tensors, in `model` as its engine holds it.
    """

    def __init__(self, names: Iterable[str], model: nn.Module):
        self._missing = set(names)
        # DeepSpeed takes gradients away at once, and hooks see nothing of those that FSDP shards.
        self._handles = [
            parameter.register_hook(lambda gradient, name=name: self._missing.discard(name))
            for name, parameter in model.named_parameters()
            if name in self._missing
        ]

    def check(self, model: nn.Module) -> None:
        """Raise UserError if one got none. After the backward pass, before the update."""
        for handle in self._handles:
            handle.remove()
        self._missing -= {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        if self._missing:
            raise UserError(
                f"after the first step {len(self._missing)} tensors that should learn have no gradient, e.g. "
                f"{', '.join(sorted(self._missing)[:3])}"
            )
