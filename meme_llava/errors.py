"""Errors that a user can act on: one clear message, an exit code for each kind, no traceback."""

import contextlib
import errno
import functools
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator


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


MOST_EXAMPLES, MOST_CAUSES = 3, 20  # in a message; what is wrong is counted in full


def first_line(error: BaseException) -> str:
    """What an exception says, to the end of its first line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_first(lines: Iterable[str], total: int) -> str:
    """The first lines of a list as a message shows them, and how many more of `total` there are."""
    lines = list(lines)
    more = [f"  … and {total - len(lines):,} more"] if total > len(lines) else []
    return "\n".join([*lines, *more])


def list_by_cause(thing: str, found: Iterable[tuple[str, str]]) -> str:
    """Lines of a message about many things that are wrong, each with its cause, which is said once.

    Of a cause with more than three lines their number and the first three are shown, and of the causes the first 20.

    Args:
        thing: what a line is about: record, image, …
        found: (cause, line).
    """
    causes: dict[str, list[str]] = {}
    for cause, line in found:
        causes.setdefault(cause, []).append(line)
    blocks = []
    for cause, lines in causes.items():
        if len(lines) > MOST_EXAMPLES:
            lines = [f"{count(len(lines), thing)}: {cause}, e.g.", *(f"  {line}" for line in lines[:MOST_EXAMPLES])]
        blocks.append("\n".join(f"  {line}" for line in lines))
    return join_first(blocks[:MOST_CAUSES], len(blocks))


def count(number: int, thing: str, things: str | None = None) -> str:
    """A number with its noun: "1 record", "1,024 records", and with `things` "2 copies"."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def is_utf8(word: str) -> bool:
    """Whether a name or argument is UTF-8 on the system: Python reads other bytes as halves of surrogate pairs."""
    return re.search("[\ud800-\udfff]", word) is None


def printable(text: str) -> str:
    """Text as a terminal may show it: control characters, which could rewrite the screen, spelled out as `\\x1b`."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


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


# The number of this process among those that train together; meme_llava.distributed.environment says it.
rank = 0
# Between a process and its launcher: it failed because another one did.
PEER_FAILED = 81
# Nobody reads what a script prints; the code of a process that SIGPIPE ends.
CLOSED_PIPE = 141
EXIT_MEANINGS = {
    2: "a wrong setting, file or record",
    4: "a checkpoint or adapter that cannot be used",
    5: "losses or weights that are not finite",
    6: "too little memory",
    7: "too little room on a disk",
    8: "processes or machines that failed",
    75: "stopped by a signal, state saved",
}


# What the user can do about what the operating system refuses. Other refusals are faults of ours, with a traceback.
_NOT_ALLOWED = "this user may not read or write it; see `ls -ld`, or choose another place"
_OS_ADVICE = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "its disk can only be read; choose another place",
    errno.ENAMETOOLONG: "a name has at most 255 bytes; choose a shorter one",
    errno.ENOTDIR: "a part of this path is a file, expected a folder",
    errno.EEXIST: "a file or a link to nothing has this name; remove it, or choose another place",
    errno.ELOOP: "its links lead back to themselves; remove one of them",
}


def _explain_os_error(error: OSError) -> UserError | None:
    """The operating system's error as one that the user can act on, if it is such a one."""
    if isinstance(error, FileNotFoundError) and not _has_current_folder():
        return UserError("the current folder was deleted; cd to another one")
    if error.filename is None:
        return None
    if is_disk_full(error):
        return DiskFullError(f"{error.filename}: the disk is full; free some room, or choose another place")
    advice = _OS_ADVICE.get(error.errno)
    return UserError(f"{error.filename}: {advice}") if advice else None


def _has_current_folder() -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(os.getcwd())
    return False


def _is_closed(descriptor: int) -> bool:
    """Whether nobody reads from a pipe or socket any more, as in `infer.py … | head -1`."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _explain_os_errors() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()  # a closed pipe is found here, not by the interpreter as it ends
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_closed(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter flushes as it ends
            sys.exit(CLOSED_PIPE)
        explained = _explain_os_error(error)
        if explained is None:
            raise
        raise explained from error
    except RuntimeError as error:
        # pathlib's words for ELOOP, before Python 3.13.
        if match := re.fullmatch("Symlink loop from ['\"](.*)['\"]", str(error)):
            raise UserError(f"{match[1]}: {_OS_ADVICE[errno.ELOOP]}") from error
        raise


def stop_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: a `UserError` prints its message and exits with its code, Ctrl-C exits with 130.

    So does an `OSError` about a file that the user can do something about. A closed pipe ends the script in silence.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console that lacks a letter shows ? in its place
        try:
            with _explain_os_errors():
                main(argv)
        except UserError as error:
            # With several processes a fault of one must say whose it is; a wrong setting stops all of them alike.
            word = "stopped" if isinstance(error, Stopped) else "error"
            if str(error) and (rank == 0 or not error.is_common):
                place = "" if rank == 0 else f"[process {rank}] "
                print(f"{place}{word}: {printable(str(error))}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapped
