"""The progress of a training run, shown while it runs."""

import sys
import time

from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback

SECONDS_BETWEEN_LINES = 5  # of progress, where the output is a file


class ProgressBar(TrainerCallback):
    """A bar with loss, speed and time left; plain lines where the output is not a terminal."""

    def __init__(self):
        self._bar = None
        self._start = (0.0, 0)
        self._last_line = -SECONDS_BETWEEN_LINES

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n if not self._bar.disable else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is None or "loss" not in logs:
            return
        start_time, start_step = self._start
        seconds = time.perf_counter() - start_time
        speed = _describe_speed(logs)
        left_out = f", {logs['quarantined_records']:,} records quarantined" if "quarantined_records" in logs else ""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, {speed}{left_out}")
            return
        if seconds - self._last_line < SECONDS_BETWEEN_LINES and state.global_step < state.max_steps:
            return
        self._last_line = seconds
        left = seconds / (state.global_step - start_step) * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  {speed}  "
            f"{tqdm.format_interval(left)} left{left_out}",
            flush=True,
        )

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()


def _describe_speed(logs: dict) -> str:
    """Speed over the steps since the last log line, and what held it back."""
    speed = f"{logs['captions_per_second']:.1f} captions/s, {logs['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in logs:
        speed += f", MFU {logs['mfu']:.0%}"
    return f"{speed}, waiting for data {logs['data_wait_share']:.0%}"


def show_progress_with(trainer: Trainer, bar: ProgressBar) -> None:
    """Put our bar in the place of the Trainer's."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bar)
