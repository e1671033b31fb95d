"""Processes of a run acting together: how they meet, agree, and hear of a signal.

Nothing about what they compute.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from meme_llava.distributed.environment import (
    REPEATED_SIGNAL_SECONDS,
    count_processes,
    find_local_rank,
    is_main_process,
)
from meme_llava.errors import ProcessError, Stopped, UserError

# torch's own limit for waiting is the second line of defence, behind the heartbeat's.
COLLECTIVE_MARGIN_SECONDS = 60
Value = TypeVar("Value")


def start_process_group(patience: float, needs_group: bool) -> None:
    """Meet the other processes of the run.

    Args:
        patience: the longest time that a process may take between two beats of its heart, in seconds.
        needs_group: an engine that asks for a process group even where there is one process.

    Raises:
        ProcessError: a process has no GPU of its own.
    """
    if distributed.is_initialized() or (count_processes() == 1 and not needs_group):
        return
    on_gpu = torch.cuda.is_available()
    local_rank = find_local_rank()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ProcessError(
                f"the launcher started process {local_rank} on a machine with {torch.cuda.device_count()} GPUs "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); lower GPUS, and "
                "give Slurm no --gpus-per-task"
            )
        torch.cuda.set_device(local_rank)
    # What the processes tell each other about the run is not business of the GPU's.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=patience + COLLECTIVE_MARGIN_SECONDS)
    if "RANK" in os.environ:
        distributed.init_process_group(backend, timeout=timeout)
        return
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=timeout)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def leave_process_group() -> None:
    """Wait for all processes and part. Leaving without it can abort one at exit, and the launcher then ends the
    others."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, in each of them."""
    if not distributed.is_initialized():
        return [value]
    found: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def broadcast_from_main(make_value: Callable[[], Value]) -> Value:
    """What the main process makes, in every process. An exception that it raises is raised in all of them."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = make_value()
        except Exception as error:
            if isinstance(error, UserError):
                error.is_common = True
            outcome[1] = error
    if distributed.is_initialized():
        distributed.broadcast_object_list(outcome, src=0)
    value, error = outcome
    if error is not None:
        raise error
    return value


def any_process(value: bool) -> bool:
    """Whether it is true in any process."""
    if not distributed.is_initialized():
        return value
    flag = torch.tensor([int(value)], dtype=torch.int32)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


class StopRequest:
    """Whether a signal asked this process to stop: `name`. Unless it `defers`, a signal stops the run at once."""

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
    with contextlib.suppress(AttributeError, ValueError):  # standard error may be no file
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent() -> None:
    """Let the process that started this one answer SIGINT and SIGTERM that reach both.

    The SIGTERM by which it ends this one still counts; were it ignored, too, the parent would wait for ever.
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


@dataclass(frozen=True)
class WorkerStart:
    """What a data worker does first; it can be sent to a process that is spawned."""

    then: Callable[[int], None] | None = None

    def __call__(self, number: int) -> None:
        """Leave signals to the process that trains, then do what the loader wanted."""
        leave_signals_to_parent()
        if self.then is not None:
            self.then(number)
