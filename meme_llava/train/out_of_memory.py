"""What to say when a step does not fit into memory: what to lower, in which order, keeping the global batch."""

import contextlib
from collections.abc import Iterator

import torch

from meme_llava.distributed.engines import DDP, SINGLE, Engine
from meme_llava.errors import OutOfMemoryError
from meme_llava.train.run_plan import RunPlan
from meme_llava.train.settings import TrainArguments

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_WORKER_SIGN = "is killed by signal: Killed"


@contextlib.contextmanager
def explain_out_of_memory(plan: RunPlan) -> Iterator[None]:
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
        first_line = (str(error).strip().splitlines() or ["MemoryError"])[0]
        advice = "\n".join(
            f"  {number}. {way}"
            for number, way in enumerate(list_ways_out(plan.arguments, plan.engine, plan.processes), 1)
        )
        raise OutOfMemoryError(
            f"a step does not fit into memory ({first_line[:200]}). What helps, in this order; all of it keeps the "
            f"global batch of {plan.arguments.global_batch_size} records:\n{advice}\n"
            "Then start the same command again; the newest checkpoint is kept. --plan counts what a step takes"
        ) from error


def list_ways_out(arguments: TrainArguments, engine: Engine, processes: int) -> list[str]:
    """Changes that take less memory, the cheapest first."""
    ways = []
    size = arguments.device_batch_size
    smaller = [n for n in range(1, size) if size % n == 0]
    if smaller:
        ways.append(f"--device_batch_size {smaller[-1]} (DEVICE_BATCH={smaller[-1]} in run.sh): more rounds, same step")
    if arguments.gradient_checkpointing != "full":
        ways.append("--gradient_checkpointing full: layers are computed twice, a third more work")
    if processes > 1 and engine.kind in (SINGLE, DDP):
        ways.append("ENGINE=zero2: gradients and optimizer state divided among the GPUs")
    if processes > 1 and engine.zero_stage in (None, 1, 2) and engine.name != "fsdp2":
        ways.append("ENGINE=zero3: the weights divided, too")
    if "offload" not in engine.name:
        offloaded = "zero3_offload" if engine.zero_stage == 3 else "zero2_offload"
        ways.append(f"ENGINE={offloaded}: optimizer state in main memory, slower updates")
    ways.append(f"MODEL_MAX_LENGTH below {arguments.model_max_length}: longer answers are cut, and listed")
    return ways
