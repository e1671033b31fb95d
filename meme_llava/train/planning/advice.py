"""Whether a step fits on a device, and what to change when it does not, found by trying: less at once, state sharded,
other devices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from meme_llava.distributed.engines import choose_engine
from meme_llava.model.flops import ACCELERATORS, Accelerator
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train.planning.memory import StepEstimator, StepMemory, find_usable

GIB = 2**30
MUCH_LARGER = 1.2  # memory of a device that is worth trying, as a multiple


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a step on one device under one choice of recomputed layers, in bytes."""

    recomputed: CheckpointedLayers
    memory: StepMemory
    usable: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable


def plan_memory(estimator: StepEstimator, setting: str, accelerator: Accelerator) -> MemoryPlan:
    """The memory of a step under --gradient_checkpointing `setting`."""
    # The processes of a CPU run share one memory.
    memory = int(accelerator.memory_gib * GIB) // (estimator.processes if accelerator.is_cpu else 1)
    recomputed = estimator.choose_recomputed(setting, memory)
    return MemoryPlan(recomputed, estimator.estimate(recomputed), find_usable(memory))


def try_changes(
    estimator: StepEstimator, accelerator: Accelerator, make_batch: Callable[[int], Mapping]
) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes that keep the global batch, each with the memory that it would take, up to the first that fits.

    In the order of what they ask for: settings, engines that divide more, more devices, larger ones.

    Args:
        make_batch: the largest batch of the run with only so many of its records.
    """
    for change, changed, setting, device in _list_changes(estimator, accelerator, make_batch):
        planned = plan_memory(changed, setting, device)
        yield change, planned
        if planned.fits:
            return


def _list_changes(
    estimator: StepEstimator, accelerator: Accelerator, make_batch: Callable[[int], Mapping]
) -> Iterator[tuple[str, StepEstimator, str, Accelerator]]:
    arguments, processes = estimator.arguments, estimator.processes
    setting, fewest, flags = arguments.gradient_checkpointing, arguments.device_batch_size, ""
    full, smallest = "--gradient_checkpointing full", estimator
    least = plan_memory(estimator, "full", accelerator)
    if least.memory.state <= least.usable:  # else it would not fit even if it computed on nothing
        while fewest % 2 == 0:
            fewest //= 2
            flags = f" --device_batch_size {fewest}"
            smallest = estimator.with_changes(batch=make_batch(fewest))
            yield flags.strip(), smallest, setting, accelerator
        if setting == "none":
            yield full, estimator, "full", accelerator
            if flags:
                yield full + flags, smallest, "full", accelerator
    if accelerator.is_cpu:
        return
    stages = [stage for stage in (2, 3) if processes > 1 and stage > estimator.stage]
    engines = [(f"--engine zero{stage}", stage, processes) for stage in stages]
    engines += [(f"{times * processes} GPUs with --engine zero3", 3, times * processes) for times in (2, 4)]
    for change, stage, devices in engines:
        if arguments.global_batch_size % (devices * fewest) == 0:
            engine = choose_engine(f"zero{stage}", devices, on_gpu=True)
            divided = smallest.with_changes(engine=engine, processes=devices)
            yield f"{change}, {full}{flags}", divided, "full", accelerator
    larger = {other.memory_gib: other for other in ACCELERATORS if other.peak_tflops}
    for memory, other in sorted(larger.items()):
        if memory > accelerator.memory_gib * MUCH_LARGER:
            yield f"a device with the memory of {other.name}", estimator, setting, other
