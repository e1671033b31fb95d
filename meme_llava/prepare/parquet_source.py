"""Data sets with an image column, on the Hugging Face hub or in parquet files, as image files and annotations.

Rows are streamed: neither the images nor the annotations are held in memory, only one row group of the parquet file
(100 or 1,000 rows in sets of the hub). The bytes of an image are written unchanged, under a name made of their sha256,
so equal images are stored once and a second run writes none again. Nothing about other sources.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from PIL import Image

from meme_llava.cli import setting
from meme_llava.dataset.conversation import is_blank
from meme_llava.dataset.image_files import ACCEPTED_FORMATS, START_LENGTH, identify_file_type
from meme_llava.dataset.images import PARSER_ERRORS, resolve_image_path
from meme_llava.errors import UserError, first_line
from meme_llava.prepare.writer import AnnotationWriter, DrawingSettings, make_record
from meme_llava.storage.files import hash_file, write_whole
from meme_llava.storage.proxy import check_proxy

ENDINGS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp"}
_ROWS_AT_ONCE = 32
_BYTES_AT_ONCE = 4 << 20
_FAILURES = (HTTPError, HfHubHTTPError, HFValidationError, OSError, ValueError, ImportError)

# What is known of the sets of the recipe's second version; of others, and where nothing stands, the split is train.
KNOWN = {
    "priyank-m/chinese_text_recognition": {},
    "SWHL/ChineseOCRBench": {"split": "test", "caption_column": "answers"},
    "fly0331/ChineseTest": {},
    "REILX/text-description-of-the-meme": {},
}
# Telling names of columns, in the order in which they are looked for.
_NAMES = {
    "image_column": ("image", "img", "jpg", "png"),
    "text_column": ("text", "ground_truth", "label", "transcription"),
    "caption_column": ("caption", "description", "answer", "answers", "content"),
    "question_column": ("question", "query"),
}


@dataclass(kw_only=True)
class ParquetSettings(DrawingSettings):
    dataset: list[str] = setting("hub id, a folder, or parquet files")
    images_to: str = setting("subfolder of the image folder that gets the images")
    split: str | None = setting("split to read (train; test for SWHL/ChineseOCRBench)", None)
    image_column: str | None = setting("column of images, if it is not found by itself", None)
    text_column: str | None = setting("column of the words in the image", None)
    caption_column: str | None = setting("column of answers, if not the words themselves", None)
    question_column: str | None = setting("column of questions; without it one is drawn", None)
    limit: int | None = setting("only the first N rows", None, expected="at least 1")


def prepare_parquet(settings: ParquetSettings) -> None:
    """A data set with an image column → image files and annotations."""
    folder, files = _make_folder(settings), _find_files(settings.dataset)
    dataset, names, facts = _open_dataset(settings, files)
    columns, name = _find_columns(settings, names), facts["dataset"]
    with AnnotationWriter(settings) as writer:
        count = 0
        for number, row in enumerate(_read_rows(dataset, settings)):
            count, place = number + 1, f"{name} row {number}"
            try:
                text, answer, question = _read_words(row, columns, writer.notes)
                image = _write_image(row[columns.image_column], folder, writer.notes)
            except ValueError as error:
                words = {column: value for column, value in row.items() if column != columns.image_column}
                writer.report_problem("row", place, str(error), words)
                continue
            record_id, source = f"{name.rpartition('/')[2]}_{number:06d}", {"set": name, "row": number}
            image = image.relative_to(settings.image_folder.resolve()).as_posix()
            writer.add(make_record(record_id, image, answer, source, settings.seed, text, question), place)
        writer.inputs += [{**facts, "rows": count}]
        writer.inputs += [{"file": str(path), "sha256": hash_file(path)} for path in files]
        # Images reach the disk before the annotations that name them.
        os.sync()
        writer.finish()


def _make_folder(settings: ParquetSettings) -> Path:
    try:
        folder = resolve_image_path(settings.images_to, settings.image_folder)
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise UserError(f"--images_to {settings.images_to}: must lie inside --image_folder ({error})") from error
    except OSError as error:
        raise UserError(f"--images_to {folder}: cannot be made ({error.strerror or error})") from error
    return folder


def _find_files(names: list[str]) -> list[Path]:
    """The parquet files of a set on this machine; none for a hub id."""
    first, *others = paths = [Path(name) for name in names]
    if first.exists():
        return [file for path in paths for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])]
    if others or names[0].count("/") != 1 or names[0].startswith((".", "/", "~")) or first.suffix == ".parquet":
        raise UserError(
            f"--dataset {first}: no such file or folder. Give parquet files, a folder of them, or one hub id such as "
            f"{', '.join(KNOWN)}."
        )
    return []


def _open_dataset(settings: ParquetSettings, files: list[Path]) -> tuple:
    """The set as datasets streams it, images as stored bytes; the names of its columns; facts for the manifest."""
    try:
        from datasets import load_dataset_builder
        from pyarrow.dataset import ParquetFragmentScanOptions
    except ImportError as error:
        raise UserError("reading data sets needs one more package: pip install -r data/requirements.txt") from error
    name, path = settings.dataset[0], Path(settings.dataset[0])
    facts = {"dataset": name, "split": settings.split or KNOWN.get(name, {}).get("split", "train")}
    with _explain_failure(name):
        if path.is_dir() and len(settings.dataset) == 1:
            facts["dataset"] = path.name
            builder = load_dataset_builder(name)
        elif path.exists():
            facts["dataset"] = path.stem
            builder = load_dataset_builder("parquet", data_files=[str(file) for file in files])
        else:
            check_proxy()
            facts["revision"] = HfApi().dataset_info(name).sha
            builder = load_dataset_builder(name, revision=facts["revision"])
        if hasattr(builder.config, "fragment_scan_options"):
            # By default all of a parquet file that was read so far stays in memory.
            builder.config.batch_size = _ROWS_AT_ONCE
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(
                pre_buffer=False, use_buffered_stream=True, buffer_size=_BYTES_AT_ONCE
            )
        dataset = builder.as_streaming_dataset(facts["split"]).decode(False)
        return dataset, list(dataset.features or next(iter(dataset), {})), facts


def _read_rows(dataset, settings: ParquetSettings) -> Iterator[dict]:
    with _explain_failure(settings.dataset[0]):
        yield from itertools.islice(dataset, settings.limit)


@contextlib.contextmanager
def _explain_failure(name: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = first_line(error)
        if Path(name).exists():
            raise UserError(f"{name}: cannot be read as parquet ({reason})") from error
        if type(error).__name__ in ("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"):
            raise UserError(f"{name}: no such data set, or it asks for a log-in (HF_TOKEN): {reason}") from error
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        offline = " HF_HUB_OFFLINE is set; unset it to download." if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{name}: reading it (downloads come from {endpoint}) failed: {reason}.{offline} Behind a slow "
            "or closed connection set HF_ENDPOINT to a mirror, or download its parquet files and give them to "
            "--dataset. Images already written are kept and not written again."
        ) from error


def _find_columns(settings: ParquetSettings, names: list[str]) -> ParquetSettings:
    """The settings with columns: those that the user gives, else those known of the set, else telling names.

    Args:
        names: all columns of the set.

    Raises:
        UserError: a given column is not there, or images or words are in none that can be told.
    """
    for flag in _NAMES:
        if getattr(settings, flag) not in (None, *names):
            raise UserError(f"--{flag} {getattr(settings, flag)}: the data set has the columns {', '.join(names)}")
    known = KNOWN.get(settings.dataset[0], {})
    likely = {flag: next((name for name in telling if name in names), None) for flag, telling in _NAMES.items()}
    likely |= known
    image, text = settings.image_column or likely["image_column"], settings.text_column
    caption, question = settings.caption_column, settings.question_column
    if text is None and caption is None:
        text = None if "caption_column" in known else likely["text_column"]
        caption = None if text else likely["caption_column"]
    if caption and question is None:
        question = likely["question_column"]
    if image is None and {"picName", "description"} <= set(names):
        raise UserError(
            f"{settings.dataset[0]}: holds captions without images. Download its .jsonl files and join them with "
            "the images of emo-visual-data and ChineseBQB: python data/prepare.py captions --captions …"
        )
    if image not in names or (text or caption) not in names:
        raise UserError(
            f"{settings.dataset[0]}: cannot tell which columns hold the images and the words; it has "
            f"{', '.join(names)}. Name them: --image_column and --text_column (the words in the image) or "
            "--caption_column (any other answer)."
        )
    return replace(settings, image_column=image, text_column=text, caption_column=caption, question_column=question)


def _read_words(row: dict, columns: ParquetSettings, notes: Counter) -> tuple[str | None, str, str]:
    """Text, answer and question of a row. Raises ValueError with the reason."""
    text = _read_text(row, columns.text_column) if columns.text_column else None
    answer = text
    if column := columns.caption_column:
        if isinstance(row[column], list):
            notes["rows with further answers, of which the first was taken"] += len(row[column]) > 1
            row = {**row, column: (row[column] or [""])[0]}
        answer = _read_text(row, column)
    if is_blank(answer or ""):
        raise ValueError(f"{columns.caption_column or columns.text_column} is empty")
    return text, answer, _read_text(row, columns.question_column) if columns.question_column else ""


def _read_text(row: dict, column: str) -> str:
    """The words in a column, without white space around them."""
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, expected text")
    text = (value or "").strip()
    if column == "ground_truth" and text.startswith("{"):
        # ChineseTest's is JSON, as synthetic documents for Donut have it.
        try:
            text = json.loads(text)["gt_parse"]["text_sequence"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{column} has no gt_parse.text_sequence: {text[:200]}") from error
    return text


def _write_image(value, folder: Path, notes: Counter) -> Path:
    """Store the bytes of an image. Raises ValueError with the reason."""
    # A path beside the bytes is not followed: it would be a file of this machine that a stranger's row names.
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise ValueError(f"has no image ({type(data).__name__} in place of bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS) as image:
            ending = ENDINGS[image.format.replace("MPO", "JPEG")]  # a phone's JPEG with a preview behind it
    except PARSER_ERRORS as error:
        raise ValueError(f"the image is {identify_file_type(data[:START_LENGTH])[1]}") from error
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
    if path.exists() and path.read_bytes() == data:
        notes["rows whose image was stored already"] += 1
    else:
        write_whole(path, data, fsync=False)
        notes["images written"] += 1
    return path
