"""Knows what may stand in the annotation file, and what happens to a record that cannot be trained on.

Nothing is dropped or replaced silently: every unusable record is listed with its place and reason before training.
(A picture whose header is sound but whose body is damaged stops the run when it is reached, and is named then.)
Knows nothing about batches or models.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from meme_llava.conversation import IMAGE_PLACEHOLDER, ConversationEncoder, Turn
from meme_llava.errors import UserError
from meme_llava.images import ImagePolicy, check_image, open_image, resolve_image_path, to_pixel_values

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
FORMAT_HELP = "See data/README.md for the record format."
# A list of a hundred thousand problems helps nobody; the count is always given in full.
MAX_LISTED_PROBLEMS = 50


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more pictures. `place` says where it stands, for messages."""

    record_id: str
    place: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Problem:
    """A record that cannot be trained on, and why."""

    place: str
    record_id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place} (id {self.record_id!r}): {self.reason}"


@dataclass(frozen=True)
class _Encoded:
    record: Record
    image_paths: tuple[Path, ...]
    input_ids: np.ndarray  # int32 (length,)
    labels: np.ndarray  # int32 (length,)


def read_records(annotations: Path) -> tuple[list[Record], list[Problem]]:
    """Read a JSON array or a JSONL file of LLaVA-style records.

    Returns the well-formed records and one problem for every other record.

    Raises:
        UserError: the file is missing, not UTF-8, or is no JSON array / JSONL.
    """
    records, problems = [], []
    for place, value in _iterate_json(annotations):
        if isinstance(value, Exception):
            problems.append(Problem(place, "?", str(value)))
            continue
        record_id = str(value.get("id", "?")) if isinstance(value, dict) else "?"
        try:
            records.append(parse_record(value, place))
        except ValueError as error:
            problems.append(Problem(place, record_id, str(error)))
    return records, problems


def parse_record(value, place: str) -> Record:
    """Check one record's structure. Raises ValueError with the reason."""
    if not isinstance(value, dict):
        raise ValueError(f"is {type(value).__name__}, expected an object. {FORMAT_HELP}")
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"'image' is {images!r}, expected a file name, a list of file names, or no 'image' at all")
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f"has no list 'conversations' (keys: {', '.join(map(str, value))}). {FORMAT_HELP}")
    turns = tuple(_parse_turn(turn, index) for index, turn in enumerate(conversations))
    _check_turn_order(turns)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise ValueError(
            f"has {len(images)} image(s) but {placeholders} {IMAGE_PLACEHOLDER} in its human turns; write one "
            f"{IMAGE_PLACEHOLDER} for every image"
        )
    return Record(str(value.get("id", place)), place, tuple(images), turns)


def _parse_turn(turn, index: int) -> Turn:
    where = f"conversations[{index}]"
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise ValueError(f"{where} is {turn!r}, expected an object with 'from' and 'value'")
    if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
        raise ValueError(f"{where}.from is {turn['from']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(turn["value"], str) or not turn["value"].strip():
        raise ValueError(f"{where}.value is {turn['value']!r}, expected text")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair (a cut emoji); no tokenizer takes it.
        raise ValueError(f"{where}.value holds half a character: {error.object[error.start : error.end]!r}") from error
    return Turn(ROLES[turn["from"]], turn["value"])


def _check_turn_order(turns: tuple[Turn, ...]) -> None:
    dialogue = [turn.role for turn in turns[1:]] if turns[0].role == "system" else [turn.role for turn in turns]
    expected = ["user", "assistant"] * (len(dialogue) // 2)
    if not dialogue or dialogue != expected:
        raise ValueError(
            "'conversations' must alternate human, gpt, human, gpt … and end with gpt (one system turn may come first)"
        )


def _iterate_json(annotations: Path) -> Iterator[tuple[str, object]]:
    try:
        # Excel and Notepad put a byte order mark in front; utf-8-sig takes the file either way.
        text = annotations.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{annotations}: {error.strerror or error}. Is the path to the annotations right?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{annotations}: not UTF-8 ({error}). Convert it, e.g. iconv -f GB18030 -t UTF-8.") from error
    if annotations.suffix == ".jsonl":
        # str.splitlines would also break at U+2028 and other characters that may stand inside a caption.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"{annotations.name} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{annotations.name} line {number}", ValueError(f"is not JSON ({error})")
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        around = text[max(error.pos - 20, 0) : error.pos + 20]
        raise UserError(f"{annotations}: not JSON at line {error.lineno} column {error.colno}: {around!r}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{annotations}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise UserError(
            f"{annotations}: is a JSON {type(values).__name__}, expected an array of records. {FORMAT_HELP}"
        )
    for index, value in enumerate(values):
        yield f"{annotations.name} record {index}", value


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class MemeDataset(Dataset):
    """Records as token ids, pictures decoded when asked for.

    An item is {"record_id", "input_ids" int64 (length,), "labels" int64 (length,), "pixel_values" float32
    (images, 3, size, size)}.
    """

    def __init__(self, encoded: list[_Encoded], image_policy: ImagePolicy):
        self._encoded = encoded
        self._image_policy = image_policy

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict:
        item = self._encoded[index]
        size = self._image_policy.size
        try:
            pictures = [to_pixel_values(open_image(path), self._image_policy) for path in item.image_paths]
        except ValueError as error:
            # Replacing the record would change the data order without a word, so the run stops and names it.
            raise UserError(f"{item.record.place} (id {item.record.record_id!r}): {error}") from error
        return {
            "record_id": item.record.record_id,
            "input_ids": torch.from_numpy(item.input_ids).long(),
            "labels": torch.from_numpy(item.labels).long(),
            "pixel_values": torch.stack(pictures) if pictures else torch.empty(0, 3, size, size),
        }

    @property
    def lengths(self) -> np.ndarray:
        """Positions of every record, image tokens counted: int64 (records,)."""
        return np.array([len(item.input_ids) for item in self._encoded])

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Positions that carry loss in every record: int64 (records,)."""
        return np.array([int((item.labels >= 0).sum()) for item in self._encoded])

    @property
    def image_counts(self) -> np.ndarray:
        """Pictures of every record: int64 (records,)."""
        return np.array([len(item.image_paths) for item in self._encoded])


@dataclass(frozen=True)
class LoadedData:
    """The records that train, the problems of those that do not, and how many answers were cut to length."""

    dataset: MemeDataset
    problems: list[Problem]
    cut_records: list[str]


def check_image_folder(image_folder: Path) -> None:
    """Raise UserError unless the folder exists."""
    if not image_folder.is_dir():
        raise UserError(f"{image_folder}: no such image folder")


def find_images(record: Record, image_folder: Path) -> tuple[Path, ...]:
    """The record's picture files. Raises ValueError for a path that is no picture inside the image folder."""
    paths = tuple(resolve_image_path(image, image_folder) for image in record.images)
    for path in paths:
        check_image(path)
    return paths


def report_problems(annotations: Path, usable: int, problems: list[Problem], bad_records: str) -> None:
    """Sort the problems as the file has them, and stop where there may be none or nothing else is left.

    Raises:
        UserError: listing the problems.
    """
    problems.sort(key=lambda problem: int(problem.place.rsplit(" ", 1)[1]))
    listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED_PROBLEMS])
    more = f"\n  … and {len(problems) - MAX_LISTED_PROBLEMS} more" if len(problems) > MAX_LISTED_PROBLEMS else ""
    if problems and bad_records == "error":
        raise UserError(
            f"{annotations}: {len(problems)} of {usable + len(problems)} records cannot "
            f"be trained on:\n{listed}{more}\nMend them, or pass --bad_records quarantine to train without them."
        )
    if not usable:
        why = f"; all {len(problems)} are unusable:\n{listed}{more}" if problems else ""
        raise UserError(f"{annotations}: no record to train on{why}")


def load_dataset(
    annotations: Path,
    image_folder: Path,
    encoder: ConversationEncoder,
    image_policy: ImagePolicy,
    max_length: int,
    bad_records: str,
) -> LoadedData:
    """Read, check and encode every record before anything is trained.

    Args:
        max_length: positions a record may take, image tokens counted.
        bad_records: "error" stops on any unusable record; "quarantine" leaves them out and returns them as problems.

    Raises:
        UserError: a record is unusable under "error" (all of them are listed), or nothing is left.
    """
    check_image_folder(image_folder)
    records, problems = read_records(annotations)
    encoded, cut_records = [], []
    for record in records:
        try:
            paths = find_images(record, image_folder)
            example = encoder.encode_example(list(record.turns), max_length)
        except ValueError as error:
            problems.append(Problem(record.place, record.record_id, str(error)))
            continue
        if example.cut_tokens:
            cut_records.append(f"{record.place} (id {record.record_id!r}): {example.cut_tokens} positions cut")
        input_ids, labels = np.array(example.input_ids, np.int32), np.array(example.labels, np.int32)
        encoded.append(_Encoded(record, paths, input_ids, labels))
    report_problems(annotations, len(encoded), problems, bad_records)
    return LoadedData(MemeDataset(encoded, image_policy), problems, cut_records)


class ShuffledEpochs(Dataset):
    """The records in the order of training: one shuffled pass after another, cut at `length` examples.

    The order depends on seed and position alone, so it is the same for every number of processes and after a resume,
    and no record is dropped at the end of a pass: the last optimizer step is filled from the next pass.
    """

    def __init__(self, dataset: MemeDataset, length: int, seed: int):
        self._dataset = dataset
        passes = -(-length // len(dataset))
        orders = [np.random.default_rng([seed, number]).permutation(len(dataset)) for number in range(passes)]
        self.order = np.concatenate(orders)[:length]  # int64 (length,)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        return self._dataset[int(self.order[index])]
