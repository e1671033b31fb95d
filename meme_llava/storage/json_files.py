"""JSON in the folders of models and results, which may be cut short, edited or not ours: read with one sentence."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meme_llava.cli import RepeatedKey, refuse_repeated_keys
from meme_llava.errors import UserError

DAMAGED = "Download, copy or make it again."
# What a model folder may hold, in the order in which libraries read it.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "adapter_config.json",
)
KIND_NAMES = {  # what a value of JSON is, for messages
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def read_json(path: Path, advice: str = DAMAGED, error: type[UserError] = UserError) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        advice: what the user can do about a file that is not as it should be.
        error: raised where the file is missing or holds anything but one JSON object in UTF-8 without a repeated key.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=refuse_repeated_keys)
    except FileNotFoundError as found:
        raise error(f"{path}: no such file. {advice}") from found
    except (ValueError, RecursionError) as found:
        raise error(f"{path}: {explain_json(found)}. {advice}") from found
    if not isinstance(value, dict):
        raise error(f"{path}: holds {KIND_NAMES[type(value)]}, expected an object {{…}}. {advice}")
    return value


def explain_json(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that `json.loads` refuses, or `bytes.decode` before it."""
    if isinstance(error, RecursionError):
        return "is nested too deep"
    if isinstance(error, UnicodeDecodeError):
        is_utf16 = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        return "is in UTF-16, expected UTF-8" if is_utf16 else f"is not UTF-8 ({error.reason})"
    if isinstance(error, RepeatedKey):
        return str(error)
    if not isinstance(error, json.JSONDecodeError):
        return "holds a number of more than 4,300 digits"
    if not error.doc.strip():
        return "is empty"
    if error.doc.startswith("\ufeff"):
        return "begins with a byte order mark, expected UTF-8 without one"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        return "ends in the middle"
    return f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"


def check_fields(
    path: Path,
    value: Mapping,
    kinds: Mapping[str, type],
    advice: str = DAMAGED,
    error: type[UserError] = UserError,
) -> None:
    """Raise `error` unless the object in a file has fields of these kinds.

    Args:
        kinds: {"base.folder": str, …}, a dot for the field of a field. A float may be a whole number; it is finite.
    """
    for name, kind in kinds.items():
        found = value
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise error(f"{path}: has no {name}. {advice}")
            found = found[part]
        if type(found) not in ((int, float) if kind is float else (kind,)):
            raise error(f"{path}: {name} is {_show(found)}, expected {KIND_NAMES[kind]}. {advice}")
        if kind is float and not math.isfinite(found):
            raise error(f"{path}: {name} is {found}, expected a finite number. {advice}")


def _show(value) -> str:
    return KIND_NAMES[type(value)] if isinstance(value, dict | list) else json.dumps(value, ensure_ascii=False)


def check_json_files(folder: Path) -> None:
    """Raise UserError for the first JSON file of a model folder that is damaged."""
    for path in (*(folder / name for name in MODEL_FILES), *sorted(folder.glob("*.index.json"))):
        if path.is_file():
            read_json(path)
