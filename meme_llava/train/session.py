"""This process's part in a run: what its device must have, the other processes, whether all of them can go on after a
step, what to say when memory runs out.
"""

import contextlib
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from meme_llava.distributed.environment import (
    DDP,
    SINGLE,
    Engine,
    Heartbeat,
    choose_engine,
    count_processes,
    is_main_process,
)
from meme_llava.distributed.meeting import start_process_group
from meme_llava.distributed.processes import (
    StopRequest,
    any_process,
    gather,
    handle_stop_signals,
    leave_process_group,
    take_own_gpu,
)
from meme_llava.errors import NonFiniteError, OutOfMemoryError, UserError, count, first_line
from meme_llava.model.four_bit import check_four_bit
from meme_llava.model.packed_attention import choose_attention, gpu_multiplies_bf16, multiplies_bf16
from meme_llava.train.settings import TrainArguments

PREFETCHED_BATCHES = 4  # device batches that each worker process holds ready
WORKERS_PER_GPU = 2
SHARED_MEMORY = Path("/dev/shm")  # where workers put them
MAX_SKIPPED_IN_A_ROW = 3
MAX_LISTED_RECORDS = 8
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_WORKER_SIGN = "is killed by signal: Killed"


def choose_bf16(arguments: TrainArguments) -> bool:
    """Whether steps compute in bf16 here. Raises UserError for a precision that this machine does not have."""
    precision, has_gpu = arguments.precision, torch.cuda.is_available()
    if precision == "bf16" and not has_gpu and not multiplies_bf16():
        raise UserError(
            "--precision bf16 needs a GPU here: on a CPU without AMX or AVX512_BF16 it is several times slower than "
            "fp32"
        )
    if precision != "fp32" and has_gpu and not gpu_multiplies_bf16():
        raise UserError("this GPU has no bf16; pass --precision fp32 (fp16 overflows with Qwen2)")
    return precision == "bf16" or (precision == "auto" and has_gpu)


def check_device(arguments: TrainArguments) -> None:
    """Raise UserError if this machine lacks what the settings ask of it; neither a model nor transformers is loaded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and torch.cuda.device_count():  # else a run would go on on the CPU
        raise UserError(
            f"this machine has {count(torch.cuda.device_count(), 'GPU')}, but torch {torch.__version__}, made for CUDA "
            f"{torch.version.cuda}, cannot use them; most often the driver is older than that (nvidia-smi shows it). "
            "Install a newer driver, or a torch for an older CUDA; with CUDA_VISIBLE_DEVICES= (run.sh: GPUS=cpu) the "
            "CPU is used."
        )
    choose_attention(arguments.attention, device, choose_bf16(arguments))
    if arguments.torch_compile:
        check_compiler(device)
    if arguments.load_in_4bit:
        check_four_bit(device)


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless layers can be compiled for this device."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--torch_compile needs the package triton; install it, or leave the flag out")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(
            f"--torch_compile needs a C++ compiler, and there is no {compiler}; install it, or leave the flag out"
        )


def count_workers(arguments: TrainArguments, device: torch.device) -> int:
    """Processes that decode images for this one."""
    if arguments.dataloader_workers is not None:
        return arguments.dataloader_workers
    # On a CPU the step itself keeps all cores busy; workers beside it were measured to cost 5 %.
    return WORKERS_PER_GPU if device.type == "cuda" else 0


def check_shared_memory(largest_batch: Mapping, workers: int) -> None:
    """Raise UserError unless the batches that workers of this node's processes hold ready find room in /dev/shm; a
    worker that finds none is killed by SIGBUS in the middle of a run."""
    batch = sum(value.nbytes for value in largest_batch.values() if isinstance(value, torch.Tensor))
    needed = batch * workers * PREFETCHED_BATCHES * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if workers and SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"{SHARED_MEMORY}: has {free / 1e6:,.0f} MB free, and the batches that data workers hold ready there "
            f"take up to {needed / 1e6:,.0f} MB. Start the container with --ipc=host or a larger "
            "--shm-size, or pass --dataloader_workers 0."
        )


def derive_accumulation(arguments: TrainArguments, processes: int) -> int:
    """Device batches per optimizer step. Raises UserError when the global batch does not divide."""
    per_round = arguments.device_batch_size * processes
    if arguments.global_batch_size % per_round:
        raise UserError(
            f"--global_batch_size {arguments.global_batch_size} is not a multiple of --device_batch_size "
            f"{arguments.device_batch_size} x {count(processes, 'process', 'processes')} = {per_round}"
        )
    return arguments.global_batch_size // per_round


@dataclass(frozen=True)
class Session:
    """What the processes of a run share: the engine that holds the model, a sign of life, a request to stop."""

    engine: Engine
    processes: int
    heartbeat: Heartbeat
    request: StopRequest


@contextlib.contextmanager
def join_processes(arguments: TrainArguments) -> Iterator[Session]:
    """Meet the other processes of the run, and part from them at its end. Raises UserError where this device, or this
    number of processes, is not what the settings ask for, or a process has no GPU of its own."""
    processes = count_processes()
    take_own_gpu()
    engine = choose_engine(arguments.engine, processes, torch.cuda.is_available())
    derive_accumulation(arguments, processes)  # raises where the batches do not divide
    check_device(arguments)
    if torch.cuda.device_count() > 1 and processes == 1:
        raise UserError(
            f"one process sees {torch.cuda.device_count()} GPUs; start one process a GPU, as run.sh does, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    heartbeat = Heartbeat(arguments.hang_timeout)
    with handle_stop_signals() as request, heartbeat:
        start_process_group(engine, heartbeat.patience)
        yield Session(engine, processes, heartbeat, request)
        leave_process_group()


class StepGuard:
    """Whether losses and gradients of the running step are finite in all processes, and whether one is asked to stop.

    If they are not finite, no process may apply the update; `mark_loss` makes one process's loss reach all of them,
    through their gradients.
    """

    def __init__(self, request: StopRequest):
        self._request = request
        self._skipped_in_a_row = 0
        self.stopped_by: str | None = None

    def begin(self, record_ids: list[list[str]]) -> None:
        """Forget the last step; the next one is made of these records, by device batch of this process."""
        self._record_ids, self._finite, self.gradients_are_finite = record_ids, [], True

    def mark_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, or one that gives no finite gradient. No device waits for this."""
        finite = torch.isfinite(loss.detach())
        self._finite.append(finite)
        return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)

    def after_step(self, step: int) -> None:
        """Say that a step was skipped, if it was. Raises NonFiniteError after too many in a row."""
        if self.gradients_are_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        pairs = [(ids, bool(finite)) for ids, finite in zip(self._record_ids, self._finite, strict=True)]
        batches = [pair for of_process in gather(pairs) for pair in of_process]
        suspects = [ids for ids, finite in batches if not finite]
        what = "the loss of these records" if suspects else "the gradient of these records"
        ids = list(dict.fromkeys(itertools.chain(*(suspects or [ids for ids, _ in batches]))))
        more = f" and {len(ids) - MAX_LISTED_RECORDS} more" if len(ids) > MAX_LISTED_RECORDS else ""
        text = f"{what} is not finite: {', '.join(map(repr, ids[:MAX_LISTED_RECORDS]))}{more}"
        if is_main_process():
            print(f"step {step} is skipped, no weight changed: {text}", flush=True)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {step}, were not finite. At last {text}. No such "
                "step changed a weight, and the newest checkpoint is sound. Look at these records, or lower --low_lr "
                "(LOW_LR) and --high_lr (HIGH_LR)."
            )

    def ask_to_stop(self) -> bool:
        """Whether a signal asks any process to stop; all processes call it together."""
        if self.stopped_by is None and any_process(self._request.name is not None):
            self.stopped_by = next(name for name in gather(self._request.name) if name is not None)
        return self.stopped_by is not None


def watch_first_gradients(names: Iterable[str], model: nn.Module) -> Callable[[], None]:
    """What to call after the first backward pass, before the update; it raises UserError if a tensor of these names, in
    `model` as its engine holds it, got no gradient."""
    missing = set(names)
    # DeepSpeed takes gradients away at once, and hooks see nothing of those that FSDP shards.
    handles = [
        parameter.register_hook(lambda gradient, name=name: missing.discard(name))
        for name, parameter in model.named_parameters()
        if name in missing
    ]

    def check() -> None:
        for handle in handles:
            handle.remove()
        lacking = missing - {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        if lacking:
            raise UserError(
                f"after the first step {len(lacking)} tensors that should learn have no gradient, e.g. "
                f"{', '.join(sorted(lacking)[:3])}"
            )

    return check


@contextlib.contextmanager
def explain_out_of_memory(arguments: TrainArguments, session: Session) -> Iterator[None]:
    """Turn a lack of memory inside the block into an OutOfMemoryError that says what would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if _WORKER_SIGN in str(error):
            raise OutOfMemoryError(
                "the kernel killed a process that reads images, for lack of main memory. Lower --dataloader_workers "
                "(0 reads them in the training process), then start the same command again."
            ) from error
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in _SIGNS):
            raise
        ways = "\n".join(f"  {n}. {way}" for n, way in enumerate(list_ways_out(arguments, session), 1))
        raise OutOfMemoryError(
            f"a step does not fit into memory ({first_line(error)[:200]}). What helps, in this order; all of it keeps "
            f"the global batch of {arguments.global_batch_size} records:\n{ways}\n"
            "Then start the same command again; the newest checkpoint is kept. --plan counts what a step takes"
        ) from error


def list_ways_out(arguments: TrainArguments, session: Session) -> list[str]:
    """Changes that take less memory, the cheapest first."""
    size, engine, is_divided = arguments.device_batch_size, session.engine, session.processes > 1
    smaller = max((n for n in range(1, size) if size % n == 0), default=0)
    ways = []
    if smaller:
        ways.append(f"--device_batch_size {smaller} (DEVICE_BATCH={smaller} in run.sh): more rounds, same step")
    if arguments.gradient_checkpointing != "full":
        ways.append("--gradient_checkpointing full: layers are computed twice, half more work with LoRA, else a third")
    if is_divided and engine.kind in (SINGLE, DDP):
        ways.append("ENGINE=zero2: gradients and optimizer state divided among the processes")
    if is_divided and not engine.shards_weights:
        ways.append("ENGINE=zero3: the weights divided, too")
    # On a CPU all of it is in main memory.
    if torch.cuda.is_available() and "offload" not in engine.name:
        offloaded = "zero3_offload" if engine.shards_weights else "zero2_offload"
        ways.append(f"ENGINE={offloaded}: optimizer state in main memory, slower updates")
    return [*ways, f"MODEL_MAX_LENGTH below {arguments.model_max_length}: longer answers are cut, and listed"]
