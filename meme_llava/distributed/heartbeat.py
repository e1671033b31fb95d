"""The heartbeat of a process that trains: one that is stuck says where, and ends itself."""

import faulthandler

# Before the first step a file of many gigabytes may be read in one go.
START_PATIENCE = 6
STANDARD_ERROR = 2


class Heartbeat:
    """Ends this process when too much time passes without a beat; every thread's stack is printed then.

    The processes of a run wait for each other, so one that is stuck ends them all. It watches inside a `with` block.

    Args:
        hang_timeout: seconds; before training begins, six times as many.
    """

    def __init__(self, hang_timeout: float):
        self._hang_timeout = hang_timeout
        self.patience = START_PATIENCE * hang_timeout
        self.trains = False

    def __enter__(self) -> "Heartbeat":
        self.beat()
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that something was reached."""
        seconds = self._hang_timeout if self.trains else self.patience
        faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)
