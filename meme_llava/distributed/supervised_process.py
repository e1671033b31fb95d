"""One process of a run seen from the outside: whether it lives, how far it is, and its last words."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meme_llava.distributed.heartbeat import PROGRESS_DESCRIPTOR, parse_progress

LAST_LINES = 12
PIPE_BYTES = 65536


class SupervisedProcess:
    """A started process, its progress marks and its standard error.

    Args:
        rank: its number in the whole run.
        prepare: called in the process before the command starts.
        shares_terminal: leave its standard error alone; its last words are on the screen anyway.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        prepare: Callable[[], None],
        shares_terminal: bool,
    ):
        self.rank = rank
        self.exit_code: int | None = None
        self.ended_at = 0.0
        self.progress = 0
        self.last_sign = time.monotonic()
        self.hang_timeout: float | None = None
        self._activity = "starting"
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._rest = b""
        self._marks = b""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._progress_pipe = read_end
        self._process = subprocess.Popen(
            command,
            env={**environment, PROGRESS_DESCRIPTOR: str(write_end)},
            pass_fds=[write_end],
            stdin=subprocess.DEVNULL,
            stderr=None if shares_terminal else subprocess.PIPE,
            # A terminal's Ctrl-C would reach it besides us; and what it starts is killed with its group.
            start_new_session=True,
            preexec_fn=prepare,
        )
        os.close(write_end)
        if self._process.stderr is not None:
            os.set_blocking(self._process.stderr.fileno(), False)

    @property
    def runs(self) -> bool:
        return self.exit_code is None

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have the selector call what reads this process's pipes."""
        selector.register(self._progress_pipe, selectors.EVENT_READ, lambda: self._read_marks(selector))
        if self._process.stderr is not None:
            selector.register(self._process.stderr, selectors.EVENT_READ, lambda: self._read_errors(selector))

    def poll(self) -> None:
        """Notice whether it ended."""
        if self.runs and self._process.poll() is not None:
            self.exit_code = self._process.returncode
            self.ended_at = time.monotonic()

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.runs:
            self._process.send_signal(number)

    def kill_group(self) -> None:
        """End it and everything it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.poll()

    def close(self, selector: selectors.BaseSelector) -> None:
        """Pass on what is left in its pipes and close them."""
        self._read_marks(selector)
        if self._process.stderr is not None:
            self._read_errors(selector)
            self._process.stderr.close()
        os.close(self._progress_pipe)

    def describe_end(self) -> str:
        """How it ended, and what it was doing."""
        how = f"ended with exit code {self.exit_code}"
        if self.exit_code is not None and self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            how = f"was killed by {name}"
            if name == "SIGKILL":
                how += " (the kernel does that when memory runs out; dmesg would say so)"
        return f"process {self.rank} {how}; last seen {self._activity}"

    def describe_state(self) -> str:
        """What it is doing, and whether it is halted."""
        halted = ", halted by a signal" if self.is_halted() else ""
        return f"process {self.rank} last seen {self._activity}{halted}"

    def is_halted(self) -> bool:
        """Whether a signal such as SIGSTOP keeps it from going on."""
        try:
            # proc(5): the state stands behind the name, which may hold anything, in brackets.
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def quote_last_words(self) -> str:
        """The last lines of its standard error, as lines of their own; empty if it said nothing."""
        if not self._lines:
            return ""
        return f"\nLast words of process {self.rank}:\n" + "\n".join(f"    {line}" for line in self._lines)

    def _read_marks(self, selector: selectors.BaseSelector) -> None:
        self._marks += self._read(selector, self._progress_pipe)
        *lines, self._marks = self._marks.split(b"\n")
        for line in lines:
            self.progress, self.hang_timeout, self._activity = parse_progress(line)
            self.last_sign = time.monotonic()

    def _read_errors(self, selector: selectors.BaseSelector) -> None:
        data = self._read(selector, self._process.stderr.fileno())
        if not data:
            return
        with contextlib.suppress(OSError):  # nobody reads our own errors any more
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(line.decode(errors="replace").rstrip() for line in lines if line.strip())

    @staticmethod
    def _read(selector: selectors.BaseSelector, descriptor: int) -> bytes:
        """All that can be read now; a pipe that was closed leaves the selector."""
        data = b""
        while True:
            try:
                piece = os.read(descriptor, PIPE_BYTES)
            except BlockingIOError:
                return data
            except OSError:
                piece = b""
            if not piece:
                with contextlib.suppress(KeyError, ValueError):
                    selector.unregister(descriptor)
                return data
            data += piece
