"""The folder of an evaluation or of a judge, and how an interrupted one goes on.

    run_record.json     what was asked and of whom, written first
    predictions.jsonl   a line for every answer, as it comes; of a judge judgements.jsonl
    metrics.json        the scores, written last: a folder that has them is finished

Nothing about models and scores.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from meme_llava.errors import UserError
from meme_llava.inference.questions import Prediction
from meme_llava.storage.files import append_line, cut_torn_line, explain_full_disk, lock, read_lines, write_json
from meme_llava.storage.folders import check_output_dir, empty_directory
from meme_llava.storage.json_files import check_fields, read_json
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.terminal import show_count

EVALUATE, JUDGE = "evaluate", "judge"  # the stage of a run record
PREDICTIONS = "predictions.jsonl"
LINES = {EVALUATE: PREDICTIONS, JUDGE: "judgements.jsonl"}
METRICS = "metrics.json"
_SCORE = {"value": float, "low": float, "high": float, "count": int}
# What is read of metrics.json, and of each of its scores.
_METRICS_FIELDS = {
    EVALUATE: {"title": str, "image_folder": str, "settings": dict, "asked.annotations_sha256": str, "scores": dict},
    JUDGE: {"titles": list, "asked.model": str, "scores": dict},
}
_SCORE_FIELDS = {
    EVALUATE: _SCORE,
    JUDGE: {
        **dict.fromkeys(("first", "tie", "second", "unsure"), float),
        **{f"second_preferred.{name}": kind for name, kind in _SCORE.items()},
    },
}
# What is read of a line of predictions.jsonl and judgements.jsonl.
_LINE_FIELDS = {
    EVALUATE: {
        **dict.fromkeys(("image", "task", "question", "answer", "reference"), str),
        **{"text": str | None, "tokens": int | None, "stopped": bool | None, "problem": str | None},
    },
    JUDGE: {"image": str, "verdict": dict | None, "in_order": dict | None, "problem": str | None},
}
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
                self.lines = _read_lines(self._file, stage)
            except ValueError as error:
                raise UserError(
                    f"{self._file}: is damaged ({error}). Cut it off there, and the same command goes on, or "
                    "pass --overwrite to ask everything again"
                ) from error
        # None if the evaluation is not finished.
        self.metrics = _read_metrics(folder / METRICS, stage) if (folder / METRICS).is_file() else None

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
    if not output_dir.is_dir():
        check_output_dir(output_dir, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    advice = "Free some and start the same command again; answers are kept."
    with lock(output_dir), explain_full_disk(output_dir, advice):
        # Looked at under the lock: until then another process may have written it.
        if has_record := (output_dir / RUN_RECORD).is_file():
            # A model is not an evaluation; it is not emptied.
            before = _read_asked(output_dir, record["stage"])
        if has_record and not overwrite:
            _check_same(output_dir, before, record["asked"])
        else:
            check_output_dir(output_dir, overwrite)
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
            f"{folder}: was made with other settings ({'; '.join(changes)}). Choose another --output_dir, or pass "
            "--overwrite to replace it."
        )


def _read_asked(folder: Path, stage: str) -> dict:
    """What was asked of whom. Raises UserError if the folder is not one of this stage."""
    path = folder / RUN_RECORD
    advice = "Choose another folder; the answers in this one stay."
    record = read_json(path, advice)
    if record.get("stage") != stage:
        raise UserError(
            f"{folder}: is not an output_dir of {stage}.py ({path.name}: its stage is {record.get('stage')!r}); "
            "choose another folder"
        )
    check_fields(path, record, {"asked": dict}, advice)
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
    return folder, _read_metrics(folder / METRICS, EVALUATE)


def _read_metrics(path: Path, stage: str) -> dict:
    advice = f"Delete it, and the same {stage}.py command makes it anew."
    metrics = read_json(path, advice)
    check_fields(path, metrics, _METRICS_FIELDS[stage], advice)
    for score in metrics["scores"].values():
        check_fields(path, score, _SCORE_FIELDS[stage], advice)
    return metrics


def _read_lines(path: Path, stage: str) -> list[dict]:
    """The lines of a folder. Raises ValueError for one that this stage did not write."""
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        for name, kind in _LINE_FIELDS[stage].items():
            if not isinstance(line, dict) or not isinstance(line.get(name), kind):
                raise ValueError(f"line {number} has no {name} that {stage}.py wrote")
    return lines


def check_same_questions(name: str, asked: dict, other_name: str, other_asked: dict) -> None:
    """Raise UserError unless two evaluations, by what was `asked` of them, are of the same records."""
    if asked["annotations_sha256"] != other_asked["annotations_sha256"]:
        raise UserError(
            f"{name}: was asked other records than {other_name}; evaluate both models on the same --annotations"
        )
    if (limit := asked.get("limit")) != (other_limit := other_asked.get("limit")):
        raise UserError(
            f"{name}: was asked other records than {other_name} (--limit {limit} and {other_limit}); evaluate both "
            "models with the same --limit"
        )


def read_predictions(folder: Path) -> dict[tuple, Prediction]:
    """Those of a finished evaluation in their order, keyed by question. Raises UserError if they cannot be read."""
    predictions: dict[tuple, Prediction] = {}
    times: Counter[tuple] = Counter()
    try:
        for line in _read_lines(folder / PREDICTIONS, EVALUATE):
            question = (line["image"], line["question"], line["reference"])
            # A file may ask the same twice.
            predictions[(*question, times[question])] = Prediction.of_line(line)
            times[question] += 1
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PREDICTIONS}: cannot be read ({error}); evaluate the model anew") from error
    return predictions
