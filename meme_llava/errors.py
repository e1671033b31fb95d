"""Errors that a user can act on: one clear message, an exit code for each kind, no traceback."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A wrong setting, file or record. The message names the thing, what was found and what to do next."""

    exit_code = 2
    # Whether all processes of a run raise it together; the main process then speaks for all.
    is_common = False

    def __init__(self, message: str, exit_code: int | None = None):
        # A DataLoader worker's error arrives with the worker's whole traceback in front of the message.
        super().__init__(message.rpartition(f"{__name__}.UserError: ")[2].rstrip() or message)
        if exit_code is not None:
            self.exit_code = exit_code


class CheckpointError(UserError):
    """A checkpoint or adapter is damaged, belongs to something else, or cannot be continued."""

    exit_code = 4
    is_common = True


class NonFiniteError(UserError):
    """Losses, gradients or weights are not finite."""

    exit_code = 5
    is_common = True


class OutOfMemoryError(UserError):
    """A step does not fit into memory."""

    exit_code = 6


class DiskFullError(UserError):
    """A disk has too little room."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """What an exception says, to the end of its first line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_first(lines: Iterable[str], total: int) -> str:
    """The first lines of a list as a message shows them, and how many more of `total` there are."""
    lines = list(lines)
    more = [f"  … and {total - len(lines):,} more"] if total > len(lines) else []
    return "\n".join([*lines, *more])


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room: the disk's, the user's share of it, or a file's limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ProcessError(UserError):
    """Processes, machines or ports: something about running together failed."""

    exit_code = 8


class Stopped(UserError):
    """A signal asked the run to stop, and what was learned is kept. The code is sysexits.h's EX_TEMPFAIL: try again."""

    exit_code = 75
    is_common = True


# Between a process and its launcher: it failed because another one did.
PEER_FAILED = 81
EXIT_MEANINGS = {
    2: "a wrong setting, file or record",
    4: "a checkpoint or adapter that cannot be used",
    5: "losses or weights that are not finite",
    6: "too little memory",
    7: "too little room on a disk",
    8: "processes or machines that failed",
    75: "stopped by a signal, state saved",
}


def stop_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: a `UserError` prints its message and exits with its code, Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            # With several processes a fault of one must say whose it is; a wrong setting stops all of them alike.
            rank = os.environ.get("RANK", "0")
            word = "stopped" if isinstance(error, Stopped) else "error"
            if str(error) and (rank == "0" or not error.is_common):
                place = "" if rank == "0" else f"[process {rank}] "
                print(f"{place}{word}: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapped
