"""What is watched between two optimizer steps: whether they are finite, whether to stop, how fast they go.

Nothing about models.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import StopRequest, any_process, gather
from meme_llava.errors import NonFiniteError, UserError
from meme_llava.model.flops import StepCounts, TrainingCosts, count_batch, recognise_accelerator
from meme_llava.storage.run_record import RATE_PREFIX

MAX_SKIPPED_IN_A_ROW = 3
MAX_LISTED_RECORDS = 8
SECONDS_BETWEEN_LINES = 5  # of progress, where the output is a file
COUNTS, USEFUL, RECORD_IDS = "counts", "useful_positions", "record_ids"


class StepGuard:
    """Whether losses and gradients of the running step are finite in all processes, and whether one is asked to stop.

    If they are not finite, no process may apply the update; `mark_loss` makes one process's loss reach all of them,
    through their gradients.
    """

    def __init__(self, request: StopRequest):
        self._request = request
        self._skipped_in_a_row = 0
        self.stopped_by: str | None = None

    def begin(self, record_ids: list[list[str]]) -> None:
        """Forget the last step; the next one is made of these records, by device batch of this process."""
        self._record_ids, self._finite, self.gradients_are_finite = record_ids, [], True

    def mark_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, or one that gives no finite gradient. No device waits for this."""
        finite = torch.isfinite(loss.detach())
        self._finite.append(finite)
        return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)

    def after_step(self, step: int) -> None:
        """Say that a step was skipped, if it was. Raises NonFiniteError after too many in a row."""
        if self.gradients_are_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        pairs = [(ids, bool(finite)) for ids, finite in zip(self._record_ids, self._finite, strict=True)]
        batches = [pair for of_process in gather(pairs) for pair in of_process]
        suspects = [ids for ids, finite in batches if not finite]
        what = "the loss of these records" if suspects else "the gradient of these records"
        ids = list(dict.fromkeys(itertools.chain(*(suspects or [ids for ids, _ in batches]))))
        more = f" and {len(ids) - MAX_LISTED_RECORDS} more" if len(ids) > MAX_LISTED_RECORDS else ""
        text = f"{what} is not finite: {', '.join(map(repr, ids[:MAX_LISTED_RECORDS]))}{more}"
        if is_main_process():
            print(f"step {step} is skipped, no weight changed: {text}", flush=True)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}, were not finite. At last {text}. No such "
                "step changed a weight, and the newest checkpoint is sound. Look at these records, or lower --low_lr "
                "and --high_lr."
            )

    def ask_to_stop(self) -> bool:
        """Whether a signal asks any process to stop; all processes call it together."""
        if self.stopped_by is None and any_process(self._request.name is not None):
            self.stopped_by = next(name for name in gather(self._request.name) if name is not None)
        return self.stopped_by is not None


def watch_first_gradients(names: Iterable[str], model: nn.Module) -> Callable[[], None]:
    """What to call after the first backward pass, before the update; it raises UserError if a tensor of these names, in
    `model` as its engine holds it, got no gradient."""
    missing = set(names)
    # DeepSpeed takes gradients away at once, and hooks see nothing of those that FSDP shards.
    handles = [
        parameter.register_hook(lambda gradient, name=name: missing.discard(name))
        for name, parameter in model.named_parameters()
        if name in missing
    ]

    def check() -> None:
        for handle in handles:
            handle.remove()
        lacking = missing - {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        if lacking:
            raise UserError(
                f"after the first step {len(lacking)} tensors that should learn have no gradient, e.g. "
                f"{', '.join(sorted(lacking)[:3])}"
            )

    return check


def collate_and_count(examples: list[dict], collate: Callable[[list[dict]], dict]) -> dict:
    """The batch that `collate` makes, with its `StepCounts`, the number of positions that belong to a record, and the
    ids of its records: counted where reading a tensor back costs no waiting."""
    batch = collate(examples)
    useful, ids = len(batch["kv_index"].unique()), [str(example["record_id"]) for example in examples]
    return {**batch, COUNTS: count_batch(batch), USEFUL: useful, RECORD_IDS: ids}


class ThroughputMeter:
    """The optimizer steps between two log lines, measured over all processes, which make every call together;
    `records_per_step` is the global batch."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, records_per_step: int):
        self._costs, self._accelerator = TrainingCosts.of_model(model), accelerator
        self._records_per_step, device = records_per_step, accelerator.device
        known = recognise_accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        # Of all devices; None where it is unknown, as a CPU's is.
        self._peak_tflops = known.peak_tflops * accelerator.num_processes if known and known.peak_tflops else None
        self._reset()

    def _reset(self) -> None:
        self._counts, self._useful, self._steps, self._start, self._waited = StepCounts(), 0, 0, 0.0, 0.0

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
        own = torch.tensor([*astuple(self._counts), self._useful], dtype=torch.float64, device=self._accelerator.device)
        *totals, useful = (int(value) for value in self._accelerator.reduce(own, "sum").tolist())
        counts, captions = StepCounts(*totals), self._steps * self._records_per_step
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
        if self._peak_tflops is not None:
            figures["mfu"] = teraflops / self._peak_tflops
        self._reset()
        return figures


class ProgressBar:
    """A bar with loss, speed and time left; plain lines where the output is not a terminal. Of the main process."""

    def __init__(self, step: int, steps: int):
        self._first_step, self._steps, self._start = step, steps, time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        is_shown = is_main_process() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_shown)
        self.update, self.close = self._bar.update, self._bar.close

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show what was logged: the speed is that since the last log line."""
        seconds = time.perf_counter() - self._start
        is_early = self._bar.disable and seconds - self._last_line < SECONDS_BETWEEN_LINES and step < self._steps
        if not is_main_process() or "loss" not in figures or is_early:
            return
        self._last_line = seconds
        loss = f"loss {figures['loss']:.4f}"
        speed = f"{figures['captions_per_second']:.1f} captions/s, {figures['tokens_per_second']:,.0f} tokens/s"
        speed += f", MFU {figures['mfu']:.0%}" if "mfu" in figures else ""
        speed += f", waiting for data {figures['data_wait_share']:.0%}"
        left_out = figures.get("quarantined_records")
        left_out = f", {left_out:,} records quarantined" if left_out else ""
        if self._bar.disable:
            left = tqdm.format_interval(seconds / (step - self._first_step) * (self._steps - step))
            print(f"step {step}/{self._steps}  {loss}  {speed}  {left} left{left_out}", flush=True)
        else:
            self._bar.set_postfix_str(f"{loss}, {speed}{left_out}")


def draw_training_curves(log_history: list[dict], path: Path) -> None:
    """Write a PNG: the losses of a training log above, every role's learning rate below, over optimizer steps."""
    # It takes a second to load, and one process needs it once.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries, evaluated = ([one for one in log_history if key in one] for key in ("loss", "eval_loss"))
    steps = [entry["step"] for entry in entries]
    figure, (loss_axes, rate_axes) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    loss_axes.plot(steps, [entry["loss"] for entry in entries], linewidth=1.2, label="training")
    if evaluated:
        points = zip(*((entry["step"], entry["eval_loss"]) for entry in evaluated), strict=True)
        loss_axes.plot(*points, "o-", linewidth=1.8, label="validation")
        loss_axes.legend()
    loss_axes.set(ylabel="loss" if evaluated else "training loss", ylim=(0, None))
    roles = sorted({key for entry in entries for key in entry if key.startswith(RATE_PREFIX)})
    # Roles often share a rate; dashes of different length on one line keep all of them visible.
    for role, style in zip(roles, itertools.cycle(["-", "--", ":"])):
        rates = [entry.get(role) for entry in entries]
        label = f"{role.removeprefix(RATE_PREFIX)} (peak {max(rates):.2g})"
        rate_axes.plot(steps, rates, style, label=label, linewidth=1.8)
    rate_axes.set_yscale("symlog", linthresh=1e-6)
    rate_axes.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rate_axes.legend()
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
