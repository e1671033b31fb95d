"""Sources whose captions stand in files of their own and are joined with images by name.

These are the recipe's caption files (JSONL of picName and description), emo-visual-data's own data.json or CSV
(filename and content), and any CSV or JSONL table. Captions of one image stay adjacent and share its `image`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from meme_llava.cli import describe
from meme_llava.dataset.inspection import normalise_text
from meme_llava.errors import UserError
from meme_llava.prepare.file_name_text import read_bqb_name
from meme_llava.prepare.image_index import FoundImage, ImageIndex
from meme_llava.prepare.row_files import Row, read_csv_rows, read_json_rows, read_table_rows
from meme_llava.prepare.writer import AnnotationWriter, DrawingSettings, UniqueIds, check_not_input, finish, make_record

IMAGES_HELP = "subfolders of the image folder with the images, searched recursively"


@dataclass(kw_only=True)
class CaptionsSettings(DrawingSettings):
    captions: list[Path] = field(metadata=describe("JSONL files of {picName, description}"))
    images: list[str] = field(metadata=describe(IMAGES_HELP))
    annotators: list[str] = field(
        default_factory=list, metadata=describe("a name for each file of --captions; without it, the file's own")
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        if self.annotators and len(self.annotators) != len(self.captions):
            raise UserError(
                f"--annotators has {len(self.annotators)} names, --captions {len(self.captions)} files; give one each"
            )


@dataclass(kw_only=True)
class EmoVisualSettings(DrawingSettings):
    data: list[Path] = field(metadata=describe("data.json or data.csv of emo-visual-data"))
    images: list[str] = field(metadata=describe(IMAGES_HELP))


@dataclass(kw_only=True)
class TableSettings(DrawingSettings):
    table: Path = field(metadata=describe("CSV or TSV with a first line of column names, or JSONL, or a JSON array"))
    images: list[str] = field(metadata=describe(IMAGES_HELP))
    image_column: str = field(metadata=describe("column of file names, or paths inside --images"))
    caption_column: str = field(metadata=describe("column of answers"))
    text_column: str | None = field(
        default=None, metadata=describe("column of the words in the image; empty where there are none")
    )
    question_column: str | None = field(
        default=None, metadata=describe("column of questions; without it, or where empty, a wording is drawn")
    )
    annotator: str | None = field(
        default=None, metadata=describe("who wrote the captions; without it, the file's name")
    )


@dataclass(frozen=True)
class Caption:
    """A caption as a file has it. `text`: the words in the image, None if unknown; `question`: empty to draw one."""

    row: Row
    annotator: str
    image: str
    answer: str
    text: str | None = None
    question: str = ""


def prepare_captions(settings: CaptionsSettings) -> None:
    """The recipe's caption files → annotations."""
    annotators = settings.annotators or [path.stem for path in settings.captions]
    with _open(settings, settings.captions) as (writer, joiner):
        for path, annotator in zip(settings.captions, annotators, strict=True):
            rows = list(read_json_rows(path))
            last = _find_last_lines(rows)
            joiner.join(path, (_parse_caption(row, annotator, last) for row in rows))
        joiner.write()
        finish(writer)


def prepare_emo_visual(settings: EmoVisualSettings) -> None:
    """emo-visual-data's own descriptions → annotations."""
    with _open(settings, settings.data) as (writer, joiner):
        for path in settings.data:
            is_csv = path.suffix.lower() == ".csv"
            rows = read_csv_rows(path) if is_csv else read_json_rows(path)
            parse = _parse_emo_cells if is_csv else _parse_emo_object
            joiner.join(path, (parse(row, f"emo-visual-data {path.stem}") for row in rows))
        joiner.write()
        finish(writer)


def prepare_table(settings: TableSettings) -> None:
    """Any table of captions → annotations."""
    columns = [settings.image_column, settings.caption_column, settings.text_column, settings.question_column]
    columns = [column for column in columns if column is not None]
    with _open(settings, [settings.table]) as (writer, joiner):
        rows = read_table_rows(settings.table, columns)
        joiner.join(settings.table, (_parse_table_row(row, settings) for row in rows))
        joiner.write()
        finish(writer)


@contextlib.contextmanager
def _open(settings: DrawingSettings, inputs: list[Path]) -> Iterator[tuple[AnnotationWriter, "_Joiner"]]:
    """The writer of a run, and what joins its captions with images."""
    check_not_input([settings.output], inputs)
    index = ImageIndex(settings.image_folder, settings.images)
    with AnnotationWriter(settings) as writer:
        yield writer, _Joiner(writer, index, settings.seed)


class _Joiner:
    """Joins captions with images and keeps the captions of an image together."""

    def __init__(self, writer: AnnotationWriter, index: ImageIndex, seed: int):
        self._writer, self._index, self._seed = writer, index, seed
        self._ids = UniqueIds()
        self._records = {}  # image: {what makes a caption the same: (record, place)}
        self._asked, self._missing = 0, 0

    def join(self, path: Path, captions: Iterator["Caption | _Refused"]) -> None:
        """Take in the captions of one file."""
        rows = 0
        for caption in captions:
            rows += 1
            if isinstance(caption, _Refused):
                row = caption.row
                report = self._writer.report_problem if caption.is_problem else self._writer.leave_out
                report(caption.kind, row.place, caption.reason, row.original)
                continue
            self._asked += 1
            try:
                image = self._index.find(caption.image)
            except ValueError as error:
                self._missing += 1
                self._writer.report_problem(
                    "missing or ambiguous image", caption.row.place, str(error), caption.row.original
                )
                continue
            self._take(caption, image)
        self._writer.note_input(path, rows)
        if self._missing > self._asked / 2:
            self._writer.hint = (
                f"{self._missing:,} of {self._asked:,} captions found no image among the {self._index.count:,} in "
                f"{', '.join(str(self._index.image_folder / folder) for folder in self._index.subfolders)}: are "
                "--image_folder and --images the folders of these captions' images, unpacked in full?"
            )

    def _take(self, caption: Caption, image: FoundImage) -> None:
        position = {"file": caption.row.file, **caption.row.position}
        source = {"set": image.data_set, "annotator": caption.annotator, **position}
        if image.image not in self._records and image.copies:
            self._writer.notes["images that lie at several places with equal bytes"] += 1
        records = self._records.setdefault(image.image, {})
        # Captions of emoji alone normalise to nothing, and are not all the same.
        same = (normalise_text(caption.answer) or caption.answer, caption.question)
        if same in records:
            records[same][0]["sources"].append(source)
            self._writer.notes["captions that repeat another of the same image, joined with it"] += 1
            return
        stem = PurePosixPath(image.image).stem
        text = read_bqb_name(stem) if caption.text is None else caption.text
        record_id = self._ids.take(f"{stem}_{caption.annotator}")
        record = make_record(
            record_id, image.image, caption.answer, source, self._seed, text=text, question=caption.question
        )
        records[same] = (record, caption.row.place)

    def write(self) -> None:
        """Write all records, images in the order in which they were first named."""
        for records in self._records.values():
            for record, place in records.values():
                self._writer.add(record, place)


@dataclass(frozen=True)
class _Refused:
    row: Row
    kind: str
    reason: str
    is_problem: bool = True


def _find_last_lines(rows: list[Row]) -> dict[str, dict]:
    """Where data/describe.py wrote last about each image; its lines hold the image's sha256."""
    return {
        str(row.value.get("picName")): row.position
        for row in rows
        if isinstance(row.value, dict) and "sha256" in row.value
    }


def _parse_caption(row: Row, annotator: str, last_lines: dict[str, dict]) -> Caption | _Refused:
    if refused := _refuse_broken(row, ("picName",)):
        return refused
    name = row.value["picName"]
    if "sha256" in row.value and row.position != last_lines[str(name)]:
        # The image changed, or was asked about again after it had been set aside.
        return _Refused(row, "described again later", f"{name}: a later line counts", is_problem=False)
    if "set_aside" in row.value:
        # data/describe.py writes such lines for images that no model described.
        return _Refused(row, "set aside by describe.py", f"{name}: {row.value['set_aside']}", is_problem=False)
    return _make_caption(row, annotator, name, row.value.get("description"), "description")


def _parse_emo_object(row: Row, annotator: str) -> Caption | _Refused:
    if refused := _refuse_broken(row, ("filename", "content")):
        return refused
    return _make_caption(row, annotator, row.value["filename"], row.value["content"], "content")


def _parse_emo_cells(row: Row, annotator: str) -> Caption | _Refused:
    # data.csv has no line of column names, and writes a line break inside a description as \n.
    if len(row.value) < 2:
        return _Refused(row, "broken row", f"has 1 cell, expected a file name and a description: {row.value}")
    content = ",".join(row.value[1:]).replace("\\n", "\n")
    return _make_caption(row, annotator, row.value[0].strip(), content, "description")


def _parse_table_row(row: Row, settings: TableSettings) -> Caption | _Refused:
    if refused := _refuse_broken(row, (settings.image_column, settings.caption_column)):
        return refused
    text = row.value.get(settings.text_column) if settings.text_column else None
    question = row.value.get(settings.question_column) if settings.question_column else None
    for column, value in ((settings.text_column, text), (settings.question_column, question)):
        if value is not None and not isinstance(value, str):
            return _Refused(row, "broken row", f"{column} is {value!r}, expected text")
    caption = _make_caption(
        row,
        settings.annotator or settings.table.stem,
        row.value[settings.image_column],
        row.value[settings.caption_column],
        settings.caption_column,
    )
    if isinstance(caption, _Refused):
        return caption
    text = text if text is None else text.strip()
    return Caption(row, caption.annotator, caption.image, caption.answer, text, (question or "").strip())


def _refuse_broken(row: Row, keys: tuple[str, ...]) -> _Refused | None:
    if isinstance(row.value, ValueError):
        return _Refused(row, "broken row", str(row.value))
    if not isinstance(row.value, dict):
        return _Refused(row, "broken row", f"is {type(row.value).__name__}, expected an object with {', '.join(keys)}")
    if missing := [key for key in keys if key not in row.value]:
        return _Refused(row, "broken row", f"has no {', '.join(missing)} (keys: {', '.join(row.value)})")
    return None


def _make_caption(row: Row, annotator: str, image, answer, key: str) -> Caption | _Refused:
    if not isinstance(image, str) or not image.strip():
        return _Refused(row, "broken row", f"the image is {image!r}, expected a file name")
    if answer is None or answer == "" or isinstance(answer, str) and not answer.strip():
        return _Refused(row, "no caption", f"{image}: {key} is empty")
    if not isinstance(answer, str):
        return _Refused(row, "broken row", f"{image}: {key} is {answer!r}, expected text")
    return Caption(row, annotator, image.strip(), answer.strip())
