"""The heartbeat by which a process shows its launcher how far it is, so that one that is stuck is noticed."""

import contextlib
import json
import os
from collections.abc import Sequence

PROGRESS_DESCRIPTOR = "MEME_LLAVA_PROGRESS_DESCRIPTOR"
# Before the first step a file of many gigabytes may be read in one go.
START_PATIENCE = 6


class Heartbeat:
    """Tells the launcher, if there is one, how far this process is, so that it can notice one that is stuck.

    Args:
        hang_timeout: seconds without a beat in any process after which the launcher ends the run; before training
            begins, six times as many.
    """

    def __init__(self, hang_timeout: float):
        descriptor = os.environ.get(PROGRESS_DESCRIPTOR)
        self._descriptor = int(descriptor) if descriptor is not None else None
        self._hang_timeout = hang_timeout
        self.trains = False
        self._count = 0
        if self._descriptor is not None:
            os.set_blocking(self._descriptor, False)

    def beat(self, activity: str) -> None:
        """Say that something was reached, and what comes now."""
        if self._descriptor is None:
            return
        self._count += 1
        timeout = self._hang_timeout * (1 if self.trains else START_PATIENCE)
        line = json.dumps([self._count, timeout, activity], ensure_ascii=True) + "\n"
        with contextlib.suppress(OSError):  # a launcher that is gone or does not read is not reason to wait
            os.write(self._descriptor, line.encode())


def parse_progress(line: bytes) -> Sequence:
    """Count, hang timeout and activity of a beat."""
    return json.loads(line)
