"""The plan of a training run, before a GPU or any weight is touched: positions, memory, time; and what to change when
it does not fit.

Memory comes from memory.py, FLOPs from flops.py. Time is FLOPs over an assumed speed; waiting for data, for other
devices and for checkpoints is not in it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import LlavaConfig

from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.model.flops import Accelerator, StepCounts, TrainingCosts
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.terminal import print_table
from meme_llava.train.planning.accelerators import GIB
from meme_llava.train.planning.advice import MemoryPlan, plan_memory, try_changes
from meme_llava.train.planning.memory import ShardingPlan, StepEstimator
from meme_llava.train.settings import TrainArguments

# Shares of a device's peak that training is assumed to reach: a GPU's of its datasheet, a CPU's of what was measured.
GPU_UTILISATION, CPU_UTILISATION = 0.40, 0.60
# Records whose batches are made to know the average one.
SAMPLED_RECORDS = 256
# A step of less than this is over before its kernels are launched: arithmetic says nothing about it.
SHORTEST_STEP = 0.02
NOTE = """\
Model FLOPs are those of matrix multiplications and attention, forward and backward, without what is computed again to
save memory. MFU is model FLOP/s over the device's peak. Waiting for data, for other devices and for checkpoints is not
in the time."""
MEMORY_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits, loss and casts",
    "temporaries": "temporaries at the peak",
    "communication": "communication",
}


@dataclass(frozen=True)
class RunOutline:
    """What a plan has to know of a run's data and schedule.

    Args:
        records: captions of one pass.
        steps, warmup_steps: optimizer steps.
        counts: of the device batches of the run, of all or of a fair sample.
        largest: the batch with the most positions, as `PackingCollator` returned it.
    """

    records: int
    steps: int
    warmup_steps: int
    counts: Sequence[StepCounts]
    largest: Mapping


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a run. Counts are means over the device batches of the run.

    Args:
        accumulation: device batches per optimizer step and device.
        mean: counts of one device batch.
        flops: of one optimizer step over all devices, forward and backward, nothing counted twice.
        recomputed_flops: what recomputing adds to them.
        step_seconds: None where the device's speed is not known.
        memories: by --gradient_checkpointing; that of the run first.
        advice: changes that were tried, each with its memory; empty where the run fits.
    """

    arguments: TrainArguments
    outline: RunOutline
    accelerator: Accelerator
    engine: ShardingPlan
    accumulation: int
    mean: dict[str, float]
    flops: float
    recomputed_flops: float
    utilisation: float
    step_seconds: float | None
    memories: dict[str, MemoryPlan]
    advice: list[tuple[str, MemoryPlan]]

    @property
    def chosen(self) -> MemoryPlan:
        return self.memories[self.arguments.gradient_checkpointing]


def plan_training(
    config: LlavaConfig,
    image_policy: ImagePolicy,
    arguments: TrainArguments,
    outline: RunOutline,
    accelerator: Accelerator,
    processes: int,
) -> TrainingPlan:
    """Plan a run on `processes` devices of one kind. Takes seconds and less than 1 GiB, whatever the model's size.

    Raises:
        UserError: the device cannot compute in the precision of the settings.
    """
    if accelerator.peak_tflops is None and arguments.precision in ("auto", "bf16"):
        raise UserError(
            f"--accelerator {accelerator.name} has no bf16; pass --precision fp32 (fp16 overflows with Qwen2)"
        )
    engine = ShardingPlan.of_run(arguments, processes, on_gpu=not accelerator.is_cpu)
    estimator = StepEstimator(config, image_policy, arguments, engine, outline.largest)
    memories = {
        setting: plan_memory(estimator, setting, accelerator)
        for setting in dict.fromkeys((arguments.gradient_checkpointing, "none", "auto", "full"))
    }
    chosen = memories[arguments.gradient_checkpointing]
    accumulation = arguments.global_batch_size // (arguments.device_batch_size * processes)
    costs, mean = TrainingCosts.of_model(estimator.model), average_counts(outline.counts)
    batches = accumulation * processes
    total = sum(outline.counts, StepCounts())
    flops = costs.flops(total) / len(outline.counts) * batches
    recomputed_flops = count_recomputed(costs, total, chosen.recomputed, estimator) / len(outline.counts) * batches
    utilisation = CPU_UTILISATION if accelerator.is_cpu else GPU_UTILISATION
    speed = find_speed(accelerator, arguments.precision)
    return TrainingPlan(
        arguments=arguments,
        outline=outline,
        accelerator=accelerator,
        engine=engine,
        accumulation=accumulation,
        mean=mean,
        flops=flops,
        recomputed_flops=recomputed_flops,
        utilisation=utilisation,
        step_seconds=speed and (flops + recomputed_flops) / (processes * speed * utilisation),
        memories=memories,
        advice=[] if chosen.fits else try_changes(estimator, accelerator),
    )


def average_counts(counts: Sequence[StepCounts]) -> dict[str, float]:
    """The mean of every count."""
    total = dataclasses.asdict(sum(counts, StepCounts()))
    return {name: value / len(counts) for name, value in total.items()}


def count_recomputed(
    costs: TrainingCosts, counts: StepCounts, recomputed: CheckpointedLayers, estimator: StepEstimator
) -> float:
    """FLOPs that computing activations again adds: another forward pass of these layers."""
    layers = estimator.most
    language = costs.per_position * counts.positions + costs.per_attention_pair * counts.attention_pairs
    vision = costs.per_encoded_image * counts.images
    share = recomputed.vision / layers.vision if layers.vision else 0
    return language.forward * recomputed.language / layers.language + vision.forward * share


def find_speed(accelerator: Accelerator, precision: str) -> float | None:
    """FLOP/s of the device's matrix multiplications in the run's precision, None where it is not known."""
    # Of a GPU in float32, without tensor cores, datasheets differ.
    return accelerator.peak_tflops * 1e12 if accelerator.is_cpu or precision != "fp32" else None


def print_plan(plan: TrainingPlan) -> None:
    """Print what a run will take: data, memory, time, and what to change when it does not fit."""
    print_table("Plan: data and schedule", ("what", "value"), list_data_rows(plan))
    settings = list(plan.memories)
    columns = [f"{setting} (this run)" if setting == settings[0] else setting for setting in settings]
    devices = f"{plan.engine.processes} x {plan.accelerator.name}, {plan.engine.name}"
    print_table(
        f"Plan: memory of each device at the largest batch\n{devices}, in {choose_unit(plan)[0]}",
        ("--gradient_checkpointing", *columns),
        list_memory_rows(plan),
    )
    print_table("Plan: time", ("what", "value"), list_time_rows(plan))
    print(NOTE)
    if not plan.chosen.fits:
        print_advice(plan)


def list_data_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    """What a step computes on."""
    arguments, outline, mean = plan.arguments, plan.outline, plan.mean
    devices, captions = plan.engine.processes, arguments.global_batch_size
    positions, supervised, images = (
        mean[name] * plan.accumulation * devices for name in ("positions", "supervised", "images")
    )
    padded = captions * arguments.model_max_length
    split = f"{devices} device(s) x {arguments.device_batch_size} x {plan.accumulation} in turn"
    largest = outline.largest["input_ids"].numel()
    # The last step is evaluated, too.
    evaluations = 0 if arguments.eval_every is None else math.ceil(outline.steps / arguments.eval_every)
    return [
        ("captions", f"{outline.records:,}"),
        ("optimizer steps", f"{outline.steps:,}, {outline.warmup_steps:,} of them warmup"),
        *([("evaluations", f"{evaluations:,}, which are not in the time")] if evaluations else []),
        ("captions per step", f"{captions:,} = {split}"),
        ("positions per step", f"{positions:,.0f}, {positions / captions:,.0f} per caption"),
        ("the same padded to model_max_length", f"{padded:,}, {padded / positions:.1f} times as many"),
        ("positions that carry loss", f"{supervised:,.0f} per step, {supervised / positions:.0%}"),
        ("images encoded per step", f"{images:,.0f}, {images / captions:.2f} per caption"),
        ("positions of a device batch", f"{mean['positions']:,.0f} on average, {largest:,} in the largest"),
    ]


def list_memory_rows(plan: TrainingPlan) -> list[tuple[str, ...]]:
    """The memory of a step by part, a column for each --gradient_checkpointing."""
    memories, unit = list(plan.memories.values()), choose_unit(plan)[1]
    rows = [
        (label, *(f"{getattr(planned.memory, part) / unit:.2f}" for planned in memories))
        for part, label in MEMORY_PARTS.items()
    ]
    return [
        *rows,
        ("total", *(f"{planned.memory.total / unit:.2f}" for planned in memories)),
        (
            f"usable of {plan.accelerator.memory_gib * GIB / unit:,.1f}",
            *(f"{planned.usable / unit:.2f}" for planned in memories),
        ),
        ("fits", *("yes" if planned.fits else "no" for planned in memories)),
        ("recomputed layers: language", *(f"{planned.recomputed.language}" for planned in memories)),
        ("recomputed layers: vision", *(f"{planned.recomputed.vision}" for planned in memories)),
    ]


def choose_unit(plan: TrainingPlan) -> tuple[str, int]:
    """What the memory of a step is best read in."""
    largest = max(planned.memory.total for planned in plan.memories.values())
    return ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)


def list_time_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Work and time of the run."""
    rows = [
        (
            "model FLOPs per step",
            f"{format_number(plan.flops / 1e12)} TFLOP, {plan.recomputed_flops / plan.flops:.0%} more recomputed",
        )
    ]
    if plan.step_seconds is None:
        precision = plan.arguments.precision
        return [*rows, ("step", f"not estimated: the speed of {plan.accelerator.name} in {precision} is not known")]
    if plan.step_seconds < SHORTEST_STEP:
        return [*rows, ("step", f"not estimated: too little work for the speed of {plan.accelerator.name} to matter")]
    total = plan.step_seconds * plan.outline.steps
    captions = plan.arguments.global_batch_size / plan.step_seconds
    source = "measured just now" if plan.accelerator.is_cpu else "by its datasheet"
    speed = find_speed(plan.accelerator, plan.arguments.precision) / 1e12
    mfu = plan.utilisation * plan.flops / (plan.flops + plan.recomputed_flops)
    return [
        *rows,
        (
            "assumed speed",
            f"{plan.utilisation:.0%} of {format_number(speed)} TFLOP/s per device, {source}; MFU {mfu:.0%}",
        ),
        ("step", format_seconds(plan.step_seconds)),
        ("run", format_seconds(total)),
        ("captions per second", f"{captions:,.2f}, {captions / plan.engine.processes:,.2f} per device"),
    ]


def print_advice(plan: TrainingPlan) -> None:
    """Say that the run does not fit, and what was tried in its place."""
    over = (plan.chosen.memory.total - plan.chosen.usable) / GIB
    print(f"\nThis run does not fit: a step takes {over:.1f} GiB more than {plan.accelerator.name} has to give.")
    rows = [
        (change, f"{planned.memory.total / GIB:.1f} of {planned.usable / GIB:.1f}", "yes" if planned.fits else "no")
        for change, planned in plan.advice
    ]
    print_table("Changes that keep the global batch", ("change", "GiB", "fits"), rows)
    if not any(planned.fits for _, planned in plan.advice):
        print("None of them fits. Train less of the model (train_type lora), or a smaller one.")


def format_number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{float(f'{value:.3g}'):,}".removesuffix(".0")


def format_seconds(seconds: float) -> str:
    """A duration as a person says it: 0.42 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{format_number(seconds)} s"
    minutes = round(seconds / 60)
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
