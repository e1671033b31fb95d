"""What each tracker is given of a run besides what the Trainer logs: a name, a place, the run record.

One process of a run, the main one, opens them. The Trainer's own callbacks find the run that was opened here.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from meme_llava.dataset.images import open_image
from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.processes import broadcast_from_main
from meme_llava.errors import Stopped
from meme_llava.inference.predictions import Prediction
from meme_llava.train.trackers import MLFLOW, SWANLAB, TENSORBOARD, WANDB, explain_failure, list_trackers

PROJECT = "meme-llava"
TENSORBOARD_FOLDER, WANDB_FOLDER, SWANLAB_FOLDER, MLFLOW_FOLDER = "tensorboard", "wandb", "swanlog", "mlflow"
FOLDERS = {TENSORBOARD_FOLDER, WANDB_FOLDER, SWANLAB_FOLDER, MLFLOW_FOLDER}
RECORD = "run_record"
ANSWERS = "answers"
LONGEST_SIDE = 448  # pixels of an image beside an answer


def describe_prediction(prediction: Prediction) -> str:
    """Everything but the image, a line each."""
    return (
        f"{Path(prediction.image).name}\nquestion: {prediction.question}\nreference: {prediction.reference}\n"
        f"answer: {prediction.answer}"
    )


def open_shown_image(prediction: Prediction) -> Image.Image:
    """The image, no larger than a page shows it."""
    image = open_image(Path(prediction.image))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


class _TensorBoard:
    def __init__(self, output_dir: Path, name: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR") or str(output_dir / TENSORBOARD_FOLDER))

    def attach_record(self, record: dict) -> None:
        self.writer.add_text(RECORD, to_literal_text(json.dumps(record, ensure_ascii=False, indent=2)))

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        for number, answer in enumerate(answers, 1):
            self.writer.add_text(f"{ANSWERS}/{number}", to_literal_text(describe_prediction(answer)), step)
            image = np.asarray(open_shown_image(answer))  # uint8 (height, width, 3)
            self.writer.add_image(f"{ANSWERS}/{number}", image, step, dataformats="HWC")
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, output_dir: Path, name: str):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", name),
            dir=os.environ.get("WANDB_DIR", str(output_dir)),
        )

    def attach_record(self, record: dict) -> None:
        self._run.config.update({RECORD: record}, allow_val_change=True)

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        import wandb

        images = {
            f"{ANSWERS}/{number}": wandb.Image(open_shown_image(answer), caption=describe_prediction(answer))
            for number, answer in enumerate(answers, 1)
        }
        # The step as the Trainer's callback counts it.
        self._run.log({**images, "train/global_step": step})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _SwanLab:
    def __init__(self, output_dir: Path, name: str):
        import swanlab

        self._swanlab = swanlab
        own_folder = os.environ.get("SWANLAB_LOG_DIR") or os.environ.get("SWANLAB_LOGDIR")
        swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            experiment_name=name,
            log_dir=own_folder or str(output_dir / SWANLAB_FOLDER),
            id=os.environ.get("SWANLAB_RUN_ID"),
            resume=os.environ.get("SWANLAB_RESUME"),
        )

    def attach_record(self, record: dict) -> None:
        self._swanlab.config.update({RECORD: record})

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        images = {
            f"{ANSWERS}/{number}": self._swanlab.Image(open_shown_image(answer), caption=describe_prediction(answer))
            for number, answer in enumerate(answers, 1)
        }
        self._swanlab.log(images, step=step)

    def finish(self, failed: bool) -> None:
        if failed:
            self._swanlab.finish(state="crashed", error="training failed; see what train.py printed")
        else:
            self._swanlab.finish()


class _Mlflow:
    def __init__(self, output_dir: Path, name: str):
        import mlflow

        self._mlflow = mlflow
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if not mlflow.is_tracking_uri_set():
            folder = (output_dir / MLFLOW_FOLDER).resolve()
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            if mlflow.get_experiment_by_name(experiment) is None:
                # Files would go to the user's working directory.
                mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=name)
        # The Trainer's callback would start that run a second time.
        os.environ.pop("MLFLOW_RUN_ID", None)

    def attach_record(self, record: dict) -> None:
        self._mlflow.log_dict(record, f"{RECORD}.json")
        # What runs are compared by in a table.
        settings = record["settings"] | {f"schedule.{key}": value for key, value in record["schedule"].items()}
        self._mlflow.log_params({f"{RECORD}.{key}": value for key, value in settings.items()})

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        # An image has no caption here; the texts lie beside them.
        self._mlflow.log_dict([asdict(answer) for answer in answers], f"{ANSWERS}/step_{step:06d}.json")
        for number, answer in enumerate(answers, 1):
            self._mlflow.log_image(open_shown_image(answer), key=f"{ANSWERS}_{number}", step=step)

    def finish(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


_RUNS = {TENSORBOARD: _TensorBoard, WANDB: _Wandb, SWANLAB: _SwanLab, MLFLOW: _Mlflow}


class TrackerRuns:
    """The run in every tracker that it is reported to; in processes but the main one there are none."""

    def __init__(self):
        self._runs: dict = {}

    def open(self, names: Sequence[str], output_dir: Path, name: str) -> None:
        """Start a run in each tracker. Raises UserError where one cannot be started."""
        for tracker in names:
            with explain_failure(tracker):
                self._runs[tracker] = _RUNS[tracker](output_dir, name)

    def join(self, trainer: Trainer) -> None:
        """Let the Trainer's callbacks write to these runs; those of wandb, swanlab and mlflow find them themselves."""
        if TENSORBOARD in self._runs:
            trainer.remove_callback(TensorBoardCallback)
            trainer.add_callback(TensorBoardCallback(self._runs[TENSORBOARD].writer))

    def attach_record(self, record: dict) -> None:
        """Show the run record beside the curves."""
        for tracker, run in self._runs.items():
            with explain_failure(tracker):
                run.attach_record(record)

    def report_answers(self, step: int, answers: Sequence[Prediction]) -> None:
        """Show images with what the model says of them after an optimizer step."""
        for run in self._runs.values():
            run.report_answers(step, answers)

    def finish(self, failed: bool) -> None:
        """End the runs, everything written."""
        for run in self._runs.values():
            run.finish(failed)
        self._runs = {}


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
