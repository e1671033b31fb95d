"""A run that is ready to train: the model with what is trainable, how it computes, its optimizer, its batches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import DeepSpeedPlugin
from torch import nn
from torch.utils.data import DataLoader

from meme_llava.cli import to_plain
from meme_llava.dataset.check import describe_findings, write_quarantine
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.dataset import TrainingOrder
from meme_llava.dataset.sampling import BatchShape
from meme_llava.distributed.environment import DEEPSPEED, Heartbeat, find_rank, is_main_process
from meme_llava.distributed.processes import (
    broadcast_from_main,
    choose_device,
    gather,
    leave_signals_to_parent,
    make_deepspeed_plugin,
)
from meme_llava.errors import count
from meme_llava.model.flops import collate_and_count
from meme_llava.model.lean_layers import find_liger, use_liger
from meme_llava.model.llava import Processing
from meme_llava.model.loading import quiet_transformers
from meme_llava.model.offloading import measure_machine_memory
from meme_llava.model.packed_attention import VARLEN, choose_attention, find_flash_attention
from meme_llava.model.packed_llava import compile_layers, load_packed_llava
from meme_llava.model.packing import count_computed, describe_rows, find_obstacle
from meme_llava.model.trainable import (
    CheckpointedLayers,
    ParameterGroup,
    count_layers,
    load_projector,
    load_trained_weights,
    plan_parameter_groups,
    prepare_trainable,
    recompute_layers,
)
from meme_llava.storage.files import raise_os_errors, write_json
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.terminal import print_table
from meme_llava.train.run_plan import RunPlan, list_warnings
from meme_llava.train.session import PREFETCHED_BATCHES, check_shared_memory, choose_bf16, count_workers
from meme_llava.train.settings import TrainArguments

GIB = 2**30
# Float32 numbers that a layer keeps for each position, at most, as multiples of its width and of its MLP's.
KEPT_WIDTHS, KEPT_MLP_WIDTHS = 40, 20
# Weights, gradients, two moments of Adam and temporaries, at most, as a multiple of the float32 weights.
STATE_COPIES = 6
MAX_LISTED_CUTS = 20


@dataclass(frozen=True)
class Computation:
    """How steps are computed; it changes memory and time, and results by no more than rounding."""

    precision: str  # bf16 or fp32
    attention: str  # of the language model, as --attention spells it
    recomputed: CheckpointedLayers  # in the backward pass
    uses_liger: bool = False
    # Memory of a step with the largest batch; None where it was not asked for, or cannot come near the machine's.
    step_bytes: int | None = None
    line: str = ""  # what a person is told of it

    def to_record(self) -> dict:
        """What the run record keeps."""
        estimate = {} if self.step_bytes is None else {"estimated_step_bytes": self.step_bytes}
        chosen = {"precision": self.precision, "attention": self.attention, "liger": self.uses_liger}
        return {**chosen, "recomputed_layers": asdict(self.recomputed), **estimate}


@dataclass(frozen=True)
class PreparedRun:
    """A planned run with all that computes its steps; `groups` are what trains and how fast, `order` its records."""

    plan: RunPlan
    uses_bf16: bool
    deepspeed_plugin: DeepSpeedPlugin | None
    model: nn.Module
    groups: list[ParameterGroup]
    order: TrainingOrder
    collator: PackingCollator
    computation: Computation

    def to_record(self, step: int) -> dict:
        """The run record at an optimizer step."""
        groups = [group.describe() for group in self.groups]
        return {**self.plan.to_record(step), "parameter_groups": groups, "computation": self.computation.to_record()}


def prepare_run(plan: RunPlan, heartbeat: Heartbeat) -> PreparedRun:
    """Load the model as it is at the start point, with what is trainable, and print what the run is."""
    arguments, processing = plan.arguments, plan.processing
    order, collator = make_order(plan)
    device, uses_bf16 = choose_device(plan.engine), choose_bf16(arguments)
    plugin = None
    if plan.engine.kind == DEEPSPEED:
        # Before the model is loaded: it raises where the file leaves something open.
        size, width = arguments.device_batch_size, processing.config.text_config.hidden_size
        plugin = make_deepspeed_plugin(plan.engine, size, plan.accumulation, arguments.max_grad_norm, uses_bf16, width)
    largest_batch = collator(order.fetch_largest_batch())
    check_shared_memory(largest_batch, count_workers(arguments, device))
    # Processes that recomputed different layers, for what their cards have free, would wait for each other for ever.
    memory = min(gather(measure_memory(device, plan.processes)))
    computation = broadcast_from_main(
        lambda: plan_computation(arguments, processing, largest_batch, device, uses_bf16, plan.processes, memory)
    )
    heartbeat.beat()
    model = prepare_model(plan, computation, uses_bf16, device)
    groups = plan_parameter_groups(model, arguments)
    run = PreparedRun(plan, uses_bf16, plugin, model, groups, order, collator, computation)
    if is_main_process():
        print_run(run)
    return run


def make_order(plan: RunPlan) -> tuple[TrainingOrder, PackingCollator]:
    """The records in the order of training, and what makes a batch of some."""
    arguments, start, processing = plan.arguments, plan.start, plan.processing
    own_rows = bool(find_obstacle(processing.config.text_config))
    shared = arguments.shared_images and not own_rows
    shape = BatchShape(arguments.global_batch_size, arguments.device_batch_size, plan.processes)
    done = start.step, start.records
    order = TrainingOrder(plan.data.dataset, plan.steps, shape, arguments.seed, shared, *done, own_rows)
    tokens = processing.encoder.image_token_id, processing.tokens_per_image
    return order, PackingCollator(*tokens, processing.image_policy.size, arguments.loss_average, shared)


def plan_computation(
    arguments: TrainArguments,
    processing: Processing,
    largest_batch: Mapping,
    device: torch.device,
    uses_bf16: bool,
    processes: int,
    memory: int,
) -> Computation:
    """Choose what the settings leave open, before the model is loaded; `largest_batch` is computed on the
    most positions of all, `memory` is what each process has, in bytes. Raises UserError where the attention asked for
    cannot run here."""
    attention = choose_attention(arguments.attention, device, uses_bf16)
    on_gpu, config = device.type == "cuda", processing.config
    most = count_layers(config, vision_trainable=arguments.vision_tower_training != "frozen")
    recomputed = most if arguments.gradient_checkpointing == "full" else CheckpointedLayers()
    needed, note, fits = None, "", not on_gpu and bound_memory(arguments, config, largest_batch) <= memory // 2
    if arguments.gradient_checkpointing == "auto" and not fits:
        from meme_llava.train.planning.memory import StepEstimator

        policy = processing.image_policy
        estimator = StepEstimator(config, policy, arguments, largest_batch, processes, on_gpu)
        planned = estimator.plan("auto", memory)
        recomputed, needed = planned.recomputed, planned.memory.total
        positions = count_computed(largest_batch, config.text_config)
        note = f"; the largest batch, {positions:,} positions, takes about {needed / GIB:.1f} GiB"
        if not planned.fits:
            note += (
                f"\nwarning: only {planned.usable / GIB:.1f} GiB can be used, so the run may stop for lack of memory "
                "when it comes to that batch; --plan shows what would fit"
            )
    layers = "no layer computed twice"
    if recomputed != CheckpointedLayers():
        layers = f"{recomputed.language} language and {recomputed.vision} vision layers computed twice"
    precision, uses_liger = "bf16" if uses_bf16 else "fp32", False
    parts = [f"computes in {precision}", describe_rows(config.text_config) or f"attention {attention}"]
    if on_gpu and attention == VARLEN and (why := find_flash_attention()[1]):
        parts.append(f"flash-attn is installed and cannot be loaded ({why})")
    if arguments.load_in_4bit:
        parts.append(f"language model's linear layers in four bits by bitsandbytes {version('bitsandbytes')}")
    # A compiler makes kernels of its own.
    if on_gpu and arguments.fused_kernels == "auto" and not arguments.torch_compile:
        uses_liger, words = find_liger(config.text_config.model_type)
        parts += [words] * bool(words)
    return Computation(precision, attention, recomputed, uses_liger, needed, "; ".join([*parts, layers]) + note)


def measure_memory(device: torch.device, processes: int) -> int:
    """Bytes that this process can have; the processes of a CPU run share the machine's memory, or the container's."""
    if device.type == "cuda":
        # What others hold on the same card is not there for us.
        return torch.cuda.mem_get_info(device)[0]
    return measure_machine_memory() // processes


def bound_memory(arguments: TrainArguments, config, batch: Mapping) -> int:
    """More bytes than a step in float32 can take, counted roughly. Saves small runs the seconds of an exact count."""
    text, vision = config.text_config, config.vision_config
    stored = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
    patches = len(batch["pixel_values"]) * ((vision.image_size // vision.patch_size) ** 2 + 1)
    kept = sum(
        rows * tower.num_hidden_layers * (KEPT_WIDTHS * tower.hidden_size + KEPT_MLP_WIDTHS * tower.intermediate_size)
        for rows, tower in ((count_computed(batch, text), text), (patches, vision))
    )
    # Every segment's mask over its path, in every layer.
    masks = batch["max_seqlen_q"] * len(batch["kv_index"]) * text.num_hidden_layers
    logits = 4 * len(batch["loss_positions"]) * text.vocab_size
    return 2 * STATE_COPIES * stored + 4 * (kept + logits) + masks


def prepare_model(plan: RunPlan, computation: Computation, uses_bf16: bool, device: torch.device) -> nn.Module:
    """The base with what is trainable, as it is at the start point, and how its layers compute; in main memory, from
    where it goes to `device`, but for layers in four bits, which are there already."""
    arguments = plan.arguments
    # bf16, half the memory, where training computes in it; what is trainable becomes float32.
    dtype = torch.bfloat16 if uses_bf16 else torch.float32
    options = {"maps_weights": device.type == "cuda", "four_bit_on": device if arguments.load_in_4bit else None}
    model = load_packed_llava(arguments.model, dtype, plan.processing.image_policy, computation.attention, **options)
    if computation.uses_liger:
        use_liger(model.model.language_model)
    model = prepare_trainable(model, arguments, arguments.seed)
    if plan.start.checkpoint is not None:
        load_trained_weights(model, plan.start.checkpoint)
    elif arguments.projector_from is not None:
        load_projector(model, arguments.projector_from)
    recompute_layers(model, computation.recomputed)
    if arguments.torch_compile:
        compile_layers(model)
    return model


def write_sidecars(folder: Path, processing: Processing, record: Mapping) -> None:
    """Put processor and run record beside trained weights. Raises OSError where they cannot be written."""
    with quiet_transformers(), raise_os_errors():
        processing.processor.save_pretrained(folder)
    write_json(folder / RUN_RECORD, record)


def print_run(run: PreparedRun) -> None:
    """Print chosen settings, data, schedule and parameter groups; write down which records do not train."""
    plan, arguments, data = run.plan, run.plan.arguments, run.plan.facts["data"]
    unused, others = arguments.list_unused(), arguments.list_defaults()
    rows = [
        (name, f"{value}" + "   (not used by this run)" * (name in unused))
        for name, value in to_plain(arguments).items()
        if name not in others
    ]
    print_table("Settings", ("setting", "value"), rows)
    print(f"{len(others)} other settings have their defaults; docs/settings.md and run_record.json list them\n")
    shown = [(name, str(value)) for name, value in data.items() if name not in ("cut_records", "findings")]
    print_table("Data", ("", "value"), shown)
    for cut in data["cut_records"][:MAX_LISTED_CUTS]:
        print(f"cut to model_max_length: {cut}")
    if data["cut_records"]:
        print(f"{count(len(data['cut_records']), 'answer')} cut to model_max_length; run_record.json lists all of them")
    groups = [
        (g["role"], g["kind"], g["tensors"], g["parameters"], f"{g['learning_rate']:g}", f"{g['weight_decay']:g}")
        for g in (group.describe() for group in run.groups)
    ]
    print_table("What learns", ("role", "kind", "tensors", "parameters", "peak rate", "decay"), groups)
    print(
        f"{count(plan.steps, 'step')} of {count(arguments.global_batch_size, 'record')} "
        f"({arguments.device_batch_size} a device x {count(plan.processes, 'process', 'processes')} x "
        f"{plan.accumulation} accumulated), {plan.warmup_steps} of them warmup; engine {plan.engine.name}"
    )
    warnings = list_warnings(arguments, len(plan.data.dataset), plan.steps)
    print(run.computation.line, *warnings, sep="\n", flush=True)
    if findings := describe_findings(plan.data.checked):
        print(findings)
    if path := write_quarantine(arguments.output_dir, plan.data.checked):
        print(f"{count(len(plan.data.checked.bad), 'bad record')} left out and listed in {path}")


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """AdamW with each group's rate and decay."""
    options = [
        {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return torch.optim.AdamW(options, fused=True)


def make_loader(run: PreparedRun, device: torch.device) -> DataLoader:
    """This process's device batches that are to come; the processes take them in turn."""
    plan = run.plan
    size, processes, workers = plan.arguments.device_batch_size, plan.processes, count_workers(plan.arguments, device)
    first = plan.start.step * plan.accumulation * processes
    numbers = range(first + find_rank(), len(run.order) // size, processes)
    return DataLoader(
        run.order,
        batch_sampler=[range(number * size, (number + 1) * size) for number in numbers],
        collate_fn=partial(collate_and_count, collate=run.collator),
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=device.type == "cuda",
        # A scheduler's SIGTERM reaches every process of a job; the workers must live until the state is saved.
        worker_init_fn=leave_signals_to_parent,
    )
