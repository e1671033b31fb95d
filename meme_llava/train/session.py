"""What the processes of a run share: the engine that holds the model, a sign of life, a request to stop."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from meme_llava.distributed.engines import Engine, check_muon_runs, choose_engine
from meme_llava.distributed.environment import Heartbeat, count_processes
from meme_llava.distributed.processes import StopRequest, handle_stop_signals, leave_process_group, start_process_group
from meme_llava.train.device import check_device, check_no_gpu_idles
from meme_llava.train.schedule import derive_accumulation
from meme_llava.train.settings import TrainArguments


@dataclass(frozen=True)
class Session:
    """This process's part in a run.

    Args:
        request: whether a signal asked this process to stop.
    """

    engine: Engine
    processes: int
    heartbeat: Heartbeat
    request: StopRequest


@contextlib.contextmanager
def join_processes(arguments: TrainArguments) -> Iterator[Session]:
    """Meet the other processes of the run, and part from them at its end.

    Raises:
        UserError: this device, or this number of processes, is not what the settings ask for.
    """
    processes = count_processes()
    engine = choose_engine(arguments.engine, processes, torch.cuda.is_available())
    check_muon_runs(engine, arguments.muon_lr)
    derive_accumulation(arguments, processes)  # raises where the batches do not divide
    check_device(arguments)
    check_no_gpu_idles()
    heartbeat = Heartbeat(arguments.hang_timeout)
    with handle_stop_signals() as request, heartbeat:
        start_process_group(heartbeat.patience, engine.needs_process_group)
        yield Session(engine, processes, heartbeat, request)
        leave_process_group()
