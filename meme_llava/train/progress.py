"""The progress of a training run, shown while it runs."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from meme_llava.distributed.environment import is_main_process

SECONDS_BETWEEN_LINES = 5  # of progress, where the output is a file


class ProgressBar:
    """A bar with loss, speed and time left; plain lines where the output is not a terminal. Of the main process."""

    def __init__(self, step: int, steps: int):
        self._first_step, self._steps = step, steps
        self._start = time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        is_shown = is_main_process() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_shown)

    def update(self) -> None:
        """A step is done."""
        self._bar.update()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show what was logged."""
        if not is_main_process() or "loss" not in figures:
            return
        speed = _describe_speed(figures)
        left_out = ""
        if "quarantined_records" in figures:
            left_out = f", {figures['quarantined_records']:,} records quarantined"
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {figures['loss']:.4f}, {speed}{left_out}")
            return
        seconds = time.perf_counter() - self._start
        if seconds - self._last_line < SECONDS_BETWEEN_LINES and step < self._steps:
            return
        self._last_line = seconds
        left = seconds / (step - self._first_step) * (self._steps - step)
        print(
            f"step {step}/{self._steps}  loss {figures['loss']:.4f}  {speed}  "
            f"{tqdm.format_interval(left)} left{left_out}",
            flush=True,
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _describe_speed(logs: dict) -> str:
    """Speed over the steps since the last log line, and what held it back."""
    speed = f"{logs['captions_per_second']:.1f} captions/s, {logs['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in logs:
        speed += f", MFU {logs['mfu']:.0%}"
    return f"{speed}, waiting for data {logs['data_wait_share']:.0%}"
