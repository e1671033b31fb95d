"""How a training script begins and ends, and what its end says. Without torch."""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from meme_llava.distributed.environment import count_processes, find_rank, settle_environment
from meme_llava.errors import EXIT_MEANINGS, PEER_FAILED, ProcessError, Stopped, UserError

_SIGNS_OF_LOSS = ("/gloo/transport/", "NCCL communicator was aborted", "remote process exited", "Watchdog caught")


PEER_SECONDS = 2  # the process that failed is to be gone, and known by its own exit code, before the others
LAST_LINES = 12
RESTART = "The newest checkpoint is kept; start the same command again."
TERM_SECONDS = 20  # torch's launcher kills what has not heeded SIGTERM for thirty seconds


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the run is gone or does not answer."""
    # Torch's own error for it cannot have been raised where torch was never loaded.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


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
        if is_peer_failure(error):
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


def describe_end(name: str, code: int) -> str:
    """How a process ended whose exit code is not its own choice."""
    if code >= 0:
        return f"{name} ended with exit code {code}"
    text = f"{name} was killed by {signal.Signals(-code).name}"
    return text + (
        " (the kernel does that when memory runs out; dmesg would say so)" if code == -signal.SIGKILL else ""
    )


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
        return with_code("", code)
    if code in EXIT_MEANINGS:
        return with_code(f"{name} stopped: {EXIT_MEANINGS[code]}; see its message above", code)
    words = Path(result.stderrs[local]).read_text(errors="replace").splitlines() if result.stderrs[local] else []
    last = "".join(f"\n    {line}" for line in [line for line in words if line.strip()][-LAST_LINES:])
    end = f"{name} lost a process on another node" if code == PEER_FAILED else describe_end(name, code)
    if any(line.startswith("Timeout (") for line in words):  # as faulthandler writes
        end = f"{name} made no progress for --hang_timeout seconds"
    text = f"{end}; all processes were ended. {RESTART}"
    code = code if code > 0 and code != PEER_FAILED else ProcessError.exit_code
    return with_code(text + (f"\nLast words of process {ranks[local]}:{last}" if last else ""), code)


def _rate(failure, since: int) -> tuple[int, int]:
    """How little a process's end says about what went wrong; among equals, when it was noticed."""
    code = failure.exitcode
    was_asked = code == -signal.SIGTERM or (code == -signal.SIGKILL and failure.timestamp - since > TERM_SECONDS)
    kinds = [
        code in EXIT_MEANINGS and code != Stopped.exit_code,
        code < 0 and not was_asked,
        code > 0 and code not in (Stopped.exit_code, PEER_FAILED),
        code == Stopped.exit_code,
        code == PEER_FAILED,
        True,
    ]
    return kinds.index(True), failure.timestamp


def with_code(text: str, code: int) -> UserError:
    """A UserError that ends a script with this exit code."""
    error = UserError(text)
    error.exit_code = code
    return error
