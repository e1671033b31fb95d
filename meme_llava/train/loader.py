"""The loader of a run: which device batches a process computes, and the workers that read them ahead."""

import torch
from torch.utils.data import DataLoader

from meme_llava.distributed.environment import find_rank
from meme_llava.distributed.processes import WorkerStart
from meme_llava.train.prepared_run import PreparedRun
from meme_llava.train.throughput import CountingCollator

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
        worker_init_fn=WorkerStart(),
    )
