"""What an engine's libraries need around loading and training a model."""

import contextlib
import os
import warnings
from collections.abc import Iterator

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from meme_llava.distributed.engines import DDP, DEEPSPEED, FSDP, SINGLE, Engine
from meme_llava.errors import ProcessError


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


@contextlib.contextmanager
def load_whole(training_arguments: TrainingArguments) -> Iterator[None]:
    """Let a model be loaded whole, as ours are, and divided by ZeRO-3 later; transformers would divide it at once."""
    config = getattr(training_arguments, "hf_deepspeed_config", None)
    if config is not None:
        unset_hf_deepspeed_config()
    yield
    if config is not None:
        set_hf_deepspeed_config(config)


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
