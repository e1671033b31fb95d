"""Notes beside results: the settings and the contents of files that a result was made from."""

import json
import os
import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from meme_llava.storage.files import hash_file, write_json
from meme_llava.storage.run_record import RUN_RECORD

# What tells one folder of weights from another; the last one stands beside towers that were trained together.
IDENTIFYING_FILES = (RUN_RECORD, "config.json", f"../{RUN_RECORD}")


def describe_making(flags: Mapping[str, Sequence[str]], free: Container[str]) -> dict[str, str]:
    """Flags with their values, and hashes of the files that they name, without `free` flags that change no result."""
    making = {}
    for name, values in flags.items():
        if name.removeprefix("no_") in free:
            continue
        making[f"--{name}"] = shlex.join(values)
        if name != "output_dir" and len(values) == 1:
            for file in (values[0], *(f"{values[0]}/{part}" for part in IDENTIFYING_FILES)):
                if Path(file).is_file():
                    making[f"contents of --{name}{file.removeprefix(values[0])}"] = hash_file(Path(file))
    return making


def is_same(then: str, now: str) -> bool:
    """Whether two values mean the same: one number, or one place on the disk, in whatever spelling."""
    try:
        return float(then) == float(now)
    except ValueError:
        return os.path.realpath(then) == os.path.realpath(now)


def list_differences(note: Path, making: Mapping[str, str]) -> list[str]:
    """Lines with what a note says (<) and what is so now (>), where that differs."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        return [f"< {note}: no note of this version of run.sh"]
    lines = []
    for name in {**noted, **making}:
        if name not in noted or name not in making or not is_same(noted[name], making[name]):
            lines += [f"{sign} {name} {side[name]}" for sign, side in (("<", noted), (">", making)) if name in side]
    return lines


def write_note(note: Path, making: Mapping[str, str]) -> None:
    write_json(note, making)
