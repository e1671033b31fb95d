"""Hashes of files and of their state."""

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """sha256, in hex, of the contents of several files in their order; of one that comes again, the first time."""
    whole = hashlib.sha256()
    for path in dict.fromkeys(paths):
        whole.update(hash_file(path).encode())
    return whole.hexdigest()


def try_hash_file(path: Path) -> str | None:
    """Like `hash_file`, or None for what has no contents to compare: missing, unreadable, a pipe or a folder."""
    try:
        # A pipe would block for ever.
        return hash_file(path) if stat.S_ISREG(path.stat().st_mode) else None
    except OSError:
        return None


def describe_state(path: Path) -> str | None:
    """What changes whenever a file's contents change, as git takes it; None if there is no such file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
