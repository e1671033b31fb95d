"""The annotation file: the form of a record, and the list of those left out.

Nothing about files of images, tokens or training.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meme_llava.cli import RepeatedKey, refuse_repeated_keys
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn, is_blank
from meme_llava.dataset.findings import Finding, RecordFault
from meme_llava.dataset.image_files import has_image_name
from meme_llava.dataset.user_files import read_text
from meme_llava.errors import UserError, count
from meme_llava.storage.json_files import KIND_NAMES, explain_json

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
FORMAT_HELP = "See data/README.md for the record format."
CAPTIONS_HELP = "A line of a caption file: python data/prepare.py captions turns those into records."
LONGEST_TEXT = 1_000_000  # characters; nothing that is said of an image is near it, and the check would take for ever
LONGEST_SHOWN = 200  # characters of a value in a message
OPTIONAL_KEYS = {"text": str, "task": str, "sources": list, "repeat": int}
KNOWN_KEYS = {"id", "image", "conversations", *OPTIONAL_KEYS}
KNOWN_TURN_KEYS = {"from", "value"}
# Where other tools have the images of a record or a turn, in lower case; our own key counts there, too.
_KEYS_OF_IMAGES = set(
    "image images image_file image_files image_path image_paths image_url image_urls img imgs img_path img_paths "
    "pic pics picname picture pictures photo photos".split()
)
# How other tools mark the place of an image: <img>, <|image_1|>, <ImageHere>, ![](a.jpg), [图片].
_MARK_OF_IMAGE = re.compile(
    r"(?i)<\|?(?!(?-i:image>))(?:img|image)[^<>\n]{0,200}>|!\[[^\]\n]{0,200}\]\(|\[(?:img|image|图片)\]"
)


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more images. `place` says where it stands, for messages.

    `text` is what is known to stand in the image ("" = nothing), `repeat` counts deliberate copies from 1, `task` is
    the record's own name for what is asked. `stray_image` says, of a record without images, where it seems to have one.
    """

    record_id: str
    place: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    text: str | None = None
    repeat: int = 1
    source: str = ""
    task: str = ""
    stray_image: str = ""


def read_records(annotations: Path) -> tuple[list[Record], list[Finding]]:
    """Read a JSON array or a JSONL file of LLaVA-style records.

    Returns the well-formed records and one finding for every other record.

    Raises:
        UserError: the file is missing, not UTF-8, or is not JSON array / JSONL.
    """
    records, findings = [], []
    for place, value in iterate_values(annotations):
        try:
            if isinstance(value, RecordFault):
                raise value
            records.append(parse_record(value, place))
        except RecordFault as fault:
            record_id = _read_id(value, "?") if isinstance(value, dict) else "?"
            findings.append(Finding(fault.kind, place, record_id, str(fault)))
    return records, findings


def parse_record(value, place: str) -> Record:
    """Check one record's structure. Raises RecordFault with the reason."""
    if not isinstance(value, dict):
        raise RecordFault("malformed", f"is {KIND_NAMES[type(value)]}, expected an object. {FORMAT_HELP}")
    for key, kind in OPTIONAL_KEYS.items():
        if value.get(key) is not None and type(value[key]) is not kind:
            expected = f"{KIND_NAMES[kind]}, or no {key!r} at all"
            raise RecordFault("malformed", f"{key!r} is {show(value[key])}, expected {expected}")
    check_length("'text'", value.get("text") or "")
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordFault(
            "malformed", f"'image' is {show(images)}, expected a file name, a list of file names, or no 'image' at all"
        )
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        # The recipe's caption files are the first thing that users have at hand.
        advice = CAPTIONS_HELP if "picName" in value else FORMAT_HELP
        raise RecordFault(
            "malformed", f"has no list 'conversations' (keys: {', '.join(value)[:LONGEST_SHOWN]}). {advice}"
        )
    turns = tuple(_parse_turn(turn, f"conversations[{index}]") for index, turn in enumerate(conversations))
    dialogue = [turn.role for turn in turns[turns[0].role == "system" :]]
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise RecordFault(
            "bad_turn_order",
            "'conversations' must alternate human, gpt, human, gpt … and end with gpt (one system turn may come first)",
        )
    stray_image = "" if images else _find_stray_image(value, turns)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise RecordFault(
            "placeholder_mismatch",
            f"has {count(len(images), 'image')} but {placeholders} {IMAGE_PLACEHOLDER} in its human turns; "
            + (stray_image or f"write one {IMAGE_PLACEHOLDER} for every image"),
        )
    return Record(
        record_id=_read_id(value, place),
        place=place,
        images=tuple(images),
        turns=turns,
        text=value.get("text"),
        repeat=value.get("repeat") or 1,
        source=name_source(value["sources"][0]) if value.get("sources") else "",
        task=value.get("task") or "",
        stray_image=stray_image,
    )


def _find_stray_image(value: dict, turns: tuple[Turn, ...]) -> str:
    """Where a record without 'image' seems to have one, and what to do about it; empty if nowhere."""
    advice = "name the file under 'image'"
    if not any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "user"):
        advice += f" and write one {IMAGE_PLACEHOLDER} into the question"
    for where, known in ((value, KNOWN_KEYS), *((turn, KNOWN_TURN_KEYS) for turn in value["conversations"])):
        for key, content in where.items():
            if key in known:
                continue
            first = content
            while isinstance(first, list | dict) and first:
                first = next(iter(first.values() if isinstance(first, dict) else first))
            is_image = isinstance(first, str) and has_image_name(first)
            if is_image or (key.lower() in _KEYS_OF_IMAGES and content):
                return f"{key!r} holds {show(content)}: {advice}"
    for turn in turns:
        if turn.role == "user" and (mark := _MARK_OF_IMAGE.search(turn.text)):
            return f"a question holds {mark[0]!r}: {advice}"
    return ""


def _read_id(value: dict, otherwise: str) -> str:
    return otherwise if value.get("id") is None else str(value["id"])


def name_source(source) -> str:
    """The set and annotator of an entry of `sources`, as tables name it."""
    if not isinstance(source, dict):
        return "unnamed"
    return " / ".join(str(source[key]) for key in ("set", "annotator") if source.get(key)) or "unnamed"


def _parse_turn(turn, where: str) -> Turn:
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise RecordFault("malformed", f"{where} is {show(turn)}, expected an object with 'from' and 'value'")
    if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
        raise RecordFault("malformed", f"{where}.from is {show(turn['from'])}, expected one of {', '.join(ROLES)}")
    if not isinstance(turn["value"], str):
        raise RecordFault("malformed", f"{where}.value is {show(turn['value'])}, expected text")
    check_length(f"{where}.value", turn["value"])
    if is_blank(turn["value"]):
        raise RecordFault("empty_text", f"{where}.value is {show(turn['value'], ascii)}, expected text to be seen")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair (a cut emoji); no tokenizer takes it.
        half = error.object[error.start : error.end]
        raise RecordFault("half_character", f"{where}.value holds half a character: {half!r}") from error
    return Turn(ROLES[turn["from"]], turn["value"])


def check_length(where: str, text: str) -> None:
    """Raise RecordFault for a text that is too long to be meant, before anything slow is done with it."""
    if len(text) > LONGEST_TEXT:
        raise RecordFault("malformed", f"{where} has {len(text):,} characters, expected at most {LONGEST_TEXT:,}")


def show(value, spell: Callable[[object], str] = repr) -> str:
    """A value as a message shows it: its beginning, where it is long."""
    text = spell(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def iterate_values(annotations: Path) -> Iterator[tuple[str, object]]:
    """Every value of a JSON array or JSONL file with its place; a RecordFault for a line that is not JSON, and for a
    value that has a key twice.

    Raises:
        UserError: the file is missing, not UTF-8, or is not JSON array / JSONL.
    """
    text = read_text(annotations)
    if annotations.suffix == ".jsonl":
        if text.lstrip().startswith("["):
            raise UserError(
                f"{annotations}: is a JSON array, and the ending .jsonl means one record a line; rename it to "
                f"{annotations.stem}.json"
            )
        # str.splitlines would also break at U+2028 and other characters that may stand inside a caption.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{annotations.name} line {number}", _parse_json(line)
        return
    try:
        try:
            values = json.loads(text, object_pairs_hook=refuse_repeated_keys)
        except RepeatedKey:
            # Parsed value by value the text says which record it is, if it is sound otherwise.
            values = _parse_one_by_one(text) if isinstance(json.loads(text), list) else {}
    except (ValueError, RecursionError) as error:
        if isinstance(_parse_json(text.lstrip().partition("\n")[0]), dict):
            raise UserError(
                f"{annotations}: holds one record a line, expected an array of records; rename it to "
                f"{annotations.stem}.jsonl"
            ) from error
        place = getattr(error, "pos", 0)
        around = text[max(place - 20, 0) : place + 20]
        raise UserError(f"{annotations}: {explain_json(error)}" + (f", at {around!r}" if around else "")) from error
    if not isinstance(values, list):
        raise UserError(f"{annotations}: holds {KIND_NAMES[type(values)]}, expected an array of records. {FORMAT_HELP}")
    for index, value in enumerate(values):
        yield f"{annotations.name} record {index}", value


def _parse_json(text: str):
    """The value of a text, or a RecordFault with that text."""
    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except RepeatedKey as error:
        return RecordFault("repeated_key", f"{error}; leave one of the two", text)
    except (ValueError, RecursionError) as error:
        return RecordFault("not_json", explain_json(error), text)


def _parse_one_by_one(array: str) -> list:
    """The values of a JSON array as `_parse_json` gives them."""
    between, decoder, values = re.compile(r"[\s,]*"), json.JSONDecoder(), []
    start = between.match(array, array.index("[") + 1).end()
    while array[start] != "]":
        _, end = decoder.raw_decode(array, start)
        values.append(_parse_json(array[start:end]))
        start = between.match(array, end).end()
    return values


def read_quarantined_places(path: Path) -> set[str]:
    """The places of the records in a file that `write_quarantine` wrote."""
    places = set()
    for where, line in iterate_values(path):
        if not isinstance(line, dict) or not isinstance(line.get("place"), str):
            raise UserError(
                f"{path}: {where.removeprefix(path.name).strip()} names no place; expected quarantine.jsonl"
            )
        places.add(line["place"])
    return places
