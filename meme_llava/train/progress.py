"""What is watched between two optimizer steps: whether they are finite, whether to stop, how fast they go.

Nothing about models.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import StopRequest, any_process, gather
from meme_llava.errors import NonFiniteError, UserError
from meme_llava.model.flops import Accelerator, StepCounts, TrainingCosts, count_batch, recognise_accelerator
from meme_llava.storage.run_record import RATE_PREFIX

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


COUNTS, USEFUL, RECORD_IDS = "counts", "useful_positions", "record_ids"


@dataclass(frozen=True)
class CountingCollator:
    """A collator whose batches carry what they count, made where reading a tensor back costs no waiting."""

    collate: Callable[[list[dict]], dict]

    def __call__(self, examples: list[dict]) -> dict:
        """The collator's batch with `counts`, a `StepCounts`, `useful_positions`, those that belong to a record, and
        `record_ids`."""
        batch = self.collate(examples)
        return {
            **batch,
            COUNTS: count_batch(batch),
            USEFUL: len(batch["kv_index"].unique()),
            RECORD_IDS: [str(example["record_id"]) for example in examples],
        }


class ThroughputMeter:
    """Measures the optimizer steps between two log lines, over all processes.

    Args:
        costs: FLOPs of the model that trains.
        records_per_step: the global batch.
        accelerator: this device, where it is one whose peak is known.
        processes: how many devices share a step.
        sum_over_processes: adds a tensor up over all processes; all of them call it at the same time.
    """

    def __init__(
        self,
        costs: TrainingCosts,
        records_per_step: int,
        accelerator: Accelerator | None,
        processes: int,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._costs = costs
        self._records_per_step = records_per_step
        self._accelerator = accelerator
        self._processes = processes
        self._sum_over_processes = sum_over_processes
        self._reset()

    def _reset(self) -> None:
        self._counts, self._useful, self._steps = StepCounts(), 0, 0
        self._start, self._waited = 0.0, 0.0

    def fetch(self, batches: Iterator[dict], count: int) -> list[dict]:
        """Take the device batches of an optimizer step from the loader, and note how long that took."""
        start = time.perf_counter()
        if self._steps == 0:
            # What happened since the last line, such as writing a checkpoint, is not training.
            self._start = start
        fetched = list(itertools.islice(batches, count))
        self._waited += time.perf_counter() - start
        self._counts = sum((batch.pop(COUNTS) for batch in fetched), self._counts)
        self._useful += sum(batch.pop(USEFUL) for batch in fetched)
        self._steps += 1
        return fetched

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Do something between two steps that is not training, such as evaluating."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Figures since the last call, for the log; empty if no step was measured.

        captions_per_second, tokens_per_second and model_tflops_per_second are over all devices; a token is a position
        that was computed. data_wait_share is the share of the time in which this process waited for its batches;
        useful_token_share the share of computed positions that belong to a record and are not padding. mfu, the model
        FLOPs utilisation, is the share of the devices' bf16 peak that the model's own arithmetic makes up.
        """
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._start
        own = torch.tensor([*astuple(self._counts), self._useful], dtype=torch.float64)
        *totals, useful = (int(value) for value in self._sum_over_processes(own))
        counts = StepCounts(*totals)
        captions = self._steps * self._records_per_step
        teraflops = self._costs.flops(counts) / seconds / 1e12
        figures = {
            "captions_per_second": captions / seconds,
            "tokens_per_second": counts.positions / seconds,
            "positions_per_caption": counts.positions / captions,
            "images_per_caption": counts.images / captions,
            "useful_token_share": useful / counts.positions,
            "data_wait_share": self._waited / seconds,
            "model_tflops_per_second": teraflops,
        }
        if self._accelerator is not None and self._accelerator.peak_tflops is not None:
            figures["mfu"] = teraflops / (self._processes * self._accelerator.peak_tflops)
        self._reset()
        return figures


def find_own_accelerator(device: torch.device) -> Accelerator | None:
    """The accelerator this process computes on; None where its bf16 peak is unknown, as a CPU's is."""
    return recognise_accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


SECONDS_BETWEEN_LINES = 5  # of progress, where the output is a file


class ProgressBar:
    """A bar with loss, speed and time left; plain lines where the output is not a terminal. Of the main process."""

    def __init__(self, step: int, steps: int):
        self._first_step, self._steps = step, steps
        self._start = time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        is_shown = is_main_process() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_shown)

    def update(self) -> None:
        """A step is done."""
        self._bar.update()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show what was logged."""
        if not is_main_process() or "loss" not in figures:
            return
        speed = _describe_speed(figures)
        left_out = ""
        if "quarantined_records" in figures:
            left_out = f", {figures['quarantined_records']:,} records quarantined"
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {figures['loss']:.4f}, {speed}{left_out}")
            return
        seconds = time.perf_counter() - self._start
        if seconds - self._last_line < SECONDS_BETWEEN_LINES and step < self._steps:
            return
        self._last_line = seconds
        left = seconds / (step - self._first_step) * (self._steps - step)
        print(
            f"step {step}/{self._steps}  loss {figures['loss']:.4f}  {speed}  "
            f"{tqdm.format_interval(left)} left{left_out}",
            flush=True,
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _describe_speed(logs: dict) -> str:
    """Speed over the steps since the last log line, and what held it back."""
    speed = f"{logs['captions_per_second']:.1f} captions/s, {logs['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in logs:
        speed += f", MFU {logs['mfu']:.0%}"
    return f"{speed}, waiting for data {logs['data_wait_share']:.0%}"


def draw_training_curves(log_history: list[dict], path: Path) -> None:
    """Write a PNG with the loss above and every role's learning rate below, over optimizer steps.

    Args:
        log_history: the training log's entries; those with a "loss" are drawn, and those with an "eval_loss".
    """
    # It takes a second to load, and one process needs it once.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in log_history if "loss" in entry]
    evaluated = [entry for entry in log_history if "eval_loss" in entry]
    steps = [entry["step"] for entry in entries]
    roles = sorted({key for entry in entries for key in entry if key.startswith(RATE_PREFIX)})
    figure, (loss_axes, rate_axes) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    loss_axes.plot(steps, [entry["loss"] for entry in entries], linewidth=1.2, label="training")
    if evaluated:
        losses = [entry["eval_loss"] for entry in evaluated]
        loss_axes.plot([entry["step"] for entry in evaluated], losses, "o-", linewidth=1.8, label="validation")
        loss_axes.legend()
    loss_axes.set_ylabel("loss" if evaluated else "training loss")
    loss_axes.set_ylim(bottom=0)
    # Roles often share a rate; dashes of different length on one line keep all of them visible.
    for role, style in zip(roles, itertools.cycle(["-", "--", ":"])):
        rates = [entry.get(role) for entry in entries]
        label = f"{role.removeprefix(RATE_PREFIX)} (peak {max(rates):.2g})"
        rate_axes.plot(steps, rates, style, label=label, linewidth=1.8)
    rate_axes.set_yscale("symlog", linthresh=1e-6)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("optimizer step")
    rate_axes.legend()
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
