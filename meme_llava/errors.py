"""Knows how a script stops when the user has to act: one clear message, exit code 2, no traceback."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A wrong setting, file or record. The message names the thing, what was found and what to do next."""

    def __init__(self, message: str):
        # A DataLoader worker's error arrives with the worker's whole traceback in front of the message.
        super().__init__(message.rpartition(f"{__name__}.UserError: ")[2].rstrip() or message)


def stop_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: a `UserError` prints its message and exits with code 2, Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            # With several processes a fault of one must say whose it is; a wrong setting stops all of them alike.
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"[process {rank}] error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapped
