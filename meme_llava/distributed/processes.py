"""Processes of a run acting together: how they meet, agree, hear of a signal, and share a model by an engine of
accelerate.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from meme_llava.distributed.environment import (
    DDP,
    DEEPSPEED,
    ENGINE_ADVICE,
    FSDP,
    REPEATED_SIGNAL_SECONDS,
    SINGLE,
    STANDARD_ERROR,
    Engine,
    count_processes,
    find_local_rank,
    is_main_process,
)
from meme_llava.errors import ProcessError, Stopped, UserError

Value = TypeVar("Value")


def take_own_gpu() -> None:
    """Make this process's GPU the current one, before anything is asked of it: a question about the current GPU takes
    memory there, and that is the first one for every process. Raises ProcessError where there is none for this one."""
    if not torch.cuda.is_available():
        return
    local_rank = find_local_rank()
    if local_rank >= torch.cuda.device_count():
        raise ProcessError(
            f"the launcher started process {local_rank} on a machine with {torch.cuda.device_count()} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); lower GPUS, and "
            "give Slurm no --gpus-per-task"
        )
    torch.cuda.set_device(local_rank)


def leave_process_group() -> None:
    """Wait for all processes and part. Leaving without it can abort one at exit, and the launcher then ends the
    others."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, in each of them."""
    if not distributed.is_initialized():
        return [value]
    found: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def broadcast_from_main(make_value: Callable[[], Value]) -> Value:
    """What the main process makes, in every process. An exception that it raises is raised in all of them."""
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = make_value()
        except Exception as error:
            if isinstance(error, UserError):
                error.is_common = True
            outcome[1] = error
    if distributed.is_initialized():
        distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def any_process(value: bool) -> bool:
    """Whether it is true in any process."""
    if not distributed.is_initialized():
        return value
    flag = torch.tensor([int(value)], dtype=torch.int32)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


class StopRequest:
    """Whether a signal asked this process to stop: `name`. Unless it `is_deferred`, that stops the run at once."""

    def __init__(self):
        self.name: str | None = None
        self.is_deferred = False
        self._heard_at = 0.0

    def __call__(self, number: int, frame) -> None:
        if self.name is not None:
            # A scheduler's signal comes by several ways; only a second Ctrl-C says that there is no time to save.
            if number == signal.SIGINT and time.monotonic() - self._heard_at > REPEATED_SIGNAL_SECONDS:
                raise KeyboardInterrupt
            return
        self.name, self._heard_at = signal.Signals(number).name, time.monotonic()
        if not self.is_deferred:
            raise Stopped(f"by {self.name} before the first step; there was nothing to save")


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request; SIGUSR1 prints what every thread is doing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    faulthandler.register(signal.SIGUSR1, file=STANDARD_ERROR)
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent(worker: int) -> None:
    """Let the process that trains answer SIGINT and SIGTERM that reach both it and a data worker: a `worker_init_fn`.

    The SIGTERM by which it ends the worker still counts; were it ignored, too, the parent would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where a signal cannot be asked who sent it, SIGTERM stays as it is
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """Wait for a SIGTERM from the parent process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def choose_device(engine: Engine) -> torch.device:
    """The device of this process, which accelerate takes from here on.

    Before anything else asks accelerate: on a CPU a tracker would find one process where there are several, and an
    Accelerator that is told of the CPU itself takes no DeepSpeed.
    """
    # torch's word to DeepSpeed about a name of its own; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # DeepSpeed, which other libraries import where it is installed, would find the same, with a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if engine.kind == DEEPSPEED:
            import deepspeed.ops

            # A helper for inference that it would compile when communication starts; it takes minutes and a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return PartialState(cpu=not on_gpu).device


def make_accelerator(
    engine: Engine, accumulation: int, uses_bf16: bool, deepspeed_plugin: DeepSpeedPlugin | None
) -> Accelerator:
    """What prepares model and optimizer for the engine. Made after the model: transformers would load one in pieces
    for ZeRO-3, and ours are loaded whole.

    Args:
        accumulation: device batches of this process in an optimizer step.
        deepspeed_plugin: from `make_deepspeed_plugin`, where that is the engine.

    Raises:
        ProcessError: the libraries see another number of processes than the launcher started.
        UserError: FSDP does not know an option of the engine's file.
    """
    on_gpu, plugins = torch.cuda.is_available(), {}
    if on_gpu:
        # Float32 is computed as float32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if engine.kind == DEEPSPEED:
        plugins["deepspeed_plugin"] = deepspeed_plugin
    if engine.kind == FSDP:
        options = {name: value for name, value in engine.config.items() if name != "version"}
        if uses_bf16:
            # accelerate's own choice would round the loss and its weights to bf16. Gradients are summed in bf16, as by
            # ZeRO; in float32 FSDP stumbles over the vision layer that is not computed.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
            options["mixed_precision_policy"] = policy
        try:
            plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=engine.config["version"], auto_wrap_policy="transformer_based_wrap", **options
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{engine.path}: {error}. {ENGINE_ADVICE}") from error
        if not on_gpu:
            # accelerate knows FSDP on GPUs only and would train copies on CPUs.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        mixed_precision="bf16" if uses_bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation, sync_with_dataloader=False),
        # The buffers of these models never change. accelerate does not know torch's newer word for it.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        **plugins,
    )
    if accelerator.num_processes != count_processes():
        raise ProcessError(
            f"the launcher started {count_processes()} processes but training sees {accelerator.num_processes}"
        )
    return accelerator


def make_deepspeed_plugin(
    engine: Engine, device_batch_size: int, accumulation: int, max_grad_norm: float, uses_bf16: bool, width: int
) -> DeepSpeedPlugin:
    """accelerate's settings of DeepSpeed, with the run's own values in the places of "auto".

    Args:
        accumulation: device batches of this process in an optimizer step.
        width: the language model's hidden size, by which buffers are measured.

    Raises:
        UserError: nothing here says what another "auto" is, or DeepSpeed does not know an option of ZeRO.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    plugin = DeepSpeedPlugin(
        hf_ds_config=engine.config,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=max_grad_norm,
        zero3_init_flag=False,
    )
    values = {
        "train_micro_batch_size_per_gpu": device_batch_size,
        "train_batch_size": device_batch_size * accumulation * count_processes(),
        "bf16.enabled": uses_bf16,
        # The sizes that transformers takes for them.
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }
    try:
        plugin.deepspeed_config_process(must_match=False, **values)
        DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"])
    except ValidationError as error:
        wrong = error.errors()[0]
        option = ".".join(map(str, ("zero_optimization", *wrong["loc"])))
        raise UserError(f"{engine.path}: {option}: {wrong['msg']}. {ENGINE_ADVICE}") from error
    except ValueError as error:
        raise UserError(f"{engine.path}: {error}") from error
    return plugin


def divide_weights(model: torch.nn.Module, plugin: DeepSpeedPlugin, dtype: torch.dtype) -> None:
    """Divide a model among the processes as ZeRO-3 holds it, tensor by tensor, in `dtype`. DeepSpeed would do it, too,
    but only after it has put the whole model on every device."""
    import deepspeed

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.init_distributed()  # else it would divide among one process
    deepspeed.zero.Init(module=model, config_dict_or_path=plugin.deepspeed_config, dtype=dtype)


def check_engine_runs(engine: Engine, wrapped_model: object) -> None:
    """Raise ProcessError unless the engine that was asked for holds the model; libraries fall back without a word."""
    kinds = {DistributedDataParallel: DDP, FSDPModule: FSDP}
    holder = type(wrapped_model).__name__
    found = next((kind for cls, kind in kinds.items() if isinstance(wrapped_model, cls)), SINGLE)
    if (DEEPSPEED if holder == "DeepSpeedEngine" else found) != engine.kind:
        raise ProcessError(
            f"the engine {engine.name} was asked for, but {holder} holds the model; start with run.sh, which starts "
            "the processes as it needs them"
        )
