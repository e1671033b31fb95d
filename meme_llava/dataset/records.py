"""The annotation file: the form of a record.

Nothing about files of images, tokens or training.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.findings import Finding, RecordFault
from meme_llava.errors import UserError

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
FORMAT_HELP = "See data/README.md for the record format."
CAPTIONS_HELP = "A line of a caption file: python data/prepare.py captions turns those into records."


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more images. `place` says where it stands, for messages.

    `text` is what is known to stand in the image ("" = nothing), `repeat` counts deliberate copies from 1, `task` is
    the record's own name for what is asked.
    """

    record_id: str
    place: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    text: str | None = None
    repeat: int = 1
    source: str = ""
    task: str = ""


def read_records(annotations: Path) -> tuple[list[Record], list[Finding]]:
    """Read a JSON array or a JSONL file of LLaVA-style records.

    Returns the well-formed records and one finding for every other record.

    Raises:
        UserError: the file is missing, not UTF-8, or is not JSON array / JSONL.
    """
    records, findings = [], []
    for place, value in iterate_values(annotations):
        if isinstance(value, RecordFault):
            findings.append(Finding(value.kind, place, "?", str(value)))
            continue
        record_id = _read_id(value, "?") if isinstance(value, dict) else "?"
        try:
            records.append(parse_record(value, place))
        except RecordFault as fault:
            findings.append(Finding(fault.kind, place, record_id, str(fault)))
    return records, findings


def parse_record(value, place: str) -> Record:
    """Check one record's structure. Raises RecordFault with the reason."""
    if not isinstance(value, dict):
        raise RecordFault("malformed", f"is {type(value).__name__}, expected an object. {FORMAT_HELP}")
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordFault(
            "malformed", f"'image' is {images!r}, expected a file name, a list of file names, or no 'image' at all"
        )
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        # The recipe's caption files are the first thing that users have at hand.
        advice = CAPTIONS_HELP if "picName" in value else FORMAT_HELP
        raise RecordFault("malformed", f"has no list 'conversations' (keys: {', '.join(map(str, value))}). {advice}")
    turns = tuple(_parse_turn(turn, index) for index, turn in enumerate(conversations))
    _check_turn_order(turns)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise RecordFault(
            "placeholder_mismatch",
            f"has {len(images)} image(s) but {placeholders} {IMAGE_PLACEHOLDER} in its human turns; write one "
            f"{IMAGE_PLACEHOLDER} for every image",
        )
    text, repeat, sources = value.get("text"), value.get("repeat"), value.get("sources")
    return Record(
        record_id=_read_id(value, place),
        place=place,
        images=tuple(images),
        turns=turns,
        text=text if isinstance(text, str) else None,
        repeat=repeat if isinstance(repeat, int) else 1,
        source=name_source(sources[0]) if isinstance(sources, list) and sources else "",
        task=value["task"] if isinstance(value.get("task"), str) else "",
    )


def _read_id(value: dict, otherwise: str) -> str:
    return otherwise if value.get("id") is None else str(value["id"])


def name_source(source) -> str:
    """The set and annotator of an entry of `sources`, as tables name it."""
    if not isinstance(source, dict):
        return "unnamed"
    return " / ".join(str(source[key]) for key in ("set", "annotator") if source.get(key)) or "unnamed"


def _parse_turn(turn, index: int) -> Turn:
    where = f"conversations[{index}]"
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise RecordFault("malformed", f"{where} is {turn!r}, expected an object with 'from' and 'value'")
    if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
        raise RecordFault("malformed", f"{where}.from is {turn['from']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(turn["value"], str):
        raise RecordFault("malformed", f"{where}.value is {turn['value']!r}, expected text")
    if not turn["value"].strip():
        raise RecordFault("empty_text", f"{where}.value is {turn['value']!r}, expected text")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair (a cut emoji); no tokenizer takes it.
        half = error.object[error.start : error.end]
        raise RecordFault("half_character", f"{where}.value holds half a character: {half!r}") from error
    return Turn(ROLES[turn["from"]], turn["value"])


def _check_turn_order(turns: tuple[Turn, ...]) -> None:
    dialogue = [turn.role for turn in turns[1:]] if turns[0].role == "system" else [turn.role for turn in turns]
    expected = ["user", "assistant"] * (len(dialogue) // 2)
    if not dialogue or dialogue != expected:
        raise RecordFault(
            "bad_turn_order",
            "'conversations' must alternate human, gpt, human, gpt … and end with gpt (one system turn may come first)",
        )


def iterate_values(annotations: Path) -> Iterator[tuple[str, object]]:
    """Every value of a JSON array or JSONL file with its place; a RecordFault for a line that is not JSON.

    Raises:
        UserError: the file is missing, not UTF-8, or is not JSON array / JSONL.
    """
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
                    yield f"{annotations.name} line {number}", RecordFault("not_json", f"is not JSON ({error})", line)
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
