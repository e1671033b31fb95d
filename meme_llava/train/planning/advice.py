"""What to change when a run does not fit in memory, found by trying: less at once, state sharded, other devices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import LlavaConfig

from meme_llava.model.flops import ACCELERATORS, Accelerator
from meme_llava.model.llava import count_image_tokens
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train.planning.accelerators import GIB
from meme_llava.train.planning.memory import ShardingPlan, StepEstimator, StepMemory, find_usable

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
    memory = int(accelerator.memory_gib * GIB) // (estimator.engine.processes if accelerator.is_cpu else 1)
    recomputed = estimator.choose_recomputed(setting, memory)
    return MemoryPlan(recomputed, estimator.estimate(recomputed), find_usable(memory))


def try_changes(estimator: StepEstimator, accelerator: Accelerator) -> list[tuple[str, MemoryPlan]]:
    """Changes that keep the global batch, tried until one lets the run fit, each with the memory that it would take.

    In the order of what they ask for: settings, engines that divide more, more devices, larger ones.
    """
    tried: list[tuple[str, MemoryPlan]] = []
    for change, planned in _list_changes(estimator, accelerator):
        tried.append((change, planned))
        if planned.fits:
            break
    return tried


def _list_changes(estimator: StepEstimator, accelerator: Accelerator) -> Iterator[tuple[str, MemoryPlan]]:
    arguments, engine = estimator.arguments, estimator.engine
    setting, size = arguments.gradient_checkpointing, arguments.device_batch_size
    smallest, fewest = estimator, size
    if not holds_too_much(plan_memory(estimator, "full", accelerator)):
        while fewest % 2 == 0:
            fewest //= 2
            smallest = copy_with_batch(estimator, shrink_batch(estimator.batch, fewest / size, estimator.config))
            yield f"--device_batch_size {fewest}", plan_memory(smallest, setting, accelerator)
        if setting == "none":
            yield "--gradient_checkpointing full", plan_memory(estimator, "full", accelerator)
            if fewest < size:
                both = f"--gradient_checkpointing full --device_batch_size {fewest}"
                yield both, plan_memory(smallest, "full", accelerator)
    if accelerator.is_cpu:
        return
    flags = "--gradient_checkpointing full" + (f" --device_batch_size {fewest}" if fewest < size else "")
    for description, divided in list_engines(engine, arguments.global_batch_size, fewest):
        smallest = smallest.with_engine(divided)
        yield f"{description}, {flags}", plan_memory(smallest, "full", accelerator)
    larger = {other.memory_gib: other for other in ACCELERATORS if other.peak_tflops}
    for memory, other in sorted(larger.items(), key=lambda item: item[0]):
        if memory > accelerator.memory_gib * MUCH_LARGER:
            yield f"a device with the memory of {other.name}", plan_memory(estimator, setting, other)


def holds_too_much(planned: MemoryPlan) -> bool:
    """Whether a step would not fit even if it computed on nothing."""
    memory = planned.memory
    state = memory.weights + memory.gradients + memory.optimizer + memory.communication
    return state > planned.usable


def list_engines(
    engine: ShardingPlan, global_batch_size: int, device_batch_size: int
) -> list[tuple[str, ShardingPlan]]:
    """Engines that divide more of the state, or among more devices."""
    processes = engine.processes
    stages = [stage for stage in (2, 3) if stage > (engine.zero_stage or 0)] if processes > 1 else []
    engines = [(f"--engine zero{stage}", engine.with_zero(stage, processes)) for stage in stages]
    for more in (2 * processes, 4 * processes):
        if global_batch_size % (more * device_batch_size) == 0:
            engines.append((f"{more} GPUs with --engine zero3", engine.with_zero(3, more)))
    return engines


def copy_with_batch(estimator: StepEstimator, batch: Mapping) -> StepEstimator:
    """The same run with another largest batch."""
    return StepEstimator(estimator.config, estimator.image_policy, estimator.arguments, estimator.engine, batch)


def shrink_batch(batch: Mapping, share: float, config: LlavaConfig) -> dict:
    """A `share` of a packed batch's segments, the first ones: paths lead back only, so they are a batch themselves."""
    segments = max(1, round((len(batch["cu_seqlens_q"]) - 1) * share))
    starts, cu_seqlens_k = batch["cu_seqlens_q"][: segments + 1], batch["cu_seqlens_k"][: segments + 1]
    positions, keys = int(starts[-1]), int(cu_seqlens_k[-1])
    input_ids = batch["input_ids"][:, :positions]
    runs = int((input_ids == config.image_token_id).sum()) // count_image_tokens(config)
    shown, image_runs = batch["image_runs"][:runs].unique(return_inverse=True)
    carries_loss = batch["loss_positions"] < positions
    return {
        "input_ids": input_ids,
        "position_ids": batch["position_ids"][:, :positions],
        "cu_seqlens_q": starts,
        "kv_index": batch["kv_index"][:keys],
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": int(starts.diff().max()),
        "max_seqlen_k": int(cu_seqlens_k.diff().max()),
        "pixel_values": batch["pixel_values"][shown] if runs else batch["pixel_values"][:1],
        "image_runs": image_runs,
        **{name: batch[name][carries_loss] for name in ("loss_positions", "loss_targets", "loss_weights")},
    }
