"""The file that bought captions are kept in: one JSON line an image, on the disk as soon as its image is settled.

A run that was killed goes on where it stood. Nothing about servers or images.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from meme_llava.errors import UserError
from meme_llava.storage.files import append_line, cut_torn_line, explain_full_disk, fsync_path, lock, read_lines

# What every line is compared in; a temperature stands there if it was given.
SETTINGS = ("model", "prompt", "temperature")


class CaptionLedger:
    """The lines of an open file. Made by `open_ledger`, which holds its lock.

    Attributes:
        entries: the last line of every image, by picName.
        tokens: prompt_tokens and completion_tokens of all lines.
    """

    def __init__(self, path: Path, lines: list[dict]):
        self.path = path
        self.entries: dict[str, dict] = {}
        self.tokens: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0)
        for line in lines:
            self._add(line)

    def append(self, entry: dict) -> None:
        """Add a line and bring it to the disk."""
        append_line(self.path, entry)
        self._add(entry)

    def _add(self, entry: dict) -> None:
        self.entries[entry["picName"]] = entry
        for name in self.tokens:
            self.tokens[name] += entry.get(name) or 0


@contextlib.contextmanager
def open_ledger(path: Path, settings: dict) -> Iterator[CaptionLedger]:
    """Open the captions file for adding, made if it does not exist, and keep other processes off it.

    Args:
        settings: those of SETTINGS of this run; every line of the file must have been made with them.

    Raises:
        UserError: another process writes to the file, it is no such file, or it was made with other settings.
        DiskFullError: the disk is full; the lines before stay.
    """
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    with lock(path), explain_full_disk(path, "Free some and start the same command again; captions are kept."):
        try:
            torn = cut_torn_line(path)
            lines = read_lines(path)
        except ValueError as error:
            raise UserError(f"--output {path}: is not a captions file ({error}); choose another --output") from error
        if torn:
            print(f"{path}: its last line was not finished; the image is asked about again")
        _check_lines(lines, settings, path)
        fsync_path(path.parent)
        yield CaptionLedger(path, lines)


def _check_lines(lines: list, settings: dict, path: Path) -> None:
    for number, line in enumerate(lines, start=1):
        known = line if isinstance(line, dict) else {}
        if any(not isinstance(known.get(name), str) for name in ("picName", "model", "prompt")) or (
            ("description" in known) == ("set_aside" in known)
        ):
            raise UserError(
                f"--output {path}: line {number} was not written by this script (expected picName, model, prompt and "
                "description or set_aside); choose another --output"
            )
        for name in SETTINGS:
            if line.get(name) != settings.get(name):
                raise UserError(
                    f"--output {path}: line {number} was made with {name} {line.get(name)!r}, this run has "
                    f"{settings.get(name)!r}; choose another --output, or the same {name} as before"
                )
