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
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from meme_llava import count_cores
from meme_llava.distributed.environment import REPEATED_SIGNAL_SECONDS
from meme_llava.errors import EXIT_MEANINGS, PEER_FAILED, ProcessError, Stopped, UserError, stop_on_user_error

SAVE_SECONDS = 24 * 3600  # whoever does not want to wait for a save sends a second signal
POLL_SECONDS = 0.2
LONGEST_START, LINGER_SECONDS = 1e6, 10
LAST_LINES = 12
TERM_SECONDS = 20  # torch's launcher kills what has not heeded SIGTERM for thirty seconds
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
    if not 0 < arguments.start_timeout <= LONGEST_START:
        parser.error(f"--start_timeout is {arguments.start_timeout:g}, expected above 0 and at most {LONGEST_START:g}")
    try:
        arguments.master_addr.encode("idna")
    except UnicodeError:
        parser.error(f"--master_addr is {arguments.master_addr!r}, expected a host's name or address")
    return arguments


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_launch_arguments(argv)
    nodes, node, processes = arguments.nnodes, arguments.node_rank, arguments.nproc_per_node
    with meet(nodes, node, processes, arguments.master_addr, arguments.master_port, arguments.start_timeout) as port:
        environments = make_environments(nodes, node, processes, arguments.master_addr, port)
        run_processes([arguments.script, *arguments.script_arguments], environments)


@contextlib.contextmanager
def meet(nodes: int, node: int, processes: int, address: str, port: int, timeout: float) -> Iterator[int]:
    """Wait for the other nodes, and let node 0 leave last. Yields the port.

    On one node nothing listens on another interface than the address's, which torch by itself does not heed.

    Raises:
        ProcessError: other nodes cannot reach the address, it is not node 0's, the port is taken, a node does not
            come, or starts another number of processes.
    """
    place, listener = f"MASTER_ADDR={address}, MASTER_PORT={port}", None
    if nodes > 1:
        with contextlib.suppress(OSError):  # no such host
            if ipaddress.ip_address(socket.gethostbyname(address)).is_loopback:
                raise ProcessError(
                    f"MASTER_ADDR={address} is what every node calls itself; give the address by which the other nodes "
                    "reach node 0"
                )
    if node == 0:
        listener = _listen(address, port, place)
        port = listener.getsockname()[1]
    from torch.distributed import TCPStore  # torch takes seconds to load; what cannot work is said before

    if nodes > 1:
        print(f"node {node} waits for the other {nodes - 1}, at most {timeout:g} s", flush=True)
    try:
        if node > 0:
            _await_listener(address, port, timeout)
        with _end_on_ctrl_c():
            store = TCPStore(
                address,
                port,
                world_size=nodes,
                is_master=node == 0,
                timeout=timedelta(seconds=timeout),
                master_listen_fd=listener.detach() if listener else None,
            )
            store.set(f"processes/{node}", str(processes))
            counts = [int(store.get(f"processes/{other}")) for other in range(nodes)]
    except (RuntimeError, OSError) as error:
        why = f" ({error.strerror or error})" if isinstance(error, OSError) else ""
        raise ProcessError(
            f"{place}: not all {nodes} nodes met within {timeout:g} s{why}. Start run.sh on each of them with the same "
            "NNODES, MASTER_ADDR and MASTER_PORT and its own NODE_RANK, and let the port through node 0's firewall."
        ) from error
    if len(set(counts)) > 1:
        raise ProcessError(f"the nodes start {counts} processes, by NODE_RANK; give GPUS the same number on each")
    yield port
    with contextlib.suppress(RuntimeError):  # node 0 may be gone already, which the others need no more
        store.set(f"left/{node}", "")
        if node == 0:
            store.wait([f"left/{other}" for other in range(nodes)], timedelta(seconds=LINGER_SECONDS))


def _await_listener(address: str, port: int, timeout: float) -> None:
    """Wait until node 0 listens; torch would write its errors meanwhile, a page each. Raises OSError after a time."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=LINGER_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _end_on_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end this process where torch waits, in which Python hears no signal."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(address: str, port: int, place: str) -> socket.socket:
    try:
        family, *_, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(found[:2], family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror.partition(" (while")[0]
        raise ProcessError(
            f"{place}: {reason}; node 0 needs an address of its own and a port that is free (on one node leave "
            "both out)"
        ) from error


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
    except SignalException as error:
        asked = error
        print(f"{asked.sigval.name}: the run saves its state and stops; once more ends it at once", file=sys.stderr)
    ignore_signals(REPEATED_SIGNAL_SECONDS)
    try:
        context.close(choose_stop(asked.sigval), timeout=SAVE_SECONDS)
        return context.wait(0)
    except SignalException as again:
        print(f"{again.sigval.name} again: ending at once, nothing more is saved", file=sys.stderr)
        raise UserError("ended at once by a second signal; the newest checkpoint is kept", INTERRUPTED) from again


def choose_stop(number: int) -> signal.Signals:
    """The signal by which a process hears of another one: Ctrl-C is that, everything else a request to end."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def ignore_signals(seconds: float) -> None:
    """Pass over signals that come so soon."""
    end = time.monotonic() + seconds
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, lambda *given, handler=handler: time.monotonic() < end or handler(*given))


def describe_end(name: str, code: int) -> str:
    """How a process ended whose exit code is not its own choice."""
    if code >= 0:
        return f"{name} ended with exit code {code}"
    why = " (the kernel does that when memory runs out; dmesg would say so)" if code == -signal.SIGKILL else ""
    return f"{name} was killed by {signal.Signals(-code).name}{why}"


def explain_failures(result, ranks: Sequence[int]) -> UserError:
    """The error of the process whose end says most about what went wrong.

    Args:
        result: a RunProcsResult of torch.distributed.elastic, with failures and files of standard errors by local rank.
        ranks: the processes' numbers in the whole run.
    """
    since = min(failure.timestamp for failure in result.failures.values())
    local, failure = min(result.failures.items(), key=lambda item: _rate(item[1], since))
    code, name = failure.exitcode, f"process {ranks[local]}"
    if code == Stopped.exit_code:
        return UserError("", code)
    if code in EXIT_MEANINGS:
        return UserError(f"{name} stopped: {EXIT_MEANINGS[code]}; see its message above", code)
    words = Path(result.stderrs[local]).read_text(errors="replace").splitlines() if result.stderrs[local] else []
    end = f"{name} lost a process on another node" if code == PEER_FAILED else describe_end(name, code)
    if any(line.startswith("Timeout (") for line in words):  # as faulthandler writes
        end = f"{name} made no progress for --hang_timeout seconds"
    last = [f"    {line}" for line in words if line.strip()][-LAST_LINES:]
    text = f"{end}; all processes were ended. The newest checkpoint is kept; start the same command again."
    code = code if code > 0 and code != PEER_FAILED else ProcessError.exit_code
    return UserError("\n".join([text, *([f"Last words of {name}:", *last] if last else [])]), code)


def _rate(failure, since: int) -> tuple[int, int]:
    """How little a process's end says about what went wrong; among equals, when it was noticed."""
    code = failure.exitcode
    was_asked = code in (-signal.SIGTERM, -signal.SIGINT) or (
        code == -signal.SIGKILL and failure.timestamp - since > TERM_SECONDS
    )
    kinds = [
        code in EXIT_MEANINGS and code != Stopped.exit_code,
        code < 0 and not was_asked,
        code > 0 and code not in (Stopped.exit_code, PEER_FAILED),
        code == Stopped.exit_code,
        code == PEER_FAILED,
        True,
    ]
    return kinds.index(True), failure.timestamp


if __name__ == "__main__":
    main()
