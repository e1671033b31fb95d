"""One process of a run: what launchers tell it in its environment, its sign of life, and its end. Without torch.

Our launcher, torchrun, `accelerate launch` and `deepspeed` set what torch reads: RANK, WORLD_SIZE, MASTER_ADDR, ….
"""

import atexit
import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import NoReturn

from meme_llava.errors import PEER_FAILED

PR_SET_PDEATHSIG = 1
# A scheduler's signal comes by several ways at once; one that comes later is another.
REPEATED_SIGNAL_SECONDS = 2
# Settings of `accelerate launch`, which accelerate would follow in place of ours.
FOREIGN_PREFIXES = ("ACCELERATE_", "FSDP_")
# Before the first step a file of many gigabytes may be read in one go.
START_PATIENCE = 6
STANDARD_ERROR = 2
PEER_SECONDS = 2  # the process that failed is to be gone, and known by its own exit code, before the others
_SIGNS_OF_LOSS = ("/gloo/transport/", "NCCL communicator was aborted", "remote process exited", "Watchdog caught")


def count_processes() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_rank() -> int:
    """The number of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process prints and writes for all."""
    return find_rank() == 0


def settle_environment(variables: MutableMapping[str, str] = os.environ) -> None:
    """Prepare the environment for a process that trains, whoever started it."""
    read_slurm(variables)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & variables.keys():
        # Every packed row has another length. Segments that can grow leave no gaps between blocks of all those lengths.
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    foreign = sorted(name for name in variables if name.startswith(FOREIGN_PREFIXES))
    for name in foreign:
        del variables[name]
    if foreign and is_main_process():
        print(f"ignored: {', '.join(foreign)}; --engine and --precision count", flush=True)
    if "RANK" in variables:
        die_with_parent()
        choose_interface(variables)


def read_slurm(variables: MutableMapping[str, str]) -> None:
    """Take the process's numbers from srun where it started several and no other launcher said any."""
    # In a batch script, which srun did not start, SLURM_PROCID is there, too, but no step.
    if "RANK" in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    # Such as node[03-05,09], host-a,host-b.
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", variables["SLURM_STEP_NODELIST"])
    port = 20000 + (int(variables["SLURM_JOB_ID"]) * 100 + int(variables.get("SLURM_STEP_ID", "0"))) % 20000
    variables |= {
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        # Such as 4(x2),3: tasks on each node.
        "LOCAL_WORLD_SIZE": re.match(r"\d+", variables["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": variables.get("MASTER_ADDR", "".join(filter(None, first.groups()))),
        "MASTER_PORT": variables.get("MASTER_PORT", str(port)),
    }


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends; see prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this line
            os._exit(1)


def choose_interface(variables: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL talk where the other processes are: on one node nothing listens to the network.

    Left to themselves, they may take an interface by which other nodes do not reach this one.
    """
    import psutil  # a bare Python, with which run.sh checks its settings, has none

    is_alone = variables["WORLD_SIZE"] == variables.get("LOCAL_WORLD_SIZE")
    other = "127.0.0.1" if is_alone else variables["MASTER_ADDR"]
    family, *_, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # which tells this node's own address towards the other; nothing is sent
        address = probe.getsockname()[0]
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                variables.setdefault(name, interface)
            return


class Heartbeat:
    """Ends this process when too much time passes without a beat; every thread's stack is printed then.

    The processes of a run wait for each other, so one that is stuck ends them all. It watches inside a `with` block.

    Args:
        hang_timeout: seconds; before training begins, six times as many.
    """

    def __init__(self, hang_timeout: float):
        self._hang_timeout = hang_timeout
        self.patience = START_PATIENCE * hang_timeout
        self.trains = False

    def __enter__(self) -> "Heartbeat":
        self.beat()
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that something was reached."""
        seconds = self._hang_timeout if self.trains else self.patience
        faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end this process with its exit code.

    Where several processes trained, torch's communication threads can abort one whose interpreter is taken down, after
    all its work was done; so what Python has to see to at exit is seen to, and the rest left out.
    """
    settle_environment()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 1
        if _is_peer_failure(error):
            # The launcher knows which; a traceback of this one would only hide what that one said.
            print(f"[process {find_rank()}] lost another process", file=sys.stderr, flush=True)
            time.sleep(PEER_SECONDS)
            code = PEER_FAILED
        else:
            traceback.print_exc()
    if count_processes() == 1:
        sys.exit(code)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _is_peer_failure(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the run is gone or does not answer."""
    # Torch's own error for it cannot have been raised where torch was never loaded.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)
