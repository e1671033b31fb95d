"""Files that are whole or what they were before, lines that are added one by one, locks, hashes.

Everything reaches the disk before its name does. A file gets the mode that the umask allows.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from meme_llava.errors import DiskFullError, UserError, is_disk_full

BEING_WRITTEN = "{}: is being written by another process; wait for it or stop it"


def write_whole(path: Path, content: str | bytes, fsync: bool = True) -> None:
    """Write a file in one step: it is whole or what it was before. Text is written as UTF-8.

    Args:
        fsync: bring it to the disk; off for files of which a later `os.sync()` takes many at once.

    Raises:
        OSError: the folder is missing, full, or cannot be written to.
    """
    # Of this process alone: several may write the same file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value, default=None) -> None:
    """Write readable JSON in one step; `default` as in `json.dumps`. Half a character becomes an escape of JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=default) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_lines(path: Path, values: Iterable) -> None:
    """Write a JSONL file in one step."""
    write_whole(path, b"".join(map(to_line, values)))


def to_line(value, default=None) -> bytes:
    """A value as a line of JSONL. Half a character has no UTF-8; an escape of JSON keeps it."""
    return json.dumps(value, ensure_ascii=False, default=default).encode("utf-8", "backslashreplace") + b"\n"


def append_line(path: Path, value) -> None:
    """Add a value to a JSONL file and bring it to the disk. Raises OSError; nothing of the line is left then."""
    line = to_line(value)
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            # Cutting needs no space, so it succeeds where the writing did not.
            file.truncate(end)
            raise


def cut_torn_line(path: Path) -> bytes:
    """Cut off a last line that a kill left unfinished, and return its bytes; a line that lacks only its end gets it.

    Raises:
        ValueError: the file is one line that is no JSON object, so it is not of ours.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    torn = content[len(whole) :]
    if not torn:
        return b""
    with contextlib.suppress(ValueError):
        json.loads(torn)
        with path.open("ab") as file:
            file.write(b"\n")
        return b""
    if not whole and not torn.startswith(b"{"):
        raise ValueError("holds no lines of JSON")
    os.truncate(path, len(whole))
    return torn


def read_lines(path: Path) -> list:
    """The values of a JSONL file of ours. Raises ValueError with the number of a line that is not JSON."""
    values = []
    # Text may hold other separators of lines, at which splitlines would cut.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            values += [json.loads(line)] if line else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
    return values


@contextlib.contextmanager
def lock(path: Path, patience: float = 0, result: Path | None = None) -> Iterator[None]:
    """Keep other processes off a folder or file; the kernel lets go of it when this process ends, however it does.

    Args:
        patience: seconds to wait for a lock that another process holds.
        result: what is made under the lock, where the user knows that by another name than `path`.

    Raises:
        UserError: another process still holds it.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    end = time.monotonic() + patience
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise UserError(BEING_WRITTEN.format(result or path))
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def open_alone(path: Path, result: Path) -> BinaryIO:
    """An empty file to write, which becomes `result` and keeps other processes off until it is closed.

    Raises:
        OSError: it cannot be written.
        UserError: another process writes it.
    """
    while True:
        file = path.open("ab")
        if not _try_lock(file.fileno()):
            file.close()
            raise UserError(BEING_WRITTEN.format(result))
        # Between opening and locking, the process that wrote it may have given it its final name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems know no locks
    return True


@contextlib.contextmanager
def explain_full_disk(path: Path, advice: str) -> Iterator[None]:
    """Raise DiskFullError, with what to do, where the block finds no room."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(f"{path}: the disk is full. {advice}") from error


@contextlib.contextmanager
def raise_os_errors() -> Iterator[None]:
    """Raise as the OSError that it is what tokenizers, written in Rust, reports of the operating system."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)$", str(error))
        if found is None:
            raise
        raise OSError(number := int(found[1]), os.strerror(number)) from error


def fsync_path(path: Path) -> None:
    """Return when a file's or directory's content would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
