"""The file that bought captions are kept in: one JSON line an image, added whole or not at all.

A line is written in one piece and brought to the disk as soon as its image is settled, so a run that was killed goes
on where it stood. Nothing about servers or images.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from meme_llava.errors import UserError

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

    def __init__(self, path: Path, descriptor: int, entries: list[dict], torn_bytes: int):
        self.path = path
        self.entries = {entry["picName"]: entry for entry in entries}
        self.torn_bytes = torn_bytes
        self.tokens: Counter[str] = Counter()
        for entry in entries:
            self._count(entry)
        self._descriptor = descriptor

    def append(self, entry: dict) -> None:
        """Add a line and bring it to the disk.

        Raises:
            UserError: it cannot be written; nothing of it is left in the file.
        """
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        end = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            # Cutting needs no space, so it succeeds where the writing did not.
            os.ftruncate(self._descriptor, end)
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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    try:
        _lock(descriptor, path)
        entries, torn_bytes = _read(descriptor, path)
        _check_settings(entries, settings, path)
        _bring_folder_to_disk(path)
        yield CaptionLedger(path, descriptor, entries, torn_bytes)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process writes captions to it; wait for it or stop it") from None
    except OSError:
        pass  # some network file systems know no locks


def _read(descriptor: int, path: Path) -> tuple[list[dict], int]:
    """The lines of the file and the length of an unfinished last one, which is cut off."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        content = file.read()
    *lines, rest = content.split(b"\n")
    entries = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if not rest:
        return entries, 0
    with contextlib.suppress(UserError):
        entry = _parse(rest, path, len(lines) + 1)
        # Only the line break is missing: the caption is paid for and whole.
        os.write(descriptor, b"\n")
        return [*entries, entry], 0
    if not lines and not rest.startswith(b"{"):
        raise UserError(f"--output {path}: is not a captions file; choose another --output")
    with path.with_name(path.name + TORN_SUFFIX).open("ab") as torn:
        torn.write(rest + b"\n")
    os.ftruncate(descriptor, len(content) - len(rest))
    os.fsync(descriptor)
    return entries, len(rest)


def _parse(line: bytes, path: Path, number: int) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"--output {path}: line {number} is not JSON ({error}); fix or remove the line, or choose another --output"
        ) from error
    known = entry if isinstance(entry, dict) else {}
    if not all(isinstance(known.get(name), str) for name in _STRINGS) or ("description" in known) == (
        "set_aside" in known
    ):
        raise UserError(
            f"--output {path}: line {number} was not written by this script (expected {', '.join(_STRINGS)} and "
            "description or set_aside); choose another --output"
        )
    return entry


def _check_settings(entries: list[dict], settings: dict[str, str], path: Path) -> None:
    for number, entry in enumerate(entries, start=1):
        for name in SETTINGS:
            if entry[name] != settings[name]:
                raise UserError(
                    f"--output {path}: line {number} was made with {name} {entry[name]!r}, this run has "
                    f"{settings[name]!r}; choose another --output, or the same {name} as before"
                )


def _bring_folder_to_disk(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
