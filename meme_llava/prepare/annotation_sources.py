"""Sources that bring their own pairs: names that are the text, and LLaVA files as they are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from meme_llava.cli import describe
from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.records import parse_record
from meme_llava.prepare.caption_sources import IMAGES_HELP
from meme_llava.prepare.file_name_text import read_bqb_name, read_plain_name
from meme_llava.prepare.image_index import FoundImage, ImageIndex
from meme_llava.prepare.row_files import Row, read_json_rows
from meme_llava.prepare.writer import (
    AnnotationWriter,
    DrawingSettings,
    SourceSettings,
    UniqueIds,
    check_not_input,
    finish,
    make_record,
)


@dataclass(kw_only=True)
class FileNameSettings(DrawingSettings):
    images: list[str] = field(metadata=describe(IMAGES_HELP))


@dataclass(kw_only=True)
class LlavaSettings(SourceSettings):
    annotations: Path = field(metadata=describe("LLaVA file, e.g. blip_laion_cc_sbu_558k.json of LLaVA-Pretrain"))
    images: str = field(default="", metadata=describe("subfolder of the image folder that its paths start from"))


def prepare_chinese_bqb(settings: FileNameSettings) -> None:
    """ChineseBQB's images → reading records; names without text are left out.

    Some names describe the image in place of quoting it (`汪蛋00024-磕头`). Nothing in the name tells them apart, so
    their records say words that do not stand in the image.
    """
    _prepare_names(settings, read_bqb_name)


def prepare_file_names(settings: FileNameSettings) -> None:
    """Images whose names are the text → reading records; names that no person chose are left out.

    Only a number in brackets after a name is taken off. Names leave out, add and mistype: of 821 memes named by people
    651 have exactly the words of the image as their name.
    """
    _prepare_names(settings, read_plain_name)


def prepare_llava(settings: LlavaSettings) -> None:
    """A LLaVA file → the same records with paths from the image folder and a `sources` field.

    The text stays as it is: LLaVA-Pretrain puts `<image>` before or after the question, and may go on doing so.
    """
    check_not_input([settings.output], [settings.annotations])
    check_image_folder(settings.image_folder)
    with AnnotationWriter(settings) as writer:
        rows, missing = 0, 0
        for row in read_json_rows(settings.annotations):
            rows += 1
            try:
                record = _convert_llava(row, settings)
            except ValueError as error:
                writer.report_problem("not a record", row.place, str(error), row.original)
                continue
            try:
                _check_files(record, settings.image_folder)
            except ValueError as error:
                missing += 1
                writer.report_problem("missing image", row.place, str(error), row.original)
                continue
            writer.add(record, row.place)
        writer.note_input(settings.annotations, rows)
        if missing > rows / 2:
            writer.hint = f"{missing:,} of {rows:,} records found no image: are --image_folder and --images right?"
        finish(writer)


def _prepare_names(settings: FileNameSettings, read_name: Callable[[str], str | None]) -> None:
    index = ImageIndex(settings.image_folder, settings.images)
    with AnnotationWriter(settings) as writer:
        ids = UniqueIds()
        for _, images in index:
            for image in _choose(index, images, writer):
                _write_reading(image, read_name, ids, writer, settings.seed)
        if read_name is read_bqb_name and not writer.records:
            writer.hint = (
                "ChineseBQB's names look like 00016鸽子-别骗我.jpg; for names that are the text take file_names."
            )
        writer.inputs += [{"folder": str(settings.image_folder / folder)} for folder in settings.images]
        finish(writer)


def _choose(index: ImageIndex, images: list[FoundImage], writer: AnnotationWriter) -> list[FoundImage]:
    """One of equal files with one name, all of different ones."""
    try:
        chosen = index.choose(images)
    except ValueError:
        return images
    if chosen.copies:
        writer.notes["images that lie at several places with equal bytes"] += 1
    return [chosen]


def _write_reading(image: FoundImage, read_name: Callable, ids: UniqueIds, writer: AnnotationWriter, seed: int) -> None:
    stem = PurePosixPath(image.image).stem
    text = read_name(stem)
    if text is None:
        writer.leave_out("name without text", image.image, "the file name holds no text", image.image)
        return
    source = {"set": image.data_set, "annotator": "file name", "file": image.image}
    writer.add(make_record(ids.take(stem), image.image, text, source, seed, text=text), image.image)


def _convert_llava(row: Row, settings: LlavaSettings) -> dict:
    if isinstance(row.value, ValueError):
        raise row.value
    parse_record(row.value, row.place)
    record = dict(row.value)
    if "image" in record:
        images = [record["image"]] if isinstance(record["image"], str) else record["image"]
        images = [str(PurePosixPath(settings.images, image)) for image in images]
        record["image"] = images[0] if isinstance(row.value["image"], str) else images
    source = {"set": settings.annotations.stem, "file": row.file, **row.position}
    record["sources"] = [*row.value.get("sources", []), source]
    return record


def _check_files(record: dict, image_folder: Path) -> None:
    images = record.get("image", [])
    for image in [images] if isinstance(images, str) else images:
        if not resolve_image_path(image, image_folder).is_file():
            raise ValueError(f"no image {image!r} in {image_folder}")
