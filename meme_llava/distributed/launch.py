"""The launcher: it starts a run's processes on this machine, one a GPU, and watches them; a dead or stuck one ends them
all.

python -m meme_llava.distributed.launch --processes 8 train.py …
python -m meme_llava.distributed.launch --processes 8 --nodes 2 --node_rank 1 --master_addr 10.0.0.1 train.py …

Sets the environment that torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …). A signal to this
process is handed on, so that the run saves its state and ends with exit code 75.
"""

import argparse
import contextlib
import ctypes
import os
import selectors
import signal
import sys
import time

from meme_llava.distributed.cluster import Cluster, join_cluster
from meme_llava.distributed.supervised_process import SupervisedProcess
from meme_llava.errors import EXIT_MEANINGS, PEER_FAILED, ProcessError, Stopped, UserError, stop_on_user_error

PR_SET_PDEATHSIG = 1
# Once a process has failed, the others have so long to end by themselves; each may have something to say.
GRACE_SECONDS = 3
# Where they were asked to stop, because one of them did, or where it must turn out which machine was lost.
LONG_GRACE_SECONDS = 30
REPEATED_SIGNAL_SECONDS = 2
POLL_SECONDS = 0.2
INTERRUPTED = 130  # as a shell answers for a program that Ctrl-C ended
RESTART = "The newest checkpoint is kept; start the same command again."
DUMP_SECONDS = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{self.prog}: {message}")


def parse_launch_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The launcher's own flags come before the script; everything after it belongs to the script."""
    parser = _Parser(
        prog="python -m meme_llava.distributed.launch",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, one a GPU")
    parser.add_argument("--nodes", type=int, default=1, help="machines of the run")
    parser.add_argument("--node_rank", type=int, default=0, help="number of this machine, counted from 0")
    parser.add_argument("--master_addr", default="127.0.0.1", help="address of machine 0")
    parser.add_argument("--master_port", type=int, default=0, help="port on machine 0; 0 = a free one, on one machine")
    parser.add_argument("--start_timeout", type=float, default=600, help="seconds to wait for the other machines")
    parser.add_argument("--die_with_parent", action="store_true", help="end at once when the starting shell is killed")
    parser.add_argument("script", help="a Python script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    if arguments.processes < 1 or arguments.nodes < 1:
        raise UserError("--processes and --nodes must be at least 1")
    if not 0 <= arguments.node_rank < arguments.nodes:
        raise UserError(f"--node_rank is {arguments.node_rank}, expected 0 to {arguments.nodes - 1}, below --nodes")
    if not 0 <= arguments.master_port < 65536:
        raise UserError(f"--master_port is {arguments.master_port}, expected 0 to 65535")
    if arguments.nodes > 1 and arguments.master_port == 0:
        raise UserError("--master_port is needed with several machines; they must agree on it")
    return arguments


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_launch_arguments(argv)
    if arguments.die_with_parent:
        die_with_parent(os.getppid())
    with join_cluster(
        arguments.nodes,
        arguments.node_rank,
        arguments.processes,
        arguments.master_addr,
        arguments.master_port,
        arguments.start_timeout,
    ) as cluster:
        command = [sys.executable, arguments.script, *arguments.script_arguments]
        supervisor = Supervisor(command, cluster, arguments.processes)
        supervisor.start()
        supervisor.watch()


class Supervisor:
    """The processes of this machine, from their start until none is left.

    Args:
        command: what each of them runs.
        cluster: the other machines.
        count: processes on this machine.
    """

    def __init__(self, command: list[str], cluster: Cluster, count: int):
        self._command = command
        self._cluster = cluster
        self._count = count
        self._processes: list[SupervisedProcess] = []
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._asked_at: float | None = None
        self._deadline: float | None = None

    def start(self) -> None:
        """Start all processes; signals to this one are handed on from now on."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP, and so do we then.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        parent = os.getpid()
        for local_rank in range(self._count):
            process = SupervisedProcess(
                rank=self._cluster.node * self._count + local_rank,
                command=self._command,
                environment={**choose_allocator(), **os.environ, **self._cluster.make_environment(local_rank)},
                prepare=lambda: die_with_parent(parent),
                # On a terminal its progress bar needs the terminal itself.
                shares_terminal=local_rank == 0 and sys.stderr.isatty(),
            )
            process.register(self._selector)
            self._processes.append(process)

    def watch(self) -> None:
        """Return when every process ended well.

        Raises:
            UserError: one of them, or of another machine's, did not; of the class whose exit code fits best.
        """
        failure: UserError | None = None
        try:
            while failure is None and not self._is_over():
                self._poll()
                failure = self._find_failure()
        finally:
            self._end_all(failure)
        failure = failure or self._explain_exits()
        self._cluster.report_end(failure)
        if failure is not None:
            raise failure

    def _poll(self) -> None:
        for key, _ in self._selector.select(POLL_SECONDS):
            key.data()
        for process in self._processes:
            process.poll()
        self._cluster.progress = {process.rank: process.progress for process in self._processes}
        while self._signals:
            self._hand_on(self._signals.pop(0))

    def _hand_on(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._asked_at is not None:
            # A scheduler's signal comes by several ways.
            if time.monotonic() - self._asked_at < REPEATED_SIGNAL_SECONDS:
                return
            print(f"{name} again: ending at once, nothing more is saved", file=sys.stderr, flush=True)
            self._deadline = time.monotonic()
            return
        self._asked_at = time.monotonic()
        print(f"{name}: the run saves its state and stops; once more ends it at once", file=sys.stderr, flush=True)
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send(number)

    def _find_failure(self) -> UserError | None:
        """What ends the run now, if anything does."""
        machine_failure = self._cluster.find_failure()
        if machine_failure is not None:
            return machine_failure
        if self._deadline is None:
            self._set_deadline()
        elif time.monotonic() >= self._deadline:
            at_once = _with_code(
                Stopped, "ended at once by a second signal; the newest checkpoint is kept", INTERRUPTED
            )
            return self._explain_exits() or at_once
        return self._find_stuck()

    def _set_deadline(self) -> None:
        """Once a process ended badly, say how long the others have."""
        codes = {process.exit_code for process in self._list_failed()}
        if self._cluster.stopped_elsewhere():
            codes.add(Stopped.exit_code)
        if not codes:
            return
        asked = codes == {Stopped.exit_code}
        if asked:
            # One that stopped before training began waits for nobody; the others are to stop, too.
            self._send(signal.SIGTERM)
        self._deadline = time.monotonic() + (LONG_GRACE_SECONDS if asked or self._lost_machine() else GRACE_SECONDS)

    def _list_failed(self) -> list[SupervisedProcess]:
        return [process for process in self._processes if process.exit_code not in (None, 0)]

    def _lost_machine(self) -> bool:
        """Whether nothing failed here but for want of a process on another machine; its silence will tell which."""
        return self._cluster.nodes > 1 and {process.exit_code for process in self._list_failed()} == {PEER_FAILED}

    def _is_over(self) -> bool:
        if any(process.runs for process in self._processes):
            return False
        return not self._lost_machine() or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _find_stuck(self) -> UserError | None:
        limits = [process.hang_timeout for process in self._processes if process.hang_timeout is not None]
        if not limits or any(time.monotonic() - process.last_sign < max(limits) for process in self._processes):
            return None
        progress = self._cluster.read_all_progress()
        least = min(progress.values())
        stuck = sorted(rank for rank, mark in progress.items() if mark == least)
        # The others of its step wait for a process that is halted, whatever their marks.
        stuck = [process.rank for process in self._processes if process.is_halted()] or stuck
        states = [process.describe_state() for process in self._processes if process.rank in stuck]
        for process in self._processes:
            self._print_stacks(process)
        where = f" ({'; '.join(states)})" if states else ""
        noun = "process" if len(stuck) == 1 else "processes"
        return ProcessError(
            f"no sign of progress for {max(limits):g} s (--hang_timeout). Furthest behind: {noun} "
            f"{', '.join(map(str, stuck))}{where}; all processes were ended. {RESTART}"
        )

    def _print_stacks(self, process: SupervisedProcess) -> None:
        """Have a process say where each of its threads is; one that is halted cannot answer."""
        print(f"process {process.rank} is here:", file=sys.stderr, flush=True)
        process.send(signal.SIGUSR1)
        end = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < end:
            self._poll()

    def _explain_exits(self) -> UserError | None:
        """The error of the process whose end says most about what went wrong."""
        failed = self._list_failed()
        if not failed:
            return None
        known = [process for process in failed if process.exit_code in EXIT_MEANINGS]
        killed = [process for process in failed if process.exit_code < 0]
        own_fault = [process for process in failed if process.exit_code != PEER_FAILED]
        if not own_fault and any(process.runs for process in self._processes):
            return self._explain_silence([process for process in self._processes if process.runs])
        first = min(known or killed or own_fault or failed, key=lambda process: process.ended_at)
        if first.exit_code == Stopped.exit_code:
            return _with_code(Stopped, "", Stopped.exit_code)
        whole_run = self._count * self._cluster.nodes > 1
        if first.exit_code in EXIT_MEANINGS:
            meaning = f"process {first.rank} stopped: {EXIT_MEANINGS[first.exit_code]}; see its message above"
            return _with_code(UserError, meaning if whole_run else "", first.exit_code)
        ended = f"; all processes were ended. {RESTART}"
        unexpected = first.exit_code > 0 and first.exit_code != PEER_FAILED
        text = f"{first.describe_end()}{ended}{first.quote_last_words()}"
        return _with_code(ProcessError, text, first.exit_code if unexpected else ProcessError.exit_code)

    def _explain_silence(self, silent: list[SupervisedProcess]) -> UserError:
        """The error of processes that kept the others waiting until those gave up."""
        states = "; ".join(process.describe_state() for process in silent)
        return ProcessError(f"the others timed out: {states}. {RESTART}")

    def _end_all(self, failure: UserError | None) -> None:
        if failure is not None:
            # They may be in the middle of a message.
            with contextlib.suppress(OSError):
                self._poll()
        for process in self._processes:
            process.kill_group()
        for process in self._processes:
            process.close(self._selector)


def choose_allocator() -> dict[str, str]:
    """Settings of torch's GPU memory for what this process starts; none where the user has some.

    Every packed row has another length. Segments that can grow leave no gaps between blocks of all those lengths.
    """
    given = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    return {} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _with_code(kind: type[UserError], text: str, code: int) -> UserError:
    error = kind(text)
    error.exit_code = code
    return error


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends; see prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this line
            os._exit(1)


if __name__ == "__main__":
    main()
