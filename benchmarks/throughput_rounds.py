"""Lets the ways of training take turns on the same models and records, and keeps what was measured."""

import statistics
import time
from dataclasses import asdict, dataclass

import torch
from throughput_devices import LiveTensors, Platform
from throughput_models import Models
from throughput_ways import LADDER, PUBLISHED, WORKERS, Training, Way, Workload

from meme_llava.errors import UserError
from meme_llava.model.flops import TrainingCosts
from meme_llava.model.trainable import CheckpointedLayers, count_layers, recompute_layers
from meme_llava.train.planning.plan import GIB, measure_ceiling

PREFETCHED = 2 * WORKERS  # device batches that the workers have ready
# How far the losses of the first step may differ between the ways: sums in another order, in float32 and in bfloat16.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one way."""

    seconds: float
    loss: float
    flops: int
    positions: int
    peak_bytes: int | None  # None where no allocator counts


@dataclass
class Bench:
    """Models and records that all ways share, and what was measured with them."""

    models: Models
    workload: Workload
    platform: Platform
    costs: TrainingCosts

    def __post_init__(self) -> None:
        self.turns: dict[str, list[Turn]] = {way.name: [] for way in LADDER}
        self.ceilings: list[float] = []
        self.checkpointed: list[str] = []  # ways that did not fit without gradient checkpointing

    def run_rounds(self, rounds: int) -> None:
        """Let all ways take turns, in the other direction every other round."""
        for number in range(rounds):
            self.ceilings.append(measure_ceiling(self.platform.device, self.platform.dtype))
            for way in LADDER if number % 2 == 0 else reversed(LADDER):
                turn = self._take_turn(way, number)
                self.turns[way.name].append(turn)
                speed = self.workload.shape.global_batch_size / turn.seconds
                print(f"round {number + 1} of {rounds}, {way.name}: {speed:.2f} captions/s", flush=True)
        first_losses = [turns[0].loss for turns in self.turns.values()]
        if max(first_losses) - min(first_losses) > LOSS_TOLERANCE[self.platform.dtype]:
            raise UserError(f"the ways do not compute the same loss: {first_losses}; their times cannot be compared")

    def _take_turn(self, way: Way, step: int) -> Turn:
        if way.name not in self.checkpointed:
            try:
                return self.measure_step(way, step)
            except torch.OutOfMemoryError:
                print(f"{way.name}: DOES NOT FIT; from here on with gradient checkpointing", flush=True)
            self.checkpointed.append(way.name)
        try:
            return self.measure_step(way, step)
        except torch.OutOfMemoryError:
            message = "does not fit into the device's memory even with gradient checkpointing; lower"
            raise UserError(f"{way.name}: {message} --device_batch_size") from None

    def measure_step(self, way: Way, step: int) -> Turn:
        """One optimizer step of a way, its layers computed again if the way is `checkpointed`."""
        self.models.restore()
        self._set_checkpointing(way)
        self.platform.reset_peak_memory()
        training = Training(way, self.models, self.platform)
        batches = self.workload.list_batches(way, step)
        others = self.workload.list_batches(way, step + 1)
        tokens = self.workload.count_supervised(step)
        # Workers that read ahead go on beyond the step, so that they do as much during it as it takes.
        loaded = self.workload.load(way, [others[0], *batches, *others[:PREFETCHED]], self.platform)
        training.warm_up(loaded)
        self.platform.wait()
        start = time.perf_counter()
        loss, counts = training.step(loaded, len(batches), tokens)
        self.platform.wait()
        seconds = time.perf_counter() - start
        loaded.close()
        flops = self.costs.flops(counts)
        return Turn(seconds, loss.item(), flops, counts.positions, self.platform.read_peak_memory())

    def _set_checkpointing(self, way: Way) -> None:
        model = self.models.packed if way.packs else self.models.plain
        everything = count_layers(model.config, vision_trainable=True)
        recompute_layers(model, everything if way.name in self.checkpointed else CheckpointedLayers())

    def measure_memory(self, way: Way) -> int:
        """Bytes that a step takes at its peak: on a GPU all of them, on a CPU those beside the weights."""
        if self.platform.is_gpu:
            return max(turn.peak_bytes for turn in self.turns[way.name])
        self.models.restore()
        training = Training(way, self.models, self.platform)
        batches = self.workload.list_batches(way, 0)
        longest = max(batches, key=lambda batch: sum(len(self.workload.records[r].input_ids) for r in batch))
        known = [tensor for model in (self.models.plain, self.models.packed) for tensor in model.state_dict().values()]
        with LiveTensors(known) as live:
            training.step(self.workload.load(way, [longest], self.platform), 1, self.workload.count_supervised(0))
        return live.peak_bytes

    def summarise(self) -> list[dict]:
        """Figures of every way, in the order of the ladder."""
        captions, ceiling = self.workload.shape.global_batch_size, max(self.ceilings)
        rows, before = [], PUBLISHED.name
        for way in LADDER:
            turns = self.turns[way.name]
            teraflops = statistics.median(turn.flops / turn.seconds for turn in turns) / 1e12
            rows.append(
                {
                    "way": way.name,
                    "captions_per_second": captions / statistics.median(turn.seconds for turn in turns),
                    "times_published": self._compare(PUBLISHED.name, way.name),
                    "times_step_before": self._compare(before, way.name),
                    "positions_per_caption": statistics.mean(turn.positions for turn in turns) / captions,
                    "peak_gib": self.measure_memory(way) / GIB,
                    "teraflops_per_second": teraflops,
                    "share_of_ceiling": teraflops * 1e12 / ceiling,
                    "gradient_checkpointing": way.name in self.checkpointed,
                    "turns": [asdict(turn) for turn in turns],
                }
            )
            before = way.name
        return rows

    def _compare(self, slow: str, fast: str) -> float:
        pairs = zip(self.turns[slow], self.turns[fast], strict=True)
        return statistics.median(one.seconds / other.seconds for one, other in pairs)
