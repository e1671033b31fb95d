"""The file that bought captions are kept in: one JSON line an image, added whole or not at all.

A line is written in one piece and brought to the disk as soon as its image is settled, so a run that was killed goes
on where it stood. Nothing about servers or images.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from meme_llava.errors import UserError
from meme_llava.storage.files import append_line, cut_torn_line, fsync_path, lock, read_lines

TORN_SUFFIX = ".torn"
# What makes two captions of an image the same purchase; a file holds captions of one kind only.
SETTINGS = ("model", "prompt")
_STRINGS = ("picName", *SETTINGS)


class CaptionLedger:
    """The lines of an open file. Made by `open_ledger`, which holds its lock.

    Attributes:
        entries: the last line of every image, by picName.
        torn_bytes: how many bytes of a line that was not written to its end were moved to the .torn file.
    """

    def __init__(self, path: Path, entries: list[dict], torn_bytes: int):
        self.path = path
        self.entries = {entry["picName"]: entry for entry in entries}
        self.torn_bytes = torn_bytes
        self.tokens: Counter[str] = Counter()
        for entry in entries:
            self._count(entry)

    def append(self, entry: dict) -> None:
        """Add a line and bring it to the disk.

        Raises:
            UserError: it cannot be written; nothing of it is left in the file.
        """
        try:
            append_line(self.path, entry)
        except OSError as error:
            raise UserError(
                f"{self.path}: the caption of {entry['picName']} cannot be written ({error.strerror}); "
                "free some space and start the same command again"
            ) from error
        self.entries[entry["picName"]] = entry
        self._count(entry)

    def _count(self, entry: dict) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            self.tokens[name] += entry.get(name) or 0


@contextlib.contextmanager
def open_ledger(path: Path, settings: dict[str, str]) -> Iterator[CaptionLedger]:
    """Open the captions file for adding, made if it does not exist, and keep other processes off it.

    A last line that a kill left unfinished is cut off; its bytes go to the file of the same name with .torn behind.

    Args:
        settings: model and prompt of this run; every line of the file must have been made with them.

    Raises:
        UserError: another process writes to the file, it is no such file, or it was made with other settings.
    """
    try:
        path.open("ab").close()
        fsync_path(path.parent)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    with lock(path):
        entries, torn_bytes = _read(path)
        _check_settings(entries, settings, path)
        yield CaptionLedger(path, entries, torn_bytes)


def _read(path: Path) -> tuple[list[dict], int]:
    """The lines of the file and the length of an unfinished last one, which is cut off."""
    try:
        if torn := cut_torn_line(path):
            with path.with_name(path.name + TORN_SUFFIX).open("ab") as file:
                file.write(torn + b"\n")
        entries = read_lines(path)
    except ValueError as error:
        raise UserError(f"--output {path}: {error}; choose another --output, or fix or remove the line") from error
    for number, entry in enumerate(entries, start=1):
        known = entry if isinstance(entry, dict) else {}
        if not all(isinstance(known.get(name), str) for name in _STRINGS) or ("description" in known) == (
            "set_aside" in known
        ):
            raise UserError(
                f"--output {path}: line {number} was not written by this script (expected {', '.join(_STRINGS)} and "
                "description or set_aside); choose another --output"
            )
    return entries, len(torn)


def _check_settings(entries: list[dict], settings: dict[str, str], path: Path) -> None:
    for number, entry in enumerate(entries, start=1):
        for name in SETTINGS:
            if entry[name] != settings[name]:
                raise UserError(
                    f"--output {path}: line {number} was made with {name} {entry[name]!r}, this run has "
                    f"{settings[name]!r}; choose another --output, or the same {name} as before"
                )
