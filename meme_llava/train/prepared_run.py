"""A run that is ready to train: the model with what is trainable, its parameter groups, the order of the records."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig

from meme_llava.cli import to_plain
from meme_llava.dataset.checked_data import print_findings
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.dataset import LoadedData, TrainingOrder
from meme_llava.dataset.quarantine import write_quarantine
from meme_llava.dataset.sampling import BatchShape
from meme_llava.distributed.engines import DEEPSPEED
from meme_llava.distributed.environment import Heartbeat, is_main_process
from meme_llava.distributed.processes import StepShape, choose_device, fill_config
from meme_llava.model.llava import Processing, quiet_transformers
from meme_llava.model.packed_llava import compile_layers, load_packed_llava
from meme_llava.model.trainable import (
    ParameterGroup,
    load_projector,
    load_trained_weights,
    plan_parameter_groups,
    prepare_trainable,
    recompute_layers,
)
from meme_llava.storage.folders import write_json
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.terminal import print_table
from meme_llava.train.computation import Computation, plan_computation
from meme_llava.train.device import choose_bf16
from meme_llava.train.inputs import RunInputs
from meme_llava.train.run_plan import RunPlan
from meme_llava.train.settings import TrainArguments

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
        fill_config(plan.engine, step_shape)  # raises where the file leaves something open
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
