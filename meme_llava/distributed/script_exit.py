"""How a training script ends: with the exit code that the launcher understands. Without torch."""

import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from meme_llava.distributed.environment import count_processes, find_rank
from meme_llava.errors import PEER_FAILED

_SIGNS_OF_LOSS = ("/gloo/transport/", "NCCL communicator was aborted", "remote process exited", "Watchdog caught")


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
