"""Our settings as the Trainer's: steps, precision, engine. Nothing about models."""

import math

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from meme_llava.distributed.engine_setup import allow_fsdp_on_cpu, prepare_environment
from meme_llava.distributed.engines import DEEPSPEED, FSDP, Engine
from meme_llava.distributed.environment import count_processes
from meme_llava.errors import ProcessError, UserError
from meme_llava.train.device import choose_bf16
from meme_llava.train.settings import TrainArguments

WORKERS_PER_GPU = 2
PREFETCHED_BATCHES = 4  # device batches that each worker process holds ready


def derive_accumulation(arguments: TrainArguments, processes: int) -> int:
    """Device batches per optimizer step. Raises UserError when the global batch does not divide."""
    per_round = arguments.device_batch_size * processes
    if arguments.global_batch_size % per_round:
        raise UserError(
            f"--global_batch_size {arguments.global_batch_size} is not a multiple of --device_batch_size "
            f"{arguments.device_batch_size} x {processes} process(es) = {per_round}"
        )
    return arguments.global_batch_size // per_round


def count_steps(arguments: TrainArguments, records: int, first_step: int = 0, first_record: int = 0) -> tuple[int, int]:
    """Optimizer steps and warmup steps of the run. Raises UserError when --warmup_steps fill the run.

    Args:
        first_step: steps that a checkpoint has done.
        first_record: records that those steps trained on, in batches that may have been of another size.
    """
    left = records * arguments.num_train_epochs - first_record
    steps = arguments.max_steps or first_step + max(0, math.ceil(left / arguments.global_batch_size))
    if arguments.warmup_steps is None:
        return steps, min(math.ceil(steps * arguments.warmup_ratio), steps - 1)
    if arguments.warmup_steps >= steps:
        raise UserError(f"warmup takes {arguments.warmup_steps} of {steps} steps; lower --warmup_steps or train longer")
    return steps, arguments.warmup_steps


def make_training_arguments(
    arguments: TrainArguments, engine: Engine, steps: int, warmup: int, accumulation: int
) -> TrainingArguments:
    """Our settings as the Trainer's."""
    use_cpu = not torch.cuda.is_available()
    prepare_environment(engine, on_gpu=not use_cpu)
    uses_bf16 = choose_bf16(arguments)
    workers = arguments.dataloader_workers
    if workers is None:
        # On a CPU the step itself keeps all cores busy; workers beside it were measured to cost 5 %.
        workers = 0 if use_cpu else WORKERS_PER_GPU
    training_arguments = TrainingArguments(
        output_dir=str(arguments.output_dir),
        per_device_train_batch_size=arguments.device_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        warmup_steps=warmup,
        lr_scheduler_type=arguments.lr_scheduler_type,
        learning_rate=arguments.low_lr,  # the groups carry their own; DeepSpeed's "auto" wants one
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        logging_steps=arguments.logging_steps,
        save_steps=arguments.save_steps,
        seed=arguments.seed,
        bf16=uses_bf16,
        tf32=None if use_cpu else arguments.precision == "tf32",
        # Without it several CPU processes would each train alone, into the same directory.
        use_cpu=use_cpu,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=PREFETCHED_BATCHES if workers else None,
        dataloader_pin_memory=not use_cpu,
        report_to=arguments.report_to,
        run_name=arguments.run_name,
        deepspeed=str(engine.path) if engine.kind == DEEPSPEED else None,
        fsdp=True if engine.kind == FSDP else None,
        fsdp_config=dict(engine.config) if engine.kind == FSDP else None,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        # TrainingOrder holds the order; the same records meet in a step however many processes share it.
        train_sampling_strategy="sequential",
        # The filter would hide a NaN loss as 0.
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
    )
    if training_arguments.n_gpu > 1:
        # torch would split every batch over all of them behind our back, and the global batch would be another one.
        raise UserError(
            f"one process sees {training_arguments.n_gpu} GPUs; start one process a GPU, as run.sh does, or choose one "
            "with CUDA_VISIBLE_DEVICES=0"
        )
    if training_arguments.world_size != count_processes():
        raise ProcessError(
            f"the launcher started {count_processes()} processes but training sees {training_arguments.world_size}"
        )
    if engine.kind == FSDP:
        if uses_bf16:
            # accelerate's own choice would round the loss and its weights to bf16. Gradients are summed in bf16, as by
            # ZeRO; in float32 FSDP stumbles over the vision layer that is not computed.
            training_arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, cast_forward_inputs=False
            )
        if use_cpu:
            allow_fsdp_on_cpu()
    return training_arguments
