"""Knows how a script stops when the user has to act: one clear message, exit code 2, no traceback."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """A wrong setting, file or record. The message names the thing, what was found and what to do next."""


def stop_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main` so that a `UserError` prints its message and exits with code 2."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
