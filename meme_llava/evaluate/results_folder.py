"""The folder of an evaluation or of a judge, and how an interrupted one goes on.

    run_record.json     what was asked and of whom, written first
    predictions.jsonl   a line for every answer, as it comes; of a judge judgements.jsonl
    metrics.json        the scores, written last: a folder that has them is finished

Nothing about models and scores.
"""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from meme_llava.errors import UserError
from meme_llava.inference.questions import Prediction
from meme_llava.storage.files import append_line, cut_torn_line, explain_full_disk, lock, read_lines, write_json
from meme_llava.storage.folders import check_output_dir, empty_directory
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.terminal import show_count

EVALUATE, JUDGE = "evaluate", "judge"  # the stage of a run record
PREDICTIONS = "predictions.jsonl"
LINES = {EVALUATE: PREDICTIONS, JUDGE: "judgements.jsonl"}
METRICS = "metrics.json"
SCORES = "scores"  # in an OUTPUT_DIR of run.sh
Item = TypeVar("Item")


class EvaluationFolder:
    """A folder that is being written. Made by `open_evaluation`, which holds its lock."""

    def __init__(self, folder: Path, stage: str):
        self._folder, self._file = folder, folder / LINES[stage]
        self.lines = []  # in the order of the questions
        if self._file.is_file():
            try:
                cut_torn_line(self._file)
                self.lines = read_lines(self._file)
            except ValueError as error:
                raise UserError(f"{self._file}: is damaged ({error}); --overwrite asks everything again") from error
        # None if the evaluation is not finished.
        self.metrics = _read_metrics(folder / METRICS) if (folder / METRICS).is_file() else None

    def append_remaining(
        self, items: Sequence[Item], noun: str, batch_size: int, answer: Callable[[Sequence[Item]], Iterable[dict]]
    ) -> None:
        """Write the lines that are missing, one for each of the items, which `noun` names; an interruption keeps them.

        `answer` gives the lines of a batch of items; its ValueError, for an image that is gone, becomes a UserError.
        """
        done = len(self.lines)
        if done:
            print(f"{done:,} of {len(items):,} {noun} are done already")
        with show_count(noun, len(items) - done) as advance:
            try:
                for start in range(done, len(items), batch_size):
                    for line in answer(items[start : start + batch_size]):
                        append_line(self._file, line)
                        self.lines.append(line)
                        advance(1)
            except ValueError as error:
                raise UserError(f"{error}; fix it and start the same command again, which goes on") from error
            except KeyboardInterrupt:
                kept = f"{len(self.lines):,} of {len(items):,} {noun} are done"
                print(f"{kept}; the same command goes on", file=sys.stderr)
                raise

    def finish(self, metrics: dict) -> None:
        """Write the scores, whole or not at all."""
        write_json(self._folder / METRICS, metrics)
        self.metrics = metrics


@contextlib.contextmanager
def open_evaluation(output_dir: Path, record: dict, overwrite: bool) -> Iterator[EvaluationFolder]:
    """Open the folder of an evaluation, made if it does not exist, and keep other processes off it.

    It goes on where `record["asked"]` is the same, which decides about the answers; `overwrite` starts anew in a folder
    that some evaluation wrote. Raises UserError where the folder holds something else, something else was asked, or
    another process writes it, and DiskFullError for a full disk; the lines before stay.
    """
    has_record = (output_dir / RUN_RECORD).is_file()
    starts_anew = overwrite or not has_record
    if starts_anew:
        check_output_dir(output_dir, overwrite)
    if has_record:
        # A model is not an evaluation; it is not emptied.
        before = _read_asked(output_dir, record["stage"])
        if not starts_anew:
            _check_same(output_dir, before, record["asked"])
    output_dir.mkdir(parents=True, exist_ok=True)
    advice = "Free some and start the same command again; answers are kept."
    with lock(output_dir), explain_full_disk(output_dir, advice):
        if starts_anew:
            empty_directory(output_dir)
            write_json(output_dir / RUN_RECORD, record)
        yield EvaluationFolder(output_dir, record["stage"])


def _check_same(folder: Path, before: dict, asked: dict) -> None:
    changes = [
        # Nobody can read a hash.
        f"other {name.removesuffix('_sha256')}"
        if name == "weights" or name.endswith("_sha256")
        else f"{name} was {before.get(name)!r}, is {asked.get(name)!r}"
        for name in sorted({*before, *asked})
        if before.get(name) != asked.get(name)
    ]
    if changes:
        raise UserError(
            f"{folder}: was made with other settings ({'; '.join(changes)}). Choose another --output_dir, "
            "delete this one, or pass --overwrite to replace it."
        )


def _read_asked(folder: Path, stage: str) -> dict:
    """What was asked of whom. Raises UserError if the folder is not one of this stage."""
    path = folder / RUN_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["stage"] != stage or not isinstance(record["asked"], dict):
            raise ValueError(f"its stage is {record['stage']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: is not an output_dir of {stage}.py ({path.name}: {error}); choose another folder"
        ) from error
    return record["asked"]


def read_finished_evaluation(folder: Path) -> tuple[Path, dict]:
    """The evaluation that a folder is, or that run.sh put there, and its metrics. Raises UserError for any other."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an OUTPUT_DIR of run.sh or an output_dir of evaluate.py")
    if not (folder / RUN_RECORD).is_file():
        if (folder / SCORES).is_dir():
            folder = folder / SCORES
        elif (folder / "merged").is_dir() or (folder / "train").is_dir():
            raise UserError(
                f"{folder}: was not evaluated yet; run first, with the other "
                f"variables of that run: OUTPUT_DIR={folder} bash run.sh evaluate"
            )
        else:
            raise UserError(
                f"{folder}: holds no {RUN_RECORD}, so it is not an output_dir of evaluate.py; choose another folder"
            )
    _read_asked(folder, EVALUATE)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: is not finished; run the same evaluate.py command once more to its end")
    return folder, _read_metrics(folder / METRICS)


def _read_metrics(path: Path) -> dict:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(metrics[key], dict) for key in ("asked", "settings", "scores")):
            raise TypeError("asked, settings and scores must be objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and the same command makes it anew") from error
    return metrics


def check_same_questions(name: str, asked: dict, other_name: str, other_asked: dict) -> None:
    """Raise UserError unless two evaluations, by what was `asked` of them, are of the same records."""
    for key in ("annotations_sha256", "limit"):
        if asked[key] != other_asked[key]:
            raise UserError(
                f"{name}: was asked other records than {other_name} ({key}: {asked[key]!r} and {other_asked[key]!r}); "
                "evaluate both models on the same --annotations and --limit"
            )


def read_predictions(folder: Path) -> dict[tuple, Prediction]:
    """Those of a finished evaluation in their order, keyed by question. Raises UserError if they cannot be read."""
    predictions: dict[tuple, Prediction] = {}
    times: Counter[tuple] = Counter()
    try:
        for line in read_lines(folder / PREDICTIONS):
            question = (line["image"], line["question"], line["reference"])
            # A file may ask the same twice.
            predictions[(*question, times[question])] = Prediction.of_line(line)
            times[question] += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / PREDICTIONS}: cannot be read ({error}); evaluate the model anew") from error
    return predictions
