"""What is shown of a run: its trackers and whether each can be used here, a progress bar, training curves.

Accelerate's trackers are used. One process of a run, the main one, opens them.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, SwanLabTracker, TensorBoardTracker, WandBTracker
from tqdm import tqdm

from meme_llava.dataset.images import open_image
from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import broadcast_from_main
from meme_llava.errors import Stopped, UserError, first_line
from meme_llava.storage.proxy import check_proxy
from meme_llava.storage.run_record import RATE_PREFIX
from meme_llava.train.settings import MLFLOW, NO_TRACKER, SWANLAB, TENSORBOARD, WANDB

PROJECT = "meme-llava"
# What has to be importable for each, and the folder that it writes in output_dir.
MODULES = {TENSORBOARD: ("tensorboard",), WANDB: ("wandb",), SWANLAB: ("swanlab",), MLFLOW: ("mlflow", "sqlalchemy")}
FOLDERS = {TENSORBOARD: "tensorboard", WANDB: "wandb", SWANLAB: "swanlog", MLFLOW: "mlflow"}
REMEDIES = {
    TENSORBOARD: "check TENSORBOARD_LOGGING_DIR",
    WANDB: "wandb login, or set WANDB_MODE=offline",
    SWANLAB: "swanlab login, or set SWANLAB_MODE=offline",
    MLFLOW: "check MLFLOW_TRACKING_URI and the other MLFLOW_ variables",
}
ANSWERS = "answers.jsonl"  # in output_dir: what the model said at each evaluation
REACH_SECONDS = 10
OFFLINE_MODES = ("offline", "local", "disabled", "dryrun")
SECONDS_BETWEEN_LINES = 5  # of progress, where the output is a file
STEPS_BEFORE_ESTIMATE = 3  # the first one is slow: memory is taken, kernels are chosen
LONGEST_SIDE = 448  # pixels of an image beside an answer


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError unless every tracker is installed, and one with a server logged in and to be reached."""
    for name in names:
        for module in MODULES.get(name, ()):
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"--report_to {name}: the package {module} is not installed; pip install -r "
                    f"configs/requirements/trackers.txt (or only the lines of {name}), or leave {name} out"
                )
    mlflow_address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if MLFLOW in names and mlflow_address.startswith(("http://", "https://")):
        _check_reachable(MLFLOW, mlflow_address, "set another MLFLOW_TRACKING_URI, or unset it")
    if WANDB in names:
        import wandb

        with explain_failure(WANDB):
            settings = wandb.setup().settings
            if (settings.mode or "online") not in OFFLINE_MODES:
                # A login asks the server, too, and takes long to say that there is none.
                remedy = "set WANDB_MODE=offline and upload later with wandb sync"
                _check_reachable(WANDB, settings.base_url, remedy)
                wandb.login()
    if SWANLAB in names:
        import swanlab

        with explain_failure(SWANLAB):
            settings = swanlab.Settings()
            if settings.mode not in OFFLINE_MODES:
                if not settings.api_key:
                    raise RuntimeError("nobody is logged in")
                remedy = "set SWANLAB_MODE=offline and upload later with swanlab sync"
                _check_reachable(SWANLAB, settings.api_host, remedy)


def _check_reachable(name: str, address: str, remedy: str) -> None:
    """Raise UserError unless something answers there, whatever it says, or a SOCKS proxy leads there: urllib has none,
    and the tracker's own library says what is wrong."""
    check_proxy()
    parts = urllib.parse.urlsplit(address)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a user's name and password
    proxies = urllib.request.getproxies()
    if proxies.get(parts.scheme, proxies.get("all", "")).lower().startswith("socks"):
        return
    try:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(address, timeout=REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--report_to {name}: {address} does not answer ({reason}); fix the connection, {remedy}, "
            f"or leave {name} out"
        ) from error


@contextlib.contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Turn whatever a tracker's library raises into a UserError, and let it ask no question on the terminal: with
    several processes nobody would see it, and all would wait for the answer."""
    stdin = sys.stdin
    try:
        with open(os.devnull) as sys.stdin:
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--report_to {name}: cannot be used here ({first_line(error)}); {REMEDIES[name]}, or leave {name} out"
        ) from error
    finally:
        sys.stdin = stdin


def open_tracker(name: str, output_dir: Path, run_name: str) -> GeneralTracker:
    """Start a run in a tracker, in the run's own folder unless the user's variables say where."""
    get, folder = os.environ.get, output_dir / FOLDERS[name]
    if name == TENSORBOARD:
        tracker = TensorBoardTracker("", get("TENSORBOARD_LOGGING_DIR") or folder)
    elif name == WANDB:
        place = {"dir": get("WANDB_DIR", str(output_dir)), "name": get("WANDB_NAME", run_name)}
        tracker = WandBTracker(get("WANDB_PROJECT", PROJECT), **place)
    elif name == SWANLAB:
        tracker = SwanLabTracker(
            get("SWANLAB_PROJECT", PROJECT),
            experiment_name=run_name,
            log_dir=get("SWANLAB_LOG_DIR") or get("SWANLAB_LOGDIR") or str(folder),
            id=get("SWANLAB_RUN_ID"),
            resume=get("SWANLAB_RESUME"),
        )
    else:
        import mlflow

        artifacts = None
        if not mlflow.is_tracking_uri_set():
            folder = folder.resolve()
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            artifacts = (folder / "artifacts").as_uri()
        tracker = MLflowTracker(PROJECT, logging_dir=artifacts, run_name=run_name)
    tracker.start()
    return tracker


@dataclass
class TrackerRuns:
    """The run in every tracker that it is reported to, by the tracker's name; none in processes but the main one."""

    trackers: dict[str, GeneralTracker] = field(default_factory=dict)

    def attach_record(self, record: dict) -> None:
        """Show the run record beside the curves."""
        for name, tracker in self.trackers.items():
            with explain_failure(name):
                if name == TENSORBOARD:
                    tracker.log({"run_record": to_literal_text(json.dumps(record, ensure_ascii=False, indent=2))})
                elif name == MLFLOW:
                    # What runs are compared by in a table.
                    shown = record["settings"] | {f"schedule.{key}": value for key, value in record["schedule"].items()}
                    tracker.store_init_configuration({f"run_record.{key}": value for key, value in shown.items()})
                else:
                    tracker.store_init_configuration({"run_record": record})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Report what was logged after an optimizer step: eval/… what is called eval_…, train/… everything else."""
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in figures.items()
        }
        for name, tracker in self.trackers.items():
            with explain_failure(name):
                tracker.log(named, step=step)

    def report_answers(self, step: int, answers: Sequence) -> None:
        """Show images in TensorBoard with what the model says of them, each a `Prediction`, after an optimizer step."""
        if TENSORBOARD not in self.trackers:
            return
        writer = self.trackers[TENSORBOARD].tracker
        for number, answer in enumerate(answers, 1):
            asked = answer.question
            words = f"{asked.image.name}\nquestion: {asked.text}\nreference: {asked.reference}\nanswer: {answer.text}"
            writer.add_text(f"answers/{number}", to_literal_text(words), step)
            image = open_image(asked.image)
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            # uint8 (height, width, 3)
            writer.add_image(f"answers/{number}", np.asarray(image), step, dataformats="HWC")
        writer.flush()

    def finish(self, failed: bool) -> None:
        """End the runs, everything written."""
        for name, tracker in self.trackers.items():
            if failed and name == WANDB:
                tracker.tracker.finish(exit_code=1)
            elif failed and name == MLFLOW:
                import mlflow

                mlflow.end_run("FAILED")
            elif failed and name == SWANLAB:
                tracker.tracker.finish(state="crashed", error="training failed; see what train.py printed")
            else:
                tracker.finish()


@contextlib.contextmanager
def open_tracker_runs(names: Sequence[str], output_dir: Path, run_name: str | None) -> Iterator[TrackerRuns]:
    """Report a run while the block lasts. All processes call this together, and all raise UserError where a tracker
    cannot be used."""
    runs, failed = TrackerRuns(), True

    def start() -> None:
        for name in [name for name in names if name != NO_TRACKER]:
            with explain_failure(name):
                runs.trackers[name] = open_tracker(name, output_dir, run_name or str(output_dir))

    try:
        broadcast_from_main(start)
        yield runs
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        if is_main_process():
            runs.finish(failed)


def to_literal_text(text: str) -> str:
    """Markdown that shows a text as it is, whatever signs it holds."""
    return "".join(f"    {line}\n" for line in text.splitlines())


class ProgressBar:
    """A bar with loss, speed and time left; plain lines where the output is not a terminal. Of the main process."""

    def __init__(self, step: int, steps: int):
        self._first_step, self._steps, self._start = step, steps, time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        is_shown = is_main_process() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_shown)
        self.update, self.close = self._bar.update, self._bar.close

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show what was logged: the speed is that since the last log line."""
        seconds = time.perf_counter() - self._start
        is_early = self._bar.disable and seconds - self._last_line < SECONDS_BETWEEN_LINES and step < self._steps
        if not is_main_process() or "loss" not in figures or is_early:
            return
        self._last_line = seconds
        loss = f"loss {figures['loss']:.4f}"
        speed = f"{figures['captions_per_second']:.1f} captions/s, {figures['tokens_per_second']:,.0f} tokens/s"
        speed += f", MFU {figures['mfu']:.0%}" if "mfu" in figures else ""
        speed += f", waiting for data {figures['data_wait_share']:.0%}"
        left_out = figures.get("quarantined_records")
        left_out = f", {left_out:,} records quarantined" if left_out else ""
        if self._bar.disable:
            done, left = step - self._first_step, ""
            if done >= STEPS_BEFORE_ESTIMATE:
                left = f"  {tqdm.format_interval(seconds / done * (self._steps - step))} left"
            print(f"step {step}/{self._steps}  {loss}  {speed}{left}{left_out}", flush=True)
        else:
            self._bar.set_postfix_str(f"{loss}, {speed}{left_out}")


def draw_training_curves(log_history: list[dict], path: Path) -> None:
    """Write a PNG: the losses of a training log above, every role's learning rate below, over optimizer steps."""
    # It takes a second to load, and one process needs it once.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries, evaluated = ([one for one in log_history if key in one] for key in ("loss", "eval_loss"))
    steps = [entry["step"] for entry in entries]
    figure, (loss_axes, rate_axes) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    loss_axes.plot(steps, [entry["loss"] for entry in entries], linewidth=1.2, label="training")
    if evaluated:
        points = zip(*((entry["step"], entry["eval_loss"]) for entry in evaluated), strict=True)
        loss_axes.plot(*points, "o-", linewidth=1.8, label="validation")
        loss_axes.legend()
    loss_axes.set(ylabel="loss" if evaluated else "training loss", ylim=(0, None))
    roles = sorted({key for entry in entries for key in entry if key.startswith(RATE_PREFIX)})
    # Roles often share a rate; dashes of different length on one line keep all of them visible.
    for role, style in zip(roles, itertools.cycle(["-", "--", ":"])):
        rates = [entry.get(role) for entry in entries]
        label = f"{role.removeprefix(RATE_PREFIX)} (peak {max(rates):.2g})"
        rate_axes.plot(steps, rates, style, label=label, linewidth=1.8)
    rate_axes.set_yscale("symlog", linthresh=1e-6)
    rate_axes.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    if roles:
        rate_axes.legend()
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
