"""A run that is ready to train: the model with what is trainable, how it computes, its optimizer, its batches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlavaConfig

from meme_llava.cli import to_plain
from meme_llava.dataset.check import print_findings, write_quarantine
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.dataset import LoadedData, TrainingOrder
from meme_llava.dataset.images import ImagePolicy
from meme_llava.dataset.sampling import BatchShape
from meme_llava.distributed.engines import DEEPSPEED
from meme_llava.distributed.environment import Heartbeat, find_rank, is_main_process
from meme_llava.distributed.processes import StepShape, choose_device, leave_signals_to_parent, make_deepspeed_plugin
from meme_llava.model.llava import Processing, quiet_transformers
from meme_llava.model.packed_attention import NAMES, choose_attention
from meme_llava.model.packed_llava import compile_layers, load_packed_llava
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
from meme_llava.storage.files import write_json
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.terminal import print_table
from meme_llava.train.progress import CountingCollator
from meme_llava.train.run_plan import RunInputs, RunPlan
from meme_llava.train.session import choose_bf16
from meme_llava.train.settings import TrainArguments

MOMENTUM_BUFFER = "momentum_buffer"  # torch.optim.Muon's name for its only moment


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """AdamW with each group's rate and decay; Muon beside it where a group uses it."""
    if any(group.uses_muon for group in groups):
        return MuonWithAdamW(groups)
    options = [
        {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return torch.optim.AdamW(options, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that use it, AdamW for the others; one list of groups, one state."""

    def __init__(self, groups: Sequence[ParameterGroup]):
        self._parts: dict[bool, torch.optim.Optimizer] = {}  # by uses_muon
        settings = []
        for group in groups:
            own = {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
            if group.uses_muon not in self._parts:
                options = {} if group.uses_muon else {"fused": True}
                make = torch.optim.Muon if group.uses_muon else torch.optim.AdamW
                self._parts[group.uses_muon] = make([own], **options)
            settings.append({**self._parts[group.uses_muon].defaults, **own, "uses_muon": group.uses_muon})
        super().__init__(settings, {})

    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        assert closure is None
        for uses_muon, part in self._parts.items():
            # Schedules change our groups, and load_state_dict puts others in the place of groups and state.
            part.param_groups = [group for group in self.param_groups if group["uses_muon"] is uses_muon]
            part.state = self.state
            part.step()


GIB = 2**30
# Float32 numbers that a layer keeps for each position, at most, as multiples of its width and of its MLP's.
KEPT_WIDTHS, KEPT_MLP_WIDTHS = 40, 20
# Weights, gradients, two moments of Adam and temporaries, at most, as a multiple of the float32 weights.
STATE_COPIES = 6


@dataclass(frozen=True)
class Computation:
    """How steps are computed; it changes memory and time, and results by no more than rounding.

    Args:
        attention: name of the language model's attention, from `choose_attention`.
        recomputed: layers that compute their activations again in the backward pass.
        largest: positions of the longest device batch.
        memory: bytes of the step with that batch; None where it was not estimated, because it was not asked for, or
            because it cannot come near the machine's memory.
        usable: bytes that a step may take, where that was estimated.
    """

    attention: str
    recomputed: CheckpointedLayers
    largest: int
    memory: int | None = None
    usable: int = 0

    @property
    def attention_setting(self) -> str:
        """The attention by the name that --attention has for it."""
        return next(setting for setting, name in NAMES.items() if name == self.attention)

    def to_record(self) -> dict:
        """What the run record keeps."""
        estimate = {} if self.memory is None else {"estimated_step_bytes": self.memory}
        return {"attention": self.attention_setting, "recomputed_layers": asdict(self.recomputed), **estimate}

    def describe(self) -> str:
        """One line for a person, and a second one if the step may not fit."""
        layers = "no layer computed twice"
        if self.recomputed != CheckpointedLayers():
            layers = f"{self.recomputed.language} language and {self.recomputed.vision} vision layers computed twice"
        line = f"attention {self.attention_setting}; {layers}"
        if self.memory is None:
            return line
        line += f"; the largest batch, {self.largest:,} positions, takes about {self.memory / GIB:.1f} GiB"
        if self.memory > self.usable:
            line += (
                f"\nwarning: only {self.usable / GIB:.1f} GiB can be used, so the run may stop for lack of memory when "
                "it comes to that batch; --plan shows what would fit"
            )
        return line


def plan_computation(
    arguments: TrainArguments,
    image_policy: ImagePolicy,
    largest_batch: Mapping,
    device: torch.device,
    uses_bf16: bool,
    processes: int,
) -> Computation:
    """Choose what the settings leave open, before the model is loaded.

    Args:
        largest_batch: the device batch with the most positions of the run.

    Raises:
        UserError: the attention asked for cannot run here.
    """
    attention = choose_attention(arguments.attention, device, uses_bf16)
    config = LlavaConfig.from_pretrained(arguments.model, local_files_only=True)
    largest, memory = largest_batch["input_ids"].numel(), measure_memory(device, processes)
    setting, on_gpu = arguments.gradient_checkpointing, device.type == "cuda"
    if setting != "auto" or (not on_gpu and bound_memory(arguments, config, largest_batch) <= memory // 2):
        most = count_layers(config, vision_trainable=arguments.vision_tower_training != "frozen")
        return Computation(attention, most if setting == "full" else CheckpointedLayers(), largest)
    from meme_llava.train.planning.memory import ShardingPlan, StepEstimator, find_usable

    engine = ShardingPlan.of_run(arguments, processes, on_gpu)
    estimator = StepEstimator(config, image_policy, arguments, engine, largest_batch)
    recomputed = estimator.choose_recomputed(setting, memory)
    return Computation(attention, recomputed, largest, estimator.estimate(recomputed).total, find_usable(memory))


def measure_memory(device: torch.device, processes: int) -> int:
    """Bytes that a process can have on this machine at most; the processes of a CPU run share its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // processes


def bound_memory(arguments: TrainArguments, config: LlavaConfig, batch: Mapping) -> int:
    """More bytes than a step in float32 can take, counted roughly. Saves small runs the seconds of an exact count."""
    text, vision = config.text_config, config.vision_config
    positions = batch["input_ids"].numel()
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    stored = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
    kept = positions * text.num_hidden_layers * _count_kept(text)
    kept += len(batch["pixel_values"]) * patches * vision.num_hidden_layers * _count_kept(vision)
    # Every segment's mask over its path, in every layer.
    masks = batch["max_seqlen_q"] * len(batch["kv_index"]) * text.num_hidden_layers
    logits = 4 * len(batch["loss_positions"]) * text.vocab_size
    return 2 * STATE_COPIES * stored + 4 * (kept + logits) + masks


def _count_kept(config) -> int:
    return KEPT_WIDTHS * config.hidden_size + KEPT_MLP_WIDTHS * config.intermediate_size


MAX_LISTED_CUTS = 20


@dataclass(frozen=True)
class PreparedRun:
    """A planned run with all that computes its steps.

    Args:
        groups: what trains and how fast.
        order: the records in the order of training.
    """

    plan: RunPlan
    inputs: RunInputs
    model: nn.Module
    groups: list[ParameterGroup]
    order: TrainingOrder
    collator: PackingCollator
    computation: Computation
    step_shape: StepShape

    def to_record(self, step: int) -> dict:
        """The run record at an optimizer step."""
        return make_run_record(self.plan, step, self.groups, self.computation)

    def write_sidecars(self, folder: Path, step: int) -> None:
        """Put processor and run record beside the trained weights of an optimizer step."""
        write_sidecars(folder, self.inputs.processing, self.to_record(step))


def prepare_run(plan: RunPlan, inputs: RunInputs, heartbeat: Heartbeat) -> PreparedRun:
    """Load the model as it is at the start point, with what is trainable, and print what the run is."""
    arguments, processing, data = plan.arguments, inputs.processing, inputs.data
    collator, order = make_collator(arguments, processing), make_order(plan, data)
    device = choose_device(plan.engine)
    step_shape = describe_step(plan)
    if plan.engine.kind == DEEPSPEED:
        make_deepspeed_plugin(plan.engine, step_shape)  # raises where the file leaves something open
    largest_batch = collator(order.fetch_largest_batch())
    computation = plan_computation(
        arguments, processing.image_policy, largest_batch, device, step_shape.uses_bf16, plan.processes
    )
    heartbeat.beat()
    model = prepare_model(plan, processing, computation, step_shape.uses_bf16)
    groups = plan_parameter_groups(model, arguments)
    run = PreparedRun(plan, inputs, model, groups, order, collator, computation, step_shape)
    if is_main_process():
        print_run(run)
        print_left_out(arguments.output_dir, data)
    return run


def describe_step(plan: RunPlan) -> StepShape:
    """What the engine must know of a step."""
    arguments = plan.arguments
    config = LlavaConfig.from_pretrained(arguments.model, local_files_only=True)
    return StepShape(
        arguments.device_batch_size,
        plan.accumulation,
        arguments.max_grad_norm,
        choose_bf16(arguments),
        arguments.precision == "tf32",
        config.text_config.hidden_size,
    )


def make_collator(arguments: TrainArguments, processing: Processing) -> PackingCollator:
    """What makes the run's batches."""
    return PackingCollator(
        processing.encoder.image_token_id,
        processing.tokens_per_image,
        processing.image_policy.size,
        arguments.loss_average,
        arguments.shared_images,
    )


def make_order(plan: RunPlan, data: LoadedData) -> TrainingOrder:
    """The records in the order of training."""
    arguments = plan.arguments
    return TrainingOrder(
        data.dataset,
        plan.steps,
        BatchShape(arguments.global_batch_size, arguments.device_batch_size, plan.processes),
        arguments.seed,
        arguments.shared_images,
        plan.start.step,
        plan.start.records,
    )


def prepare_model(plan: RunPlan, processing: Processing, computation: Computation, uses_bf16: bool) -> nn.Module:
    """The base with what is trainable, as it is at the start point, and how its layers compute."""
    arguments = plan.arguments
    # bf16, half the memory, where training computes in it; what is trainable becomes float32.
    dtype = torch.bfloat16 if uses_bf16 else torch.float32
    model = load_packed_llava(arguments.model, dtype, processing.image_policy, computation.attention)
    model = prepare_trainable(model, arguments, arguments.seed)
    if plan.start.checkpoint is not None:
        load_trained_weights(model, plan.start.checkpoint)
    elif arguments.projector_from is not None:
        load_projector(model, arguments.projector_from)
    recompute_layers(model, computation.recomputed)
    if arguments.torch_compile:
        compile_layers(model)
    return model


def make_run_record(plan: RunPlan, step: int, groups: list[ParameterGroup], computation: Computation | None) -> dict:
    """The run record at an optimizer step."""
    return {
        **plan.to_record(step),
        "parameter_groups": [group.describe() for group in groups],
        "computation": None if computation is None else computation.to_record(),
    }


def write_sidecars(folder: Path, processing: Processing, record: Mapping) -> None:
    """Put processor and run record beside trained weights."""
    with quiet_transformers():
        processing.processor.save_pretrained(folder)
    write_json(folder / RUN_RECORD, record)


def print_run(run: PreparedRun) -> None:
    """Print settings, data, schedule and parameter groups."""
    plan, arguments = run.plan, run.plan.arguments
    unused = set(arguments.list_unused())
    settings = [
        (name, f"{value}" + ("   (not used by this run)" if name in unused else ""))
        for name, value in to_plain(arguments).items()
    ]
    print_table("Settings", ("setting", "value"), settings)
    listed_apart = ("cut_records", "findings")
    rows = [(name, str(value)) for name, value in plan.data.items() if name not in listed_apart]
    print_table("Data", ("", "value"), rows)
    cut_records = plan.data["cut_records"]
    for cut in cut_records[:MAX_LISTED_CUTS]:
        print(f"cut to model_max_length: {cut}")
    if cut_records:
        print(f"{len(cut_records)} answers are cut to model_max_length; run_record.json lists all of them")
    groups = [
        (g["role"], g["kind"], g["tensors"], g["parameters"], f"{g['learning_rate']:g}", f"{g['weight_decay']:g}")
        for g in (group.describe() for group in run.groups)
    ]
    columns = ("role", "kind", "tensors", "parameters", "peak rate", "decay")
    print_table("What learns", columns, groups)
    print(
        f"{plan.steps} steps of {arguments.global_batch_size} records ({arguments.device_batch_size} a device x "
        f"{plan.processes} process(es) x {plan.accumulation} accumulated), {plan.warmup_steps} of them warmup; engine "
        f"{plan.engine.name}"
    )
    print(run.computation.describe(), flush=True)


def print_left_out(output_dir: Path, data: LoadedData) -> None:
    """Print what was found about the records, and write down which of them do not train."""
    print_findings(data.checked)
    if path := write_quarantine(output_dir, data.checked):
        print(f"{len(data.checked.bad)} bad records are left out; they are listed in {path}")


PREFETCHED_BATCHES = 4  # device batches that each worker process holds ready
WORKERS_PER_GPU = 2


def make_loader(run: PreparedRun, device: torch.device) -> DataLoader:
    """This process's device batches that are to come; the processes take them in turn."""
    plan = run.plan
    size, processes = plan.arguments.device_batch_size, plan.processes
    first = plan.start.step * plan.accumulation * processes
    numbers = range(first + find_rank(), len(run.order) // size, processes)
    workers = plan.arguments.dataloader_workers
    if workers is None:
        # On a CPU the step itself keeps all cores busy; workers beside it were measured to cost 5 %.
        workers = WORKERS_PER_GPU if device.type == "cuda" else 0
    return DataLoader(
        run.order,
        batch_sampler=[range(number * size, (number + 1) * size) for number in numbers],
        collate_fn=CountingCollator(run.collator),
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=device.type == "cuda",
        # A scheduler's SIGTERM reaches every process of a job; the workers must live until the state is saved.
        worker_init_fn=leave_signals_to_parent,
    )
