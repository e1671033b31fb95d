"""How the processes of a run meet, whoever started them."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed

from meme_llava.distributed.environment import DDP, SINGLE, Engine, count_processes, find_rank
from meme_llava.errors import ProcessError, first_line

# torch's own limit for waiting is the second line of defence, behind the heartbeat's.
COLLECTIVE_MARGIN_SECONDS = 60
# Until all processes have come, whoever started them; until that is spoken of; between two looks.
MEETING_SECONDS, QUIET_SECONDS, POLL_SECONDS = 600, 5, 0.2


def start_process_group(engine: Engine, patience: float) -> None:
    """Meet the other processes of the run. DeepSpeed and FSDP ask for a process group even where there is one process.

    Args:
        patience: the longest time that a process may take between two beats of its heart, in seconds.

    Raises:
        ProcessError: the others do not come.
    """
    if distributed.is_initialized() or (count_processes() == 1 and engine.kind in (SINGLE, DDP)):
        return
    # What the processes tell each other about the run is not business of the GPU's.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=patience + COLLECTIVE_MARGIN_SECONDS)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher keeps the store
        distributed.init_process_group(backend, timeout=timeout)
        return
    if "RANK" in os.environ:
        store = meet_processes(min(MEETING_SECONDS, patience / 2))
        store.set_timeout(timeout)
        own = {"rank": find_rank(), "world_size": count_processes()}
        distributed.init_process_group(backend, store=store, timeout=timeout, **own)
        return
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=timeout)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def meet_processes(patience: float) -> distributed.Store:
    """The store of process 0, once all processes have come to it. Torch itself would wait without a word, and where
    Python hears no signal.

    Raises:
        ProcessError: some have not come after `patience` seconds, the port is taken, or what the processes were told
            does not agree.
    """
    rank, processes = find_rank(), count_processes()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place, start, is_told = f"MASTER_ADDR={address}, MASTER_PORT={port}", time.monotonic(), False

    def wait_until(has_come: Callable[[], bool]) -> None:
        nonlocal is_told
        while not has_come():
            seconds = time.monotonic() - start
            if seconds > patience:
                raise ProcessError(
                    f"{place}: not all {processes} processes met within {patience:g} s. Start all of them at the same "
                    "time, and let the port through; if nothing has started several, unset RANK and WORLD_SIZE (or "
                    "SLURM_STEP_NUM_TASKS)"
                )
            if seconds > QUIET_SECONDS and not is_told:
                is_told = True
                print(f"process {rank} waits for the others of {processes} at {place}", flush=True)
            time.sleep(POLL_SECONDS)

    def can_connect() -> bool:
        try:
            socket.create_connection((address, port), timeout=QUIET_SECONDS).close()
            return True
        except OSError:
            return False

    if rank > 0:
        wait_until(can_connect)
    try:
        options = {"is_master": rank == 0, "wait_for_workers": False, "timeout": timedelta(seconds=patience)}
        store = distributed.TCPStore(address, port, processes, **options)
    except RuntimeError as error:
        raise ProcessError(f"{place}: {first_line(error)}; process 0 needs a port that is free") from error
    if (there := store.compare_set("processes", "", str(processes)).decode()) != str(processes):
        raise ProcessError(f"{place}: WORLD_SIZE is {processes} here and {there} in another process; give all the same")
    if store.add(f"process {rank}", 1) > 1:
        raise ProcessError(
            f"{place}: two processes came with RANK={rank}; give each another, from 0 to {processes - 1}"
        )
    store.add("come", 1)
    wait_until(lambda: store.add("come", 0) == processes)
    return store
