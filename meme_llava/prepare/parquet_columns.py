"""Columns of a data set that hold images, words, answers and questions, and how words stand in them."""

import json
from dataclasses import dataclass, replace

from meme_llava.errors import UserError

# In the order in which they are looked for.
_IMAGE_COLUMNS = ("image", "img", "image", "jpg", "png")
_TEXT_COLUMNS = ("text", "ground_truth", "label", "transcription")
_CAPTION_COLUMNS = ("caption", "description", "answer", "answers", "content")
_QUESTION_COLUMNS = ("question", "query")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None where a set has no such column, or it is still to be found."""

    image: str | None = None
    text: str | None = None
    caption: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class Preset:
    """What is known of a set."""

    split: str
    columns: Columns = Columns()


# The sets of the recipe's second version. ChineseTest's ground_truth is JSON, as synthetic documents for Donut have it.
PRESETS = {
    "priyank-m/chinese_text_recognition": Preset("train", Columns(image="image", text="text")),
    "SWHL/ChineseOCRBench": Preset("test", Columns(image="image", caption="answers", question="question")),
    "fly0331/ChineseTest": Preset("train"),
    "REILX/text-description-of-the-meme": Preset("train"),
}


def find_columns(given: Columns, dataset: str, names: list[str]) -> Columns:
    """Those that the user gives, else those that are known of the set, else those with telling names.

    Args:
        names: all columns of the set.

    Raises:
        UserError: a given column is not there, or images or words are in none that can be told.
    """
    for flag, column in (
        ("image_column", given.image),
        ("text_column", given.text),
        ("caption_column", given.caption),
        ("question_column", given.question),
    ):
        if column is not None and column not in names:
            raise UserError(f"--{flag} {column}: the data set has the columns {', '.join(names)}")
    known = PRESETS.get(dataset, Preset("")).columns
    columns = replace(given, image=given.image or known.image or _find_one(_IMAGE_COLUMNS, names))
    if given.text is None and given.caption is None:
        text = known.text or (None if known.caption else _find_one(_TEXT_COLUMNS, names))
        caption = known.caption or (None if text else _find_one(_CAPTION_COLUMNS, names))
        columns = replace(columns, text=text, caption=caption)
    if columns.caption and given.question is None:
        columns = replace(columns, question=known.question or _find_one(_QUESTION_COLUMNS, names))
    _check_columns(columns, dataset, names)
    return columns


def _find_one(candidates: tuple[str, ...], names: list[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _check_columns(columns: Columns, dataset: str, names: list[str]) -> None:
    if columns.image is None and {"picName", "description"} <= set(names):
        raise UserError(
            f"{dataset}: holds captions without images. Download its .jsonl files and join them with "
            "the images of emo-visual-data and ChineseBQB: python data/prepare.py captions --captions …"
        )
    absent = [column for column in (columns.image, columns.text or columns.caption) if column not in names]
    if absent:
        raise UserError(
            f"{dataset}: cannot tell which columns hold the images and the words; it has "
            f"{', '.join(names)}. Name them: --image_column and --text_column (the words in the image) or "
            "--caption_column (any other answer)."
        )


def read_text(row: dict, column: str) -> str:
    """The words in a column, without white space around them. Raises ValueError with the reason."""
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, expected text")
    text = (value or "").strip()
    if column == "ground_truth" and text.startswith("{"):
        try:
            text = json.loads(text)["gt_parse"]["text_sequence"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{column} has no gt_parse.text_sequence: {text[:200]}") from error
    return text
