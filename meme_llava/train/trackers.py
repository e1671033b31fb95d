"""The trackers that a run can be reported to: whether each can be used here, and the run in them.

Accelerate's trackers do it. One process of a run, the main one, opens them.
"""

import contextlib
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, SwanLabTracker, TensorBoardTracker, WandBTracker

from meme_llava.dataset.images import open_image
from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import broadcast_from_main
from meme_llava.errors import Stopped, UserError
from meme_llava.inference.questions import Prediction
from meme_llava.train.settings import MLFLOW, NO_TRACKER, SWANLAB, TENSORBOARD, WANDB

# What has to be importable for each.
MODULES = {TENSORBOARD: ("tensorboard",), WANDB: ("wandb",), SWANLAB: ("swanlab",), MLFLOW: ("mlflow", "sqlalchemy")}
REQUIREMENTS = "configs/requirements/trackers.txt"
REACH_SECONDS = 10
OFFLINE_MODES = ("offline", "local", "disabled", "dryrun")


def list_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that --report_to asks for; none is not a tracker."""
    return [name for name in names if name != NO_TRACKER]


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker is installed, and one with a server logged in and to be reached.

    Raises:
        UserError: one cannot be used, with what to do.
    """
    for name in list_trackers(names):
        missing = [module for module in MODULES[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(
                f"--report_to {name}: the package {missing[0]} is not installed; pip install -r {REQUIREMENTS} (or "
                f"only the lines of {name}), or leave {name} out"
            )
    if WANDB in names:
        _check_wandb()
    if SWANLAB in names:
        _check_swanlab()
    if MLFLOW in names and os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://")):
        _check_reachable(MLFLOW, os.environ["MLFLOW_TRACKING_URI"], "set another MLFLOW_TRACKING_URI, or unset it")


def _check_wandb() -> None:
    import wandb

    with explain_failure(WANDB):
        settings = wandb.setup().settings
        if (settings.mode or "online") in OFFLINE_MODES:
            return
    # A login asks the server, too, and takes long to say that there is none.
    _check_reachable(WANDB, settings.base_url, "set WANDB_MODE=offline and upload later with wandb sync")
    with explain_failure(WANDB):
        wandb.login()


def _check_swanlab() -> None:
    import swanlab

    with explain_failure(SWANLAB):
        settings = swanlab.Settings()
    if settings.mode in OFFLINE_MODES:
        return
    if not settings.api_key:
        raise UserError(
            f"--report_to {SWANLAB}: nobody is logged in; swanlab login, or set SWANLAB_MODE=offline, or leave it out"
        )
    _check_reachable(SWANLAB, settings.api_host, "set SWANLAB_MODE=offline and upload later with swanlab sync")


def _check_reachable(name: str, address: str, remedy: str) -> None:
    """Raise UserError unless something answers there, whatever it says."""
    address = _drop_login(address)
    try:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(address, timeout=REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--report_to {name}: {address} does not answer ({reason}); fix the connection, {remedy}, "
            f"or leave {name} out"
        ) from error


def _drop_login(address: str) -> str:
    """The address without a user's name and password in it."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Turn whatever a tracker's library raises into a UserError, and let it ask no question on the terminal.

    With several processes nobody would see the question, and all would wait for the answer.
    """
    login = {WANDB: "wandb login, or set WANDB_MODE=offline", SWANLAB: "swanlab login, or set SWANLAB_MODE=offline"}
    stdin = sys.stdin
    try:
        with open(os.devnull) as sys.stdin:
            yield
    except UserError:
        raise
    except Exception as error:
        words = str(error).strip().splitlines()
        reason = words[0] if words else type(error).__name__
        remedy = login.get(name, "check MLFLOW_TRACKING_URI and the other MLFLOW_ variables")
        raise UserError(f"--report_to {name}: cannot be used here ({reason}); {remedy}, or leave {name} out") from error
    finally:
        sys.stdin = stdin


PROJECT = "meme-llava"
TENSORBOARD_FOLDER, WANDB_FOLDER, SWANLAB_FOLDER, MLFLOW_FOLDER = "tensorboard", "wandb", "swanlog", "mlflow"
FOLDERS = {TENSORBOARD_FOLDER, WANDB_FOLDER, SWANLAB_FOLDER, MLFLOW_FOLDER}
RECORD = "run_record"
ANSWERS = "answers"
EVAL_PREFIX = "eval_"
LONGEST_SIDE = 448  # pixels of an image beside an answer


def describe_prediction(prediction: Prediction) -> str:
    """Everything but the image, a line each."""
    asked = prediction.question
    return f"{asked.image.name}\nquestion: {asked.text}\nreference: {asked.reference}\nanswer: {prediction.text}"


def open_tracker(name: str, output_dir: Path, run_name: str) -> GeneralTracker:
    """Start a run in a tracker, in the run's own folder unless the user's variables say where."""
    get = os.environ.get
    if name == TENSORBOARD:
        tracker = TensorBoardTracker("", get("TENSORBOARD_LOGGING_DIR") or output_dir / TENSORBOARD_FOLDER)
    elif name == WANDB:
        place = {"dir": get("WANDB_DIR", str(output_dir)), "name": get("WANDB_NAME", run_name)}
        tracker = WandBTracker(get("WANDB_PROJECT", PROJECT), **place)
    elif name == SWANLAB:
        tracker = SwanLabTracker(
            get("SWANLAB_PROJECT", PROJECT),
            experiment_name=run_name,
            log_dir=get("SWANLAB_LOG_DIR") or get("SWANLAB_LOGDIR") or str(output_dir / SWANLAB_FOLDER),
            id=get("SWANLAB_RUN_ID"),
            resume=get("SWANLAB_RESUME"),
        )
    else:
        tracker = MLflowTracker(PROJECT, logging_dir=prepare_mlflow(output_dir), run_name=run_name)
    tracker.start()
    return tracker


def prepare_mlflow(output_dir: Path) -> str | None:
    """Where files of a run go; a database in the run's folder, unless the user has a place for both."""
    import mlflow

    if mlflow.is_tracking_uri_set():
        return None
    folder = (output_dir / MLFLOW_FOLDER).resolve()
    folder.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return (folder / "artifacts").as_uri()


class TrackerRuns:
    """The run in every tracker that it is reported to; in processes but the main one there are none."""

    def __init__(self):
        self._trackers: dict[str, GeneralTracker] = {}

    def open(self, names: Sequence[str], output_dir: Path, name: str) -> None:
        """Start a run in each tracker. Raises UserError where one cannot be started."""
        for tracker in names:
            with explain_failure(tracker):
                self._trackers[tracker] = open_tracker(tracker, output_dir, name)

    def attach_record(self, record: dict) -> None:
        """Show the run record beside the curves."""
        for name, tracker in self._trackers.items():
            with explain_failure(name):
                if name == TENSORBOARD:
                    tracker.log({RECORD: to_literal_text(json.dumps(record, ensure_ascii=False, indent=2))})
                elif name == MLFLOW:
                    # What runs are compared by in a table.
                    shown = record["settings"] | {f"schedule.{key}": value for key, value in record["schedule"].items()}
                    tracker.store_init_configuration({f"{RECORD}.{key}": value for key, value in shown.items()})
                else:
                    tracker.store_init_configuration({RECORD: record})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Report what was logged after an optimizer step."""
        named = {
            f"eval/{name.removeprefix(EVAL_PREFIX)}" if name.startswith(EVAL_PREFIX) else f"train/{name}": value
            for name, value in figures.items()
        }
        for tracker in self._trackers.values():
            tracker.log(named, step=step)

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        """Show images in TensorBoard with what the model says of them after an optimizer step."""
        if TENSORBOARD not in self._trackers:
            return
        writer = self._trackers[TENSORBOARD].tracker
        for number, answer in enumerate(answers, 1):
            writer.add_text(f"{ANSWERS}/{number}", to_literal_text(describe_prediction(answer)), step)
            image = open_image(answer.question.image)
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            # uint8 (height, width, 3)
            writer.add_image(f"{ANSWERS}/{number}", np.asarray(image), step, dataformats="HWC")
        writer.flush()

    def finish(self, failed: bool) -> None:
        """End the runs, everything written."""
        for name, tracker in self._trackers.items():
            if failed and name == WANDB:
                tracker.tracker.finish(exit_code=1)
            elif failed and name == MLFLOW:
                import mlflow

                mlflow.end_run("FAILED")
            elif failed and name == SWANLAB:
                tracker.tracker.finish(state="crashed", error="training failed; see what train.py printed")
            else:
                tracker.finish()
        self._trackers = {}


@contextlib.contextmanager
def open_tracker_runs(report_to: Sequence[str], output_dir: Path, run_name: str | None) -> Iterator[TrackerRuns]:
    """Report a run while the block lasts. All processes call this together.

    Raises:
        UserError: a tracker cannot be used; in every process.
    """
    runs, failed = TrackerRuns(), True
    try:
        broadcast_from_main(lambda: runs.open(list_trackers(report_to), output_dir, run_name or str(output_dir)))
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
