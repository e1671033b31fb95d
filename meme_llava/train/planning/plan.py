"""The plan of a training run, before a GPU or any weight is touched: positions, memory, time; and what to change when
it does not fit.

Time is FLOPs over an assumed speed; waiting for data, for other devices and for checkpoints is not in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.utils.benchmark import Timer

from meme_llava.distributed.environment import choose_engine
from meme_llava.errors import UserError, count
from meme_llava.model.accelerators import ACCELERATORS, CPU, Accelerator, name_accelerator
from meme_llava.model.flops import StepCounts, TrainingCosts
from meme_llava.model.offloading import measure_machine_memory
from meme_llava.model.packing import count_computed, describe_rows
from meme_llava.terminal import format_number, format_seconds, print_table
from meme_llava.train.planning.memory import MemoryPlan, StepEstimator, StepMemory
from meme_llava.train.run_plan import RunPlan, list_warnings

GIB = 2**30
# Shares of a device's peak that training is assumed to reach: a GPU's of its datasheet, a CPU's of what was measured.
GPU_UTILISATION, CPU_UTILISATION = 0.40, 0.60
# A step of less than this is over before its kernels are launched: arithmetic says nothing about it.
SHORTEST_STEP = 0.02
# To measure a device's speed: large enough to be limited by arithmetic, 1 TFLOP on a GPU, 2 GFLOP on a CPU.
MEASURING_SECONDS, GPU_MATRIX_SIZE, CPU_MATRIX_SIZE = 1.0, 8192, 1024
NOTE = """\
Model FLOPs are those of matrix multiplications and attention, forward and backward, without what is computed again to
save memory. MFU is model FLOP/s over the device's peak. Waiting for data, for other devices and for checkpoints is not
in the time."""
MUCH_LARGER = 1.2  # memory of a device that is worth trying, as a multiple
LABELS = {"logits": "logits, loss and casts", "temporaries": "temporaries at the peak"}


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of a short name such as a800-80gb, of a device's own name, or "cpu" (this one; takes a second).
    Raises UserError where none of that name is known."""
    if name.lower() == CPU:
        # All of this machine's memory, and its fp32 ceiling as measured now with the threads torch uses.
        speed, memory = measure_ceiling(torch.device(CPU), torch.float32), measure_machine_memory()
        return Accelerator(CPU, CPU, speed / 1e12, memory / GIB)
    return name_accelerator(name)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of many large matrix multiplications: what a training step could reach at most.

    The fastest, because whatever else happens on the machine can only slow one down.
    """
    size = CPU_MATRIX_SIZE if device.type == CPU else GPU_MATRIX_SIZE
    left, right, result = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    variables = {"torch": torch, "left": left, "right": right, "result": result}
    timer = Timer("torch.mm(left, right, out=result)", globals=variables, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=MEASURING_SECONDS).times)


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a run.

    Args:
        step: counts of one optimizer step over all devices.
        flops: of the step, forward and backward, nothing counted twice; recomputing adds `recomputed_flops`.
        speed: of a device's matrix multiplications in FLOP/s, None where it is not known.
        step_seconds: None where the speed is not known.
        memories: by --gradient_checkpointing; that of the run first.
        advice: changes that were tried, each with its memory; empty where the run fits.
    """

    estimator: StepEstimator
    accelerator: Accelerator
    step: StepCounts
    flops: float
    recomputed_flops: float
    speed: float | None
    step_seconds: float | None
    memories: dict[str, MemoryPlan]
    advice: list[tuple[str, MemoryPlan]]

    @property
    def chosen(self) -> MemoryPlan:
        return next(iter(self.memories.values()))


def plan_training(
    estimator: StepEstimator,
    counts: Sequence[StepCounts],
    accelerator: Accelerator,
    make_batch: Callable[[int], Mapping],
) -> TrainingPlan:
    """Plan a run on devices of one kind. Takes seconds and less than 1 GiB, whatever the model's size. Raises UserError
    where the device cannot compute in the precision of the settings.

    Args:
        counts: of the device batches of the run, of all or of a fair sample.
        make_batch: the device batch with the most positions with only so many of its records, for what is tried where
            the run does not fit.
    """
    arguments = estimator.arguments
    uses_bf16 = arguments.precision in ("auto", "bf16")
    if accelerator.peak_tflops is None and uses_bf16:
        raise UserError(
            f"--accelerator {accelerator.name} has no bf16; pass --precision fp32 (fp16 overflows with Qwen2)"
        )
    settings = dict.fromkeys((arguments.gradient_checkpointing, "none", "auto", "full"))
    memory = share_memory(accelerator, estimator.processes)
    memories = {setting: estimator.plan(setting, memory) for setting in settings}
    chosen, most = memories[arguments.gradient_checkpointing], estimator.most
    costs = TrainingCosts.of_model(estimator.model)
    batches = arguments.global_batch_size // arguments.device_batch_size
    step = sum(counts, StepCounts()) * (batches / len(counts))
    flops = costs.flops(step)
    # Another forward pass of the layers that compute their activations again.
    language = costs.per_position[0] * step.positions + costs.per_attention_pair[0] * step.attention_pairs
    recomputed = language * chosen.recomputed.language / most.language
    if most.vision:
        recomputed += costs.per_encoded_image[0] * step.images * chosen.recomputed.vision / most.vision
    # Of a GPU in float32, without tensor cores, datasheets differ.
    speed = accelerator.peak_tflops * 1e12 if accelerator.is_cpu or uses_bf16 else None
    assumed = estimator.processes * find_utilisation(accelerator)
    advice = []
    changes = () if chosen.fits else list_changes(estimator, accelerator, make_batch)
    for change, changed, setting, device in changes:
        advice.append((change, changed.plan(setting, share_memory(device, changed.processes))))
        if advice[-1][1].fits:
            break
    return TrainingPlan(
        estimator=estimator,
        accelerator=accelerator,
        step=step,
        flops=flops,
        recomputed_flops=recomputed,
        speed=speed,
        step_seconds=speed and (flops + recomputed) / (assumed * speed),
        memories=memories,
        advice=advice,
    )


def share_memory(accelerator: Accelerator, processes: int) -> int:
    """Bytes of memory that each process has; the processes of a CPU run share one."""
    return int(accelerator.memory_gib * GIB) // (processes if accelerator.is_cpu else 1)


def list_changes(
    estimator: StepEstimator, accelerator: Accelerator, make_batch: Callable[[int], Mapping]
) -> Iterator[tuple[str, StepEstimator, str, Accelerator]]:
    """Changes that keep the global batch, each with the step and --gradient_checkpointing and device that it means; in
    the order of what they ask for: settings, four bits, engines that divide more, more devices, larger ones.

    Args:
        make_batch: the largest batch of the run with only so many of its records.
    """
    arguments, processes = estimator.arguments, estimator.processes
    setting, fewest, flags = arguments.gradient_checkpointing, arguments.device_batch_size, ""
    full, smallest = "--gradient_checkpointing full", estimator
    least = estimator.plan("full", share_memory(accelerator, processes))
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
    can_round = arguments.language_model_training != "full" and not arguments.torch_compile
    can_round = can_round and not describe_rows(estimator.config.text_config) and not estimator.engine.shards_weights
    # Several devices can divide the weights without rounding them.
    if processes == 1 and can_round and not arguments.load_in_4bit:
        rounded = smallest.with_changes(arguments=replace(arguments, load_in_4bit=True))
        yield f"--load_in_4bit{flags}", rounded, setting, accelerator
    most = 2 if arguments.whole_weights_for else 3
    stages = [stage for stage in (2, 3) if processes > 1 and estimator.stage < stage <= most]
    engines = [(f"--engine zero{stage}", stage, processes) for stage in stages]
    engines += [(f"{times * processes} GPUs with --engine zero{most}", most, times * processes) for times in (2, 4)]
    for change, stage, devices in engines:
        if arguments.global_batch_size % (devices * fewest) == 0:
            engine = choose_engine(f"zero{stage}", devices, on_gpu=True)
            divided = smallest.with_changes(engine=engine, processes=devices)
            yield f"{change}, {full}{flags}", divided, "full", accelerator
    larger = {other.memory_gib: other for other in ACCELERATORS if other.peak_tflops}
    for memory, other in sorted(larger.items()):
        if memory > accelerator.memory_gib * MUCH_LARGER:
            yield f"a device with the memory of {other.name}", estimator, setting, other


def find_utilisation(accelerator: Accelerator) -> float:
    """The share of the device's speed that training is assumed to reach."""
    return CPU_UTILISATION if accelerator.is_cpu else GPU_UTILISATION


def print_plan(plan: TrainingPlan, run: RunPlan) -> None:
    """Print what a run will take: data, memory, time, and what to change when it does not fit."""
    print_table("Plan: data and schedule", ("what", "value"), list_data_rows(plan, run))
    print_memory(plan)
    print_table("Plan: time", ("what", "value"), list_time_rows(plan, run.steps))
    print(NOTE, *list_warnings(plan.estimator.arguments, len(run.data.dataset), run.steps), sep="\n")
    if plan.chosen.fits:
        return
    over = (plan.chosen.memory.total - plan.chosen.usable) / GIB
    print(f"\nThis run does not fit: a step takes {over:.1f} GiB more than {plan.accelerator.name} has to give.")
    rows = [
        (change, f"{planned.memory.total / GIB:.1f} of {planned.usable / GIB:.1f}", "yes" if planned.fits else "no")
        for change, planned in plan.advice
    ]
    print_table("Changes that keep the global batch", ("change", "GiB", "fits"), rows)
    if not any(planned.fits for _, planned in plan.advice):
        print("None of them fits. Train less of the model (train_type lora), or a smaller one.")


def list_data_rows(plan: TrainingPlan, run: RunPlan) -> list[tuple[str, str]]:
    """What a step computes on."""
    arguments, step = plan.estimator.arguments, plan.step
    devices, captions, size = plan.estimator.processes, arguments.global_batch_size, arguments.device_batch_size
    text_config, padded = plan.estimator.config.text_config, captions * arguments.model_max_length
    rows, mean = describe_rows(text_config), step.positions * size / captions
    largest, filled = count_computed(plan.estimator.batch, text_config), ", all as long as its longest" if rows else ""
    # The last step is evaluated, too.
    evaluations = 0 if arguments.eval_every is None else math.ceil(run.steps / arguments.eval_every)
    return [
        ("captions", f"{len(run.data.dataset):,}"),
        *([("rows", rows)] if rows else []),
        ("optimizer steps", f"{run.steps:,}, {run.warmup_steps:,} of them warmup"),
        *([("evaluations", f"{evaluations:,}, which are not in the time")] if evaluations else []),
        (
            "captions per step",
            f"{captions:,} = {count(devices, 'device')} x {size} x {captions // (size * devices)} in turn",
        ),
        ("positions per step", f"{step.positions:,.0f}, {step.positions / captions:,.0f} per caption"),
        ("the same padded to model_max_length", f"{padded:,}, {padded / step.positions:.1f} times as many"),
        ("positions that carry loss", f"{step.supervised:,.0f} per step, {step.supervised / step.positions:.0%}"),
        ("images encoded per step", f"{step.images:,.0f}, {step.images / captions:.2f} per caption"),
        ("positions of a device batch", f"{mean:,.0f} on average, {largest:,} in the largest{filled}"),
    ]


def print_memory(plan: TrainingPlan) -> None:
    """Print the memory of a step by part, a column for each --gradient_checkpointing."""
    settings, memories = list(plan.memories), list(plan.memories.values())
    # What the memory of a step is best read in.
    unit, size = ("GiB", GIB) if max(planned.memory.total for planned in memories) >= GIB else ("MiB", 2**20)
    sizes = {
        LABELS.get(part.name, part.name): [getattr(planned.memory, part.name) for planned in memories]
        for part in fields(StepMemory)
    }
    sizes["total"] = [planned.memory.total for planned in memories]
    sizes[f"usable of {plan.accelerator.memory_gib * GIB / size:,.1f}"] = [planned.usable for planned in memories]
    rows = [
        *((label, *(f"{value / size:.2f}" for value in values)) for label, values in sizes.items()),
        ("fits", *("yes" if planned.fits else "no" for planned in memories)),
        ("recomputed layers: language", *(f"{planned.recomputed.language}" for planned in memories)),
        ("recomputed layers: vision", *(f"{planned.recomputed.vision}" for planned in memories)),
    ]
    devices = f"{plan.estimator.processes} x {plan.accelerator.name}, engine {plan.estimator.engine.name}"
    rounded = "; language model's layers in four bits" if plan.estimator.arguments.load_in_4bit else ""
    title = f"Plan: memory of each device at the largest batch\n{devices}, in {unit}{rounded}"
    print_table(title, ("--gradient_checkpointing", f"{settings[0]} (this run)", *settings[1:]), rows)


def list_time_rows(plan: TrainingPlan, steps: int) -> list[tuple[str, str]]:
    """Work and time of the run."""
    work = f"{format_number(plan.flops / 1e12)} TFLOP, {plan.recomputed_flops / plan.flops:.0%} more recomputed"
    rows, name, seconds = [("model FLOPs per step", work)], plan.accelerator.name, plan.step_seconds
    arguments, share = plan.estimator.arguments, find_utilisation(plan.accelerator)
    if seconds is None:
        return [*rows, ("step", f"not estimated: the speed of {name} in {arguments.precision} is not known")]
    if seconds < SHORTEST_STEP:
        return [*rows, ("step", f"not estimated: too little work for the speed of {name} to matter")]
    captions = arguments.global_batch_size / seconds
    speed, source = format_number(plan.speed / 1e12), "measured just now" if name == CPU else "by its datasheet"
    mfu = share * plan.flops / (plan.flops + plan.recomputed_flops)
    return [
        *rows,
        ("assumed speed", f"{share:.0%} of {speed} TFLOP/s per device, {source}; MFU {mfu:.0%}"),
        ("step", format_seconds(seconds)),
        ("run", format_seconds(seconds * steps)),
        ("captions per second", f"{captions:,.2f}, {captions / plan.estimator.processes:,.2f} per device"),
    ]
