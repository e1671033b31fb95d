"""The launcher: a run's processes on this node, one a GPU. The first that fails ends them all.

    python -m meme_llava.distributed.launch --nproc_per_node 8 train.py …
    python -m meme_llava.distributed.launch --nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 \
        --master_port 29500 train.py …

torchrun takes the same flags, and train.py trains the same under it. But its exit code is 1 whatever the script's is, a
wrong setting ends in its traceback, and its store listens to the whole network. So this starts the processes as
torchrun does, and ends as they do. A signal is handed on: the run saves its state, exit code 75.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time

from meme_llava import count_cores
from meme_llava.distributed.environment import REPEATED_SIGNAL_SECONDS
from meme_llava.distributed.script_exit import explain_failures, with_code
from meme_llava.errors import UserError, stop_on_user_error

SAVE_SECONDS = 24 * 3600  # whoever does not want to wait for a save sends a second signal
POLL_SECONDS = 0.2
INTERRUPTED = 130  # as a shell answers for a program that Ctrl-C ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{self.prog}: {message}")


def parse_launch_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The launcher's own flags come before the script; everything after it belongs to the script."""
    parser = _Parser(
        "python -m meme_llava.distributed.launch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes on this node, one a GPU")
    parser.add_argument("--nnodes", type=int, default=1, help="nodes of the run")
    parser.add_argument("--node_rank", type=int, default=0, help="number of this node, counted from 0")
    parser.add_argument("--master_addr", default="127.0.0.1", help="address of node 0")
    parser.add_argument("--master_port", type=int, default=0, help="port on node 0; 0: a free one, on one node")
    parser.add_argument("--start_timeout", type=float, default=600, help="seconds to wait for the other nodes")
    parser.add_argument("script", help="a Python script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    if arguments.nproc_per_node < 1 or arguments.nnodes < 1:
        parser.error("--nproc_per_node and --nnodes must be at least 1")
    if not 0 <= arguments.node_rank < arguments.nnodes:
        parser.error(f"--node_rank is {arguments.node_rank}, expected 0 to {arguments.nnodes - 1}, below --nnodes")
    least = 0 if arguments.nnodes == 1 else 1
    if not least <= arguments.master_port < 65536:
        parser.error(f"--master_port is {arguments.master_port}, expected {least} to 65535")
    return arguments


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_launch_arguments(argv)
    # Torch takes seconds to load; what is wrong with the flags is said before.
    from meme_llava.distributed.meeting import check_address, meet

    if arguments.nnodes > 1:
        check_address(arguments.master_addr)
    nodes, node, processes = arguments.nnodes, arguments.node_rank, arguments.nproc_per_node
    with meet(nodes, node, processes, arguments.master_addr, arguments.master_port, arguments.start_timeout) as port:
        environments = make_environments(nodes, node, processes, arguments.master_addr, port)
        run_processes([arguments.script, *arguments.script_arguments], environments)


def make_environments(nodes: int, node: int, processes: int, address: str, port: int) -> dict[int, dict[str, str]]:
    """What torch.distributed reads in each process of this node, by local rank."""
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        # torch's own word for: the store is there already, in the launcher.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": nodes * processes,
        "LOCAL_WORLD_SIZE": processes,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, count_cores() // processes)),
    }
    return {
        local: {name: str(value) for name, value in shared.items()}
        | {"RANK": str(node * processes + local), "LOCAL_RANK": str(local)}
        for local in range(processes)
    }


def run_processes(arguments: list[str], environments: dict[int, dict[str, str]]) -> None:
    """Run `python ARGUMENTS…` in each of the environments, given by local rank, until all have ended.

    Raises:
        UserError: one of them failed; with the exit code, rank and last words of the one that says most about why.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # What is ignored stays so: SIGHUP under nohup, SIGINT in the background of a shell.
    heard = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heard)
    with tempfile.TemporaryDirectory() as folder:
        # Last words are read from a file. On a terminal the progress bar of process 0 needs the terminal itself.
        tee = {local: Std.NONE if local == 0 and sys.stderr.isatty() else Std.ERR for local in environments}
        context = start_processes(
            name="train",
            entrypoint=sys.executable,
            args=dict.fromkeys(environments, tuple(arguments)),
            envs=environments,
            logs_specs=DefaultLogsSpecs(folder, tee=tee),
            log_line_prefixes=dict.fromkeys(environments, ""),
        )
        try:
            result = wait_for_end(context)
        finally:
            for pid in context.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # also what it started
            context.close()
        if result.is_failed():
            raise explain_failures(result, [int(environments[local]["RANK"]) for local in environments])


def wait_for_end(context):
    """Wait until all processes ended well, or one did not and the others were ended. A signal is handed on."""
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        return context.wait(period=POLL_SECONDS)
    except SignalException as asked:
        print(f"{asked.sigval.name}: the run saves its state and stops; once more ends it at once", file=sys.stderr)
    ignore_signals(REPEATED_SIGNAL_SECONDS)
    try:
        context.close(signal.SIGTERM, timeout=SAVE_SECONDS)
        return context.wait(0)
    except SignalException as again:
        print(f"{again.sigval.name} again: ending at once, nothing more is saved", file=sys.stderr)
        raise with_code("ended at once by a second signal; the newest checkpoint is kept", INTERRUPTED) from again


def ignore_signals(seconds: float) -> None:
    """Pass over signals that come so soon."""
    end = time.monotonic() + seconds
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, lambda *given, handler=handler: time.monotonic() < end or handler(*given))


if __name__ == "__main__":
    main()
