"""What sources are read from: rows of JSON, JSONL and CSV files, each with its place, and images found by their names.

A broken row goes to the writer and never stops the file. The readers of datasets, pandas and pyarrow lose what is
needed here: JSON stops at the first broken row, in CSV rows with a cell too many are shifted or skipped without their
number, and a cell that says NA becomes nothing.
"""

import csv
import difflib
import functools
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from unicodedata import normalize

from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.image_files import find_images
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import normalise_text
from meme_llava.dataset.records import Record, iterate_values, parse_record
from meme_llava.dataset.user_files import check_file_names, read_text
from meme_llava.errors import UserError, count
from meme_llava.prepare.writer import AnnotationWriter, ImagesSettings
from meme_llava.storage.files import hash_file

# Kinds of problems.
BROKEN = "broken row"
NO_IMAGE = "missing or ambiguous image"
# Looking for the nearest of 10,000 names takes half a second.
_SUGGESTIONS = 50
# Words in file names have two customs: ChineseBQB's (滑稽大佬00109-少来这套.jpg) and names that are the text
# (有点意思，说下去.jpg). ChineseBQB numbers in five digits (six or seven by mistake), in front of the figure's name or
# behind it. A dash stands before the text, mostly.
_BQB = re.compile(
    r"(?:\d{5}(?!\d)[^\d-][^-]*-|\D*[^\d-]\d{5,7}-|\D*[^\d-]\d{5}(?=[\u4e00-\u9fff]))(?P<text>.+)", re.DOTALL
)
_HEX_NAME = re.compile(r"\{?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\}?(_\d+)?|(v\d-)?[0-9a-f]{12,}(_\w+)?", re.I)
_CAMERA_NAME = re.compile(
    r"(QQ|微信|TIM|WeChat|WX)?(图片|截图|截屏|屏幕截图|屏幕快照|视频)[\s_-]*[\d\s_.:-]*(\(\d+\))?"
    r"|[A-Za-z]*(Screenshot|Screen Shot|screen)[\sA-Za-z_-]*[\d\s_.,:-]*"
    # A word and two digits or more: IMG_1234, mmexport1598326112, CuteGirl00191; dates and bare long numbers.
    r"|[A-Za-z]+[\s_-]?\d{2,}([\s_-][A-Za-z0-9]+)?|(?!(?P<digit>\d)(?P=digit)+$)\d{5,}|[\d\s_.-]*\d{4}[\d\s_.-]*[_.-][\d\s_.-]*",
    re.I,
)
# QQ saves under 22 random characters such as J42XKP6JDI[6U{S@99ULQ2R.
_RANDOM_NAME = re.compile(r"(?=[^\s]{16,}$)(?=.*\d)(?=.*[A-Z])[A-Z0-9\[\]{}()@$%&~`^!'+=_.,;-]+", re.I)
_COPY_NUMBER = re.compile(r"\s*[(（]\d+[)）]$")


class Row(NamedTuple):
    """A value of a file. `position` is {"file": name, "line": n} counted from 1, or "row": n of an array from 0."""

    position: dict
    value: Any

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        (_, file), (unit, number) = self.position.items()
        return f"{file} {unit} {number}"


def read_json_rows(path: Path, writer: AnnotationWriter, kind: str = BROKEN) -> Iterator[Row]:
    """The values of a JSONL file (its name ends in .jsonl) or a JSON array, which becomes an input of `writer`.

    Args:
        kind: what lines that are not JSON are counted as.

    Raises:
        UserError: the file is missing, not UTF-8, or no JSON array.
    """
    for place, value in writer.note_input(path, iterate_values(path)):
        *_, unit, number = place.split(" ")
        row = Row({"file": path.name, "line" if unit == "line" else "row": int(number)}, value)
        if isinstance(value, RecordFault):
            writer.report_problem(kind, row.place, str(value), value.content)
        else:
            yield row


def read_record_rows(path: Path, writer: AnnotationWriter) -> Iterator[tuple[Row, Record]]:
    """The records of an annotation file, as they stand there and parsed; what is none goes to `writer`."""
    for row in read_json_rows(path, writer, "not a record"):
        try:
            record = parse_record(row.value, row.place)
        except RecordFault as fault:
            writer.report_problem("not a record", row.place, str(fault), row.value)
            continue
        if record.stray_image:
            writer.notes["records that seem to show an image that is not under 'image' (data/check.py names them)"] += 1
        yield row, record


def read_csv_rows(path: Path) -> Iterator[Row]:
    """The cells of every row of a CSV file (tab-separated if its name ends in .tsv), header included, as lists.

    Raises:
        UserError: the file is missing, not UTF-8, or its quotes are broken.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    # The module's limit of 131,072 characters a cell is meant for guarding memory; the file is in memory already.
    csv.field_size_limit(2**31 - 1)
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield Row({"file": path.name, "line": start}, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error})") from error


def read_table_rows(path: Path, writer: AnnotationWriter, columns: list[str | None]) -> Iterator[Row]:
    """The rows of a CSV, TSV, JSONL or JSON table, as {column: value}. The file becomes an input of `writer`.

    Raises:
        UserError: a CSV lacks one of the columns or has it twice, or the file cannot be read.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from read_json_rows(path, writer)
        return
    rows = read_csv_rows(path)
    names = [name.strip() for name in next(rows, Row({}, [])).value]
    if missing := [column for column in columns if column not in (None, *names)]:
        found = ", ".join(names) or "nothing"
        raise UserError(f"{path}: has no column {', '.join(missing)}; its first line has {found}")
    if repeated := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{path}: its first line has {', '.join(repeated)} more than once; rename or delete the others")
    for row in writer.note_input(path, rows):
        if len(row.value) == len(names):
            yield Row(row.position, dict(zip(names, row.value, strict=True)))
        else:
            reason = f"has {count(len(row.value), 'cell')}, the first line has {len(names)}"
            writer.report_problem(BROKEN, row.place, reason, ",".join(row.value))


@dataclass(frozen=True)
class FoundImage:
    """An image: its path from the image folder, the data set (subfolder) it lies in, and equal files elsewhere."""

    image: str
    data_set: str
    copies: int = 0

    @property
    def stem(self) -> str:
        """The file's name without its ending. A name without one may hold a dot (`1.5倍快乐`)."""
        path = PurePosixPath(self.image)
        return path.stem if path.suffix.isascii() else path.name


class ImageIndex:
    """The images in subfolders of the image folder, by name.

    Names match in any Unicode normalisation: macOS writes é and が in two characters, everyone else in one.

    Attributes:
        left_out: what else lies there, as notes of an AnnotationWriter.

    Raises:
        UserError: a folder is missing, lies outside the image folder, no image is in them, or a name is not UTF-8.
    """

    def __init__(self, settings: ImagesSettings):
        check_image_folder(settings.image_folder)
        self._image_folder, self._suggested = settings.image_folder, 0
        self.find = functools.cache(self.find)  # an image has several captions, and following its path takes time
        self._by_name = defaultdict(list)  # NFC name: [FoundImage]
        self.left_out = Counter()
        for subfolder in settings.images:
            images, left_out = _list_images(settings.image_folder, subfolder)
            self.left_out.update(
                {f"files left out of --images: {reason}": len(left_out[reason]) for reason in left_out}
            )
            for image in images:
                name = normalize("NFC", image.rpartition("/")[2])
                self._by_name[name].append(FoundImage(image, Path(subfolder).as_posix()))
        self.count = sum(map(len, self._by_name.values()))
        self.places = ", ".join(str(settings.image_folder / subfolder) for subfolder in settings.images)
        if not self.count:
            raise UserError(f"no image in {self.places}")

    def __iter__(self) -> Iterator[list[FoundImage]]:
        """The images of every name, in the order of names."""
        return (images for _, images in sorted(self._by_name.items()))

    def find(self, name: str) -> FoundImage:
        """The image that a caption calls `name`: a file name, or the end of a path.

        Raises:
            RecordFault: there is none (with the nearest name), or several with different bytes.
        """
        name = normalize("NFC", name)
        file_name = name.rpartition("/")[2]
        images = self._by_name.get(file_name, [])
        images = [image for image in images if normalize("NFC", f"/{image.image}").endswith(f"/{name}")]
        if images:
            return self.choose(images)
        self._suggested += 1
        near = self._suggested <= _SUGGESTIONS and difflib.get_close_matches(file_name, self._by_name, 1, 0.75)
        raise RecordFault(NO_IMAGE, f"no image {name!r}" + (f"; the nearest name is {near[0]!r}" if near else ""))

    def choose(self, images: list[FoundImage]) -> FoundImage:
        """The first of images with one name, if their bytes are equal.

        Raises:
            RecordFault: they differ, or one cannot be read.
        """
        paths = {resolve_image_path(image.image, self._image_folder): image.image for image in images}
        for path, image in paths.items():
            if not path.is_file():
                raise RecordFault(NO_IMAGE, f"{image} is not a file")
        if len(paths) > 1 and len({hash_file(path) for path in paths}) > 1:
            places = ", ".join(image.image for image in images)
            raise RecordFault(NO_IMAGE, f"several different images have that name: {places}")
        return FoundImage(images[0].image, images[0].data_set, len(images) - 1)


def _list_images(image_folder: Path, subfolder: str) -> tuple[list[str], dict[str, list[Path]]]:
    """The images of a subfolder, by their paths from the image folder, and what is left out, by reason."""
    try:
        top = resolve_image_path(subfolder, image_folder)
    except ValueError as error:
        raise UserError(f"--images {subfolder}: must be a folder inside --image_folder ({error})") from error
    if not top.is_dir():
        raise UserError(f"--images {subfolder}: no such folder in {image_folder}")
    images, left_out = find_images(top)
    check_file_names("--images", top, images)
    root = image_folder.resolve()
    return sorted(path.relative_to(root).as_posix() for path in images), left_out


def read_bqb_name(stem: str) -> str | None:
    """The text in a ChineseBQB name without its ending, or None if the name has none.

    Several parts (`减肥-真的很难`) are lines of the image and come with spaces between them. Some names describe in
    place of quoting (`汪蛋00024-磕头`): nothing in the name tells the two apart.
    """
    if _HEX_NAME.fullmatch(stem):
        return None
    match = _BQB.fullmatch(stem.strip())
    if not match:
        return None
    text = " ".join(part.strip() for part in match["text"].split("-") if part.strip())
    # An image that somebody saved from a chat and numbered.
    return text if normalise_text(text) and not is_machine_name(text) else None


def read_plain_name(stem: str) -> str | None:
    """The text that a name without its ending is, or None for names that cameras, chat programs and hashes make.

    Only a number in brackets after the name (`好的(1)`, `好的（2）`) is taken off, which file managers put there. A
    letter or digit that keeps names apart (`说人话B`) cannot be told from the text and stays.
    """
    if is_machine_name(stem.strip()):
        return None
    text = _COPY_NUMBER.sub("", stem.strip()).strip()
    return text if normalise_text(text) and not is_machine_name(text) else None


def is_machine_name(stem: str) -> bool:
    """Whether no person chose the name: a hash, a UUID, a date, a camera's or chat program's counter."""
    return any(pattern.fullmatch(stem) for pattern in (_HEX_NAME, _CAMERA_NAME, _RANDOM_NAME))
