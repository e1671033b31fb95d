"""How fast a run goes and what it waits for. Nothing about what is trained."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch

from meme_llava.model.flops import Accelerator, StepCounts, TrainingCosts, count_batch, recognise_accelerator

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
