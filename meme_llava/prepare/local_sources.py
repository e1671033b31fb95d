"""Sources on this machine: caption files and tables, file names that are the text, LLaVA files as they are.

Captions stand in files of their own and are joined with images by name: the recipe's caption files (JSONL of picName
and description), emo-visual-data's own data.json or CSV (filename and content), and any CSV or JSONL table. Captions
of one image stay adjacent and share its `image`.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from meme_llava.cli import setting
from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.conversation import is_blank
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import normalise_text
from meme_llava.dataset.records import LONGEST_SHOWN, check_length, show
from meme_llava.errors import UserError, count
from meme_llava.prepare.inputs import (
    BROKEN,
    NO_IMAGE,
    ImageIndex,
    Row,
    read_bqb_name,
    read_csv_rows,
    read_json_rows,
    read_plain_name,
    read_record_rows,
    read_table_rows,
)
from meme_llava.prepare.writer import AnnotationWriter, ImagesSettings, SourceSettings, make_record, make_unique
from meme_llava.storage.json_files import KIND_NAMES

COPIES = "images that lie at several places with equal bytes"


@dataclass(kw_only=True)
class CaptionsSettings(ImagesSettings):
    captions: list[Path] = setting("JSONL files of {picName, description}")
    annotators: list[str] = setting("a name for each file of --captions; without it, the file's own", [])

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        if self.annotators and len(self.annotators) != len(self.captions):
            raise UserError(
                f"--annotators has {count(len(self.annotators), 'name')}, --captions "
                f"{count(len(self.captions), 'file')}; give one each"
            )


@dataclass(kw_only=True)
class EmoVisualSettings(ImagesSettings):
    data: list[Path] = setting("data.json or data.csv of emo-visual-data")


@dataclass(kw_only=True)
class TableSettings(ImagesSettings):
    table: Path = setting("CSV or TSV with a first line of column names, or JSONL, or a JSON array")
    image_column: str = setting("column of file names, or paths inside --images")
    caption_column: str = setting("column of answers")
    text_column: str | None = setting("column of the words in the image; empty where there are none", None)
    question_column: str | None = setting("column of questions; without it, or where empty, a wording is drawn", None)
    annotator: str | None = setting("who wrote the captions; without it, the file's name", None)


@dataclass(kw_only=True)
class LlavaSettings(SourceSettings):
    annotations: Path = setting("LLaVA file, e.g. blip_laion_cc_sbu_558k.json of LLaVA-Pretrain")
    images: str = setting("subfolder of the image folder that its paths start from", "")


def prepare_captions(settings: CaptionsSettings) -> None:
    """The recipe's caption files → annotations."""
    annotators = settings.annotators or [path.stem for path in settings.captions]
    files = list(zip(settings.captions, annotators, strict=True))
    _join_captions(settings, files, _read_caption_lines, "picName", "description")


def prepare_emo_visual(settings: EmoVisualSettings) -> None:
    """emo-visual-data's own descriptions → annotations."""
    files = [(path, f"emo-visual-data {path.stem}") for path in settings.data]
    _join_captions(settings, files, _read_emo_rows, "filename", "content")


def prepare_table(settings: TableSettings) -> None:
    """Any table of captions → annotations."""
    columns = [settings.image_column, settings.caption_column, settings.text_column, settings.question_column]
    files = [(settings.table, settings.annotator or settings.table.stem)]
    _join_captions(settings, files, functools.partial(read_table_rows, columns=columns), *columns)


def prepare_chinese_bqb(settings: ImagesSettings) -> None:
    """ChineseBQB's images → reading records; names without text are left out.

    Some names describe the image in place of quoting it (`汪蛋00024-磕头`). Nothing in the name tells them apart, so
    their records say words that do not stand in the image.
    """
    hint = "ChineseBQB's names look like 00016鸽子-别骗我.jpg; for names that are the text take file_names."
    _prepare_names(settings, read_bqb_name, hint)


def prepare_file_names(settings: ImagesSettings) -> None:
    """Images whose names are the text → reading records; names that no person chose are left out.

    Only a number in brackets after a name is taken off. Names leave out, add and mistype: of 821 memes named by people
    651 have exactly the words of the image as their name.
    """
    _prepare_names(settings, read_plain_name)


def prepare_llava(settings: LlavaSettings) -> None:
    """A LLaVA file → the same records with paths from the image folder and a `sources` field.

    The text stays as it is: LLaVA-Pretrain puts `<image>` before or after the question, and may go on doing so.
    """
    check_image_folder(settings.image_folder)
    with AnnotationWriter(settings, [settings.annotations]) as writer:
        for row, parsed in read_record_rows(settings.annotations, writer):
            images = [str(PurePosixPath(settings.images, image)) for image in parsed.images]
            source = {"set": settings.annotations.stem, **row.position}
            record = {**row.value, "sources": [*(row.value.get("sources") or []), source]}
            if "image" in record:
                record["image"] = images[0] if isinstance(record["image"], str) else images
            try:
                for image in images:
                    if not resolve_image_path(image, settings.image_folder).is_file():
                        raise ValueError(f"no image {image!r} in {settings.image_folder}")
            except ValueError as error:
                writer.report_problem("missing image", row.place, str(error), row.value)
                continue
            writer.add(record, row.place)
        rows, missing = writer.inputs[0]["rows"], writer.left_out["missing image"]
        if missing > rows / 2:
            writer.hint = (
                f"{missing:,} of {count(rows, 'record')} found no image: are --image_folder and --images right?"
            )
        writer.finish()


def _join_captions(
    settings: ImagesSettings,
    files: list[tuple[Path, str]],
    read: Callable[[Path, AnnotationWriter], Iterable[Row]],
    *keys: str | None,
) -> None:
    """Join captions with images, and write them image by image, in the order in which images are first named.

    Args:
        files: every file with the name of its annotator.
        keys: those that `_parse_caption` takes.
    """
    index, ids = ImageIndex(settings), set()
    records = defaultdict(dict)  # image: {what makes a caption the same: (record, place)}
    with AnnotationWriter(settings, [path for path, _ in files]) as writer:
        writer.notes.update(index.left_out)
        joined = 0
        for row, annotator in ((row, annotator) for path, annotator in files for row in read(path, writer)):
            try:
                name, answer, text, question = _parse_caption(row.value, *keys)
                image = index.find(name)
            except RecordFault as fault:
                writer.report_problem(fault.kind, row.place, str(fault), row.value)
                continue
            joined += 1
            if image.copies and image.image not in records:
                writer.notes[COPIES] += 1
            source = {"set": image.data_set, "annotator": annotator, **row.position}
            # Captions of emoji alone normalise to nothing, and are not all the same.
            same = (normalise_text(answer) or answer, question)
            if same in records[image.image]:
                records[image.image][same][0]["sources"].append(source)
                writer.notes["captions that repeat another of the same image, joined with it"] += 1
                continue
            text = read_bqb_name(image.stem) if text is None else text
            record_id = make_unique(f"{image.stem}_{annotator}", ids)
            record = make_record(record_id, image.image, answer, source, settings.seed, text, question)
            records[image.image][same] = (record, row.place)
        for record, place in (pair for of_image in records.values() for pair in of_image.values()):
            writer.add(record, place)
        if (missing := writer.left_out[NO_IMAGE]) > joined:
            writer.hint = (
                f"{missing:,} of {count(missing + joined, 'caption')} found no image among the {index.count:,} in "
                f"{index.places}: are --image_folder and --images the folders of these captions' images, "
                "unpacked in full?"
            )
        writer.finish()


def _read_caption_lines(path: Path, writer: AnnotationWriter) -> Iterator[Row]:
    """The lines of a caption file. Of those that data/describe.py wrote, which hold a sha256, the last counts."""
    rows = list(read_json_rows(path, writer))
    values = [row.value if isinstance(row.value, dict) and "picName" in row.value else {} for row in rows]
    last = {str(value["picName"]): number for number, value in enumerate(values) if "sha256" in value}
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        if "sha256" in value and last[str(value["picName"])] != number:
            # The image changed, or was asked about again after it had been set aside.
            writer.leave_out("described again later", row.place, f"{value['picName']}: a later line counts", value)
        elif "set_aside" in value:
            # No model described the image.
            reason = f"{value['picName']}: {value['set_aside']}"
            writer.leave_out("set aside by describe.py", row.place, reason, value)
        else:
            yield row


def _read_emo_rows(path: Path, writer: AnnotationWriter) -> Iterator[Row]:
    if path.suffix.lower() != ".csv":
        yield from read_json_rows(path, writer)
        return
    for row in writer.note_input(path, read_csv_rows(path)):
        # There is no line of column names, and a line break inside a description is written as \\n.
        name, *cells = row.value
        if cells:
            yield Row(row.position, {"filename": name, "content": ",".join(cells).replace("\\n", "\n")})
        else:
            reason = f"has 1 cell, expected a file name and a description: {row.value}"
            writer.report_problem(BROKEN, row.place, reason, row.value)


def _parse_caption(
    value, image_key: str, caption_key: str, text_key: str | None = None, question_key: str | None = None
) -> tuple[str, str, str | None, str]:
    """Image, answer, the words in the image (None if unknown) and question (empty to draw one) of a row.

    Raises:
        RecordFault: the row has no caption, with the reason.
    """
    keys = (image_key, caption_key)
    if not isinstance(value, dict):
        raise RecordFault(BROKEN, f"is {KIND_NAMES[type(value)]}, expected an object with {', '.join(keys)}")
    if missing := [key for key in keys if key not in value]:
        raise RecordFault(BROKEN, f"has no {', '.join(missing)} (keys: {', '.join(value)[:LONGEST_SHOWN]})")
    image, answer, text, question = (value.get(key) for key in (*keys, text_key, question_key))
    if not isinstance(image, str) or is_blank(image):
        raise RecordFault(BROKEN, f"the image is {show(image)}, expected a file name")
    for key, words in ((caption_key, answer), (text_key, text), (question_key, question)):
        if words is not None and not isinstance(words, str):
            raise RecordFault(BROKEN, f"{image}: {key} is {show(words)}, expected text")
        check_length(f"{image}: {key}", words or "")
    if is_blank(answer or ""):
        raise RecordFault("no caption", f"{image}: {caption_key} is empty")
    return image.strip(), answer.strip(), text if text is None else text.strip(), (question or "").strip()


def _prepare_names(settings: ImagesSettings, read_name: Callable[[str], str | None], hint: str = "") -> None:
    """Images whose names hold the text; `hint` helps where none does."""
    index = ImageIndex(settings)
    with AnnotationWriter(settings) as writer:
        writer.notes.update(index.left_out)
        ids = set()
        for images in index:
            # One of equal files with one name, all of different ones.
            with contextlib.suppress(ValueError):
                images = [index.choose(images)]
                if images[0].copies:
                    writer.notes[COPIES] += 1
            for image in images:
                if (text := read_name(image.stem)) is None:
                    writer.leave_out("name without text", image.image, "the file name holds no text", image.image)
                    continue
                try:
                    index.choose([image])
                except RecordFault as fault:
                    writer.report_problem(fault.kind, image.image, str(fault), image.image)
                    continue
                source = {"set": image.data_set, "annotator": "file name", "file": image.image}
                record = make_record(make_unique(image.stem, ids), image.image, text, source, settings.seed, text=text)
                writer.add(record, image.image)
        writer.hint = "" if writer.records else hint
        writer.inputs += [{"folder": str(settings.image_folder / folder)} for folder in settings.images]
        writer.finish()
