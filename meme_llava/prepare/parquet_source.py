"""Data sets with an image column, on the Hugging Face hub or in parquet files, as image files and annotations.

Rows are streamed: neither the images nor the annotations are held in memory, only one row group of the parquet file
(100 or 1,000 rows in sets of the hub). The bytes of an image are written unchanged, under a name made of their sha256,
so equal images are stored once and a second run writes none again. Nothing about other sources.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from PIL import Image

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.images import (
    ACCEPTED_FORMATS,
    PARSER_ERRORS,
    START_LENGTH,
    identify_file_type,
    resolve_image_path,
)
from meme_llava.errors import UserError
from meme_llava.prepare.parquet_columns import PRESETS, Columns, Preset, find_columns, read_text
from meme_llava.prepare.writer import AnnotationWriter, DrawingSettings, finish, make_record
from meme_llava.storage.files import hash_file, write_whole

ENDINGS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp"}
_ROWS_AT_ONCE = 32
_BYTES_AT_ONCE = 4 << 20
_FAILURES = (HTTPError, HfHubHTTPError, HFValidationError, OSError, ValueError)


@dataclass(kw_only=True)
class ParquetSettings(DrawingSettings):
    dataset: list[str] = field(metadata=describe("hub id, a folder, or parquet files"))
    images_to: str = field(metadata=describe("subfolder of the image folder that gets the images"))
    split: str | None = field(default=None, metadata=describe("split to read (train; test for SWHL/ChineseOCRBench)"))
    image_column: str | None = field(default=None, metadata=describe("column of images, if it is not found by itself"))
    text_column: str | None = field(default=None, metadata=describe("column of the words in the image"))
    caption_column: str | None = field(
        default=None, metadata=describe("column of answers, if not the words themselves")
    )
    question_column: str | None = field(default=None, metadata=describe("column of questions; without it one is drawn"))
    limit: int | None = field(default=None, metadata=describe("only the first N rows"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "limit", self.limit is None or self.limit >= 1, "at least 1")


def prepare_parquet(settings: ParquetSettings) -> None:
    """A data set with an image column → image files and annotations."""
    folder = _make_folder(settings)
    rows = _open_rows(settings)
    with AnnotationWriter(settings) as writer:
        given = Columns(settings.image_column, settings.text_column, settings.caption_column, settings.question_column)
        columns = find_columns(given, settings.dataset[0], rows.column_names)
        reader = _RowReader(settings, columns, rows.name, folder)
        count = 0
        for count, row in enumerate(rows, start=1):
            place = f"{rows.name} row {count - 1}"
            try:
                record = reader.read(row, count - 1)
            except ValueError as error:
                original = {name: value for name, value in row.items() if name != columns.image}
                writer.report_problem("row", place, str(error), original)
                continue
            writer.add(record, place)
        writer.notes.update(reader.notes)
        writer.inputs += rows.describe(count)
        # Images reach the disk before the annotations that name them.
        os.sync()
        finish(writer)


class _Rows:
    """The rows of the data set, images as stored bytes."""

    def __init__(self, dataset, name: str, files: list[Path], facts: dict, limit: int | None):
        self._dataset, self.name, self._files, self._facts, self._limit = dataset, name, files, facts, limit
        self.column_names = list(dataset.features or next(iter(dataset), {}))

    def __iter__(self) -> Iterator[dict]:
        with _explain_failure(self.name, bool(self._files)):
            yield from self._dataset if self._limit is None else self._dataset.take(self._limit)

    def describe(self, rows: int) -> list[dict]:
        """The inputs as the manifest lists them."""
        files = [{"file": str(path), "sha256": hash_file(path)} for path in self._files]
        return [{"dataset": self.name, **self._facts, "rows": rows}, *files]


class _RowReader:
    """Turns rows into records and writes their images."""

    def __init__(self, settings: ParquetSettings, columns: Columns, name: str, folder: Path):
        self._settings, self._columns, self._folder = settings, columns, folder
        self._set = name
        self.notes = {}
        self._written = 0

    def read(self, row: dict, number: int) -> dict:
        """The record of one row. Raises ValueError with the reason."""
        text = read_text(row, self._columns.text) if self._columns.text else None
        answer = self._read_caption(row) if self._columns.caption else text
        if not answer:
            raise ValueError(f"{self._columns.caption or self._columns.text} is empty")
        question = read_text(row, self._columns.question) if self._columns.question else ""
        image = self._write_image(row[self._columns.image])
        source = {"set": self._set, "row": number}
        record_id = f"{self._set.rpartition('/')[2]}_{number:06d}"
        return make_record(record_id, image, answer, source, self._settings.seed, text=text, question=question)

    def _read_caption(self, row: dict) -> str:
        value = row[self._columns.caption]
        if isinstance(value, list):
            if len(value) > 1:
                self._note("rows with further answers, of which the first was taken")
            value = value[0] if value else ""
        return read_text({self._columns.caption: value}, self._columns.caption)

    def _write_image(self, value) -> str:
        data = _read_bytes(value)
        path = self._folder / f"{hashlib.sha256(data).hexdigest()[:16]}.{_find_ending(data)}"
        if path.exists() and path.read_bytes() == data:
            self._note("rows whose image was stored already")
        else:
            write_whole(path, data, fsync=False)
            self._note("images written")
        return path.relative_to(self._settings.image_folder.resolve()).as_posix()

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1


def _make_folder(settings: ParquetSettings) -> Path:
    try:
        folder = resolve_image_path(settings.images_to, settings.image_folder)
    except ValueError as error:
        raise UserError(f"--images_to {settings.images_to}: must lie inside --image_folder ({error})") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--images_to {folder}: cannot be made ({error.strerror or error})") from error
    return folder


def _open_rows(settings: ParquetSettings) -> _Rows:
    try:
        from datasets import Features, load_dataset_builder
        from datasets.exceptions import DatasetNotFoundError
        from datasets.features import Image as ImageFeature
    except ImportError as error:
        raise UserError("reading data sets needs one more package: pip install -r data/requirements.txt") from error
    first = Path(settings.dataset[0])
    split = settings.split or PRESETS.get(settings.dataset[0], Preset("train")).split
    files, facts = [], {"split": split}
    if first.exists():
        files = _list_files(settings.dataset)
        name = first.name if first.is_dir() else first.stem
        source, options = (str(first), {}) if first.is_dir() else ("parquet", {"data_files": [str(f) for f in files]})
    else:
        name = _check_hub_id(settings.dataset)
        source, options = name, {}
    with _explain_failure(name, bool(files)):
        try:
            if not files:
                facts["revision"] = options["revision"] = HfApi().dataset_info(name).sha
            builder = load_dataset_builder(source, **options)
            _bound_memory(builder.config)
            dataset = builder.as_streaming_dataset(split)
        except DatasetNotFoundError as error:
            raise UserError(f"{name}: no such data set, or it asks for a log-in (HF_TOKEN): {error}") from error
        dataset = dataset if dataset.features else dataset._resolve_features()
    stored = {
        column: ImageFeature(decode=False) if isinstance(feature, ImageFeature) else feature
        for column, feature in (dataset.features or {}).items()
    }
    dataset = dataset.cast(Features(stored)) if stored != dataset.features else dataset
    return _Rows(dataset, name, files, facts, settings.limit)


def _bound_memory(config) -> None:
    """Have parquet read in small pieces; by default all of a file that was read so far stays in memory."""
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from pyarrow.dataset import ParquetFragmentScanOptions

    if isinstance(config, ParquetConfig):
        config.batch_size = _ROWS_AT_ONCE
        config.fragment_scan_options = ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True, buffer_size=_BYTES_AT_ONCE
        )


def _list_files(names: list[str]) -> list[Path]:
    paths = [Path(name) for name in names]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UserError(f"--dataset {missing[0]}: no such file or folder")
    if paths[0].is_dir():
        if len(paths) > 1:
            raise UserError("--dataset: give one folder, or parquet files")
        files = sorted(paths[0].rglob("*.parquet"))
        if not files:
            raise UserError(f"--dataset {paths[0]}: no .parquet file in it")
        return files
    if wrong := [str(path) for path in paths if path.suffix != ".parquet"]:
        raise UserError(f"--dataset {wrong[0]}: expected a .parquet file")
    return paths


def _check_hub_id(names: list[str]) -> str:
    name = names[0]
    if len(names) > 1 or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".parquet"):
        raise UserError(
            f"--dataset {name}: no such file or folder. Give parquet files, a folder of them, or one hub id such as "
            f"{', '.join(PRESETS)}."
        )
    return name


@contextlib.contextmanager
def _explain_failure(name: str, is_local: bool) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if is_local:
            raise UserError(f"{name}: cannot be read as parquet ({_first_line(error)})") from error
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        offline = " HF_HUB_OFFLINE is set; unset it to download." if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{name}: reading it (downloads come from {endpoint}) failed: {_first_line(error)}.{offline} Behind a slow "
            "or closed connection set HF_ENDPOINT to a mirror, or download its parquet files and give them to "
            "--dataset. Images already written are kept and not written again."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_bytes(value) -> bytes:
    if isinstance(value, dict):
        # A path beside it is not followed: it would be a file of this machine that a stranger's row names.
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise ValueError(f"has no image ({type(value).__name__} in place of bytes)")
    return value


def _find_ending(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS) as image:
            return ENDINGS[image.format.replace("MPO", "JPEG")]  # a phone's JPEG with a preview behind it
    except PARSER_ERRORS as error:
        _, what = identify_file_type(data[:START_LENGTH], ACCEPTED_FORMATS)
        raise ValueError(f"the image is {what}") from error
