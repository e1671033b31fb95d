"""An engine as accelerate's, and what its libraries need around it."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from meme_llava.distributed.engines import DDP, DEEPSPEED, FSDP, SINGLE, Engine
from meme_llava.distributed.environment import count_processes
from meme_llava.errors import ProcessError, UserError


def prepare_environment(engine: Engine, on_gpu: bool) -> None:
    """Settle what an engine's library would find out for itself, or compile, when it starts."""
    # torch's word to DeepSpeed about a name of its own; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if on_gpu:
        return
    # DeepSpeed, which other libraries import where it is installed, would find the same, with a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if engine.kind == DEEPSPEED:
        import deepspeed.ops

        # A helper for inference that it would compile when communication starts; it takes minutes and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class StepShape:
    """What an engine must know of an optimizer step.

    Args:
        accumulation: device batches of this process in a step.
        hidden_size: of the language model, by which DeepSpeed's buffers are measured.
    """

    device_batch_size: int
    accumulation: int
    max_grad_norm: float
    uses_bf16: bool
    uses_tf32: bool
    hidden_size: int


def choose_device(engine: Engine) -> torch.device:
    """The device of this process, which accelerate takes from here on.

    Before anything else asks accelerate: on a CPU a tracker would find one process where there are several, and an
    Accelerator that is told of the CPU itself takes no DeepSpeed.
    """
    on_gpu = torch.cuda.is_available()
    prepare_environment(engine, on_gpu)
    return PartialState(cpu=not on_gpu).device


def make_accelerator(engine: Engine, shape: StepShape) -> Accelerator:
    """What prepares model and optimizer for the engine. Made after the model: transformers would load one in pieces
    for ZeRO-3, and ours are loaded whole.

    Raises:
        ProcessError: the libraries see another number of processes than the launcher started.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = shape.uses_tf32
    plugins = {}
    if engine.kind == DEEPSPEED:
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=fill_config(engine, shape), zero3_init_flag=False)
    if engine.kind == FSDP:
        plugins["fsdp_plugin"] = make_fsdp_plugin(engine, shape.uses_bf16)
        if not on_gpu:
            allow_fsdp_on_cpu()
    accelerator = Accelerator(
        mixed_precision="bf16" if shape.uses_bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(shape.accumulation, sync_with_dataloader=False),
        **plugins,
    )
    if accelerator.num_processes != count_processes():
        raise ProcessError(
            f"the launcher started {count_processes()} processes but training sees {accelerator.num_processes}"
        )
    return accelerator


def fill_config(engine: Engine, shape: StepShape) -> dict:
    """A DeepSpeed file with the run's own values in the places of "auto".

    Raises:
        UserError: nothing here says what another "auto" is.
    """
    width = shape.hidden_size
    values = {
        "train_micro_batch_size_per_gpu": shape.device_batch_size,
        "gradient_accumulation_steps": shape.accumulation,
        "train_batch_size": shape.device_batch_size * shape.accumulation * count_processes(),
        "gradient_clipping": shape.max_grad_norm,
        "bf16.enabled": shape.uses_bf16,
        # The sizes that transformers takes for them.
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }

    def fill(config: Mapping, prefix: str) -> dict:
        filled = {}
        for key, value in config.items():
            path = f"{prefix}{key}"
            if value == "auto" and path not in values:
                raise UserError(f'{engine.path}: {path} is "auto", which only {", ".join(values)} can be; give a value')
            nested = fill(value, f"{path}.") if isinstance(value, Mapping) else value
            filled[key] = values[path] if value == "auto" else nested
        return filled

    return fill(engine.config, "")


def make_fsdp_plugin(engine: Engine, uses_bf16: bool) -> FullyShardedDataParallelPlugin:
    """accelerate's settings of FSDP2."""
    options = {name: value for name, value in engine.config.items() if name != "version"}
    if uses_bf16:
        # accelerate's own choice would round the loss and its weights to bf16. Gradients are summed in bf16, as by
        # ZeRO; in float32 FSDP stumbles over the vision layer that is not computed.
        options["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=engine.config["version"], auto_wrap_policy="transformer_based_wrap", **options
    )


def allow_fsdp_on_cpu() -> None:
    """Let accelerate divide a model among CPU processes. It knows FSDP on GPUs only and would train copies instead."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def check_engine_runs(engine: Engine, wrapped_model: object) -> None:
    """Raise ProcessError unless the engine that was asked for holds the model; libraries fall back without a word."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    found = type(wrapped_model).__name__
    right = {
        SINGLE: not isinstance(wrapped_model, (DistributedDataParallel, FSDPModule)) and found != "DeepSpeedEngine",
        DDP: isinstance(wrapped_model, DistributedDataParallel),
        DEEPSPEED: found == "DeepSpeedEngine",
        FSDP: isinstance(wrapped_model, FSDPModule),
    }
    if not right[engine.kind]:
        raise ProcessError(
            f"the engine {engine.name} was asked for, but {found} holds the model; start with run.sh, which starts the "
            "processes as it needs them"
        )
