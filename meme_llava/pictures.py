"""Knows what is found by opening picture files: many in parallel, each content once.

Results are kept by the hash of a file's contents, so a second look at the same files takes seconds. Knows nothing about
records.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from meme_llava.findings import RecordFault
from meme_llava.images import PARSER_ERRORS, list_header_notes, open_header, open_image

SMALLEST_SIDE = 4  # pixels; less is a tracking dot, no picture
LOW_RESOLUTION = 64  # pixels; a line of words needs more
EXTREME_RATIO = 50  # of the sides
STRETCHED_RATIO = 4
EXTENSIONS = {
    "JPEG": {".jpg", ".jpeg", ".jfif", ".jpe"},
    "PNG": {".png", ".apng"},
    "GIF": {".gif"},
    "WEBP": {".webp"},
    "BMP": {".bmp", ".dib"},
}
PICTURE_SUFFIXES = frozenset().union(*EXTENSIONS.values())
# Raise it when inspection finds more or other things than before: results of older code are then looked up anew.
CACHE_VERSION = 1
FILES_PER_TASK = 16
FILES_PER_COMMIT = 500  # so that a check that is stopped goes on from there


@dataclass(frozen=True)
class PictureFacts:
    """What the contents of one file are, whatever its name and whatever limits a run has.

    `fault` is (kind of finding, detail) if it cannot be used. `decoded` is False if only the header was read.
    """

    sha256: str | None
    format: str | None = None
    width: int = 0
    height: int = 0
    notes: tuple[tuple[str, str], ...] = ()
    fault: tuple[str, str] | None = None
    decoded: bool = False


def inspect_picture(path: Path, max_pixels: int, decode: bool = True) -> PictureFacts:
    """Open a file and say what it is, after decoding it whole unless it has more than `max_pixels`.

    Without `decode` only the header is read: its format and size are known then, nothing else.
    """
    try:
        with warnings.catch_warnings(record=True, action="always") as caught, open_header(path, sys.maxsize) as image:
            width, height = image.size
            if not decode:
                return PictureFacts(None, image.format, width, height)
            sha256 = _hash(path)
            if width * height > max_pixels:
                return PictureFacts(sha256, image.format, width, height)
            notes = _list_notes(image)
            # Pillow reads EXIF blocks with its parser for TIFF.
            broken = [str(warning.message) for warning in caught if "TiffImagePlugin" in warning.filename]
            if broken:
                notes.append(("broken_exif", broken[0]))
        open_image(path, max_pixels=max_pixels)
        return PictureFacts(sha256, image.format, width, height, tuple(notes), decoded=True)
    except RecordFault as fault:
        has_contents = decode and fault.kind not in ("missing_picture", "unreadable_file")
        # The same contents may stand under another name.
        detail = str(fault).removeprefix(f"{path}: ")
        return PictureFacts(_hash(path) if has_contents else None, fault=(fault.kind, detail), decoded=decode)


def _list_notes(image: Image.Image) -> list[tuple[str, str]]:
    try:
        return list(list_header_notes(image))
    except PARSER_ERRORS as error:
        raise RecordFault("damaged_picture", f"the picture is damaged ({error})") from error


def judge_picture(path: Path, facts: PictureFacts, max_pixels: int) -> list[tuple[str, str]]:
    """The findings about a file, as (kind, detail), under this run's limits."""
    if facts.fault is not None:
        return [(facts.fault[0], f"{path}: {facts.fault[1]}")]
    width, height = facts.width, facts.height
    shape = f"{path}: {width}x{height} pixels"
    if width * height > max_pixels:
        return [("too_many_pixels", f"{shape}, more than the limit of {max_pixels:,}")]
    found = [(kind, f"{path}: {detail}") for kind, detail in facts.notes]
    if path.suffix.lower() not in EXTENSIONS[facts.format]:
        found.append(("wrong_extension", f"{path}: holds a {facts.format}"))
    if min(width, height) < SMALLEST_SIDE:
        found.append(("too_small", shape))
    elif min(width, height) < LOW_RESOLUTION:
        found.append(("low_resolution", shape))
    if max(width, height) > EXTREME_RATIO * min(width, height):
        found.append(("extreme_shape", shape))
    elif max(width, height) > STRETCHED_RATIO * min(width, height):
        found.append(("stretched_shape", shape))
    return found


def inspect_pictures(
    paths: Iterable[Path],
    max_pixels: int,
    cache: "PictureCache",
    workers: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[Path, PictureFacts]:
    """Open and decode every file that the cache does not know, in parallel.

    Args:
        workers: processes; None takes the CPUs this process may use.
        advance: takes how many files were done.
    """
    found, unknown = {}, []
    for path in dict.fromkeys(paths):
        facts = cache.look_up(path)
        if facts is not None and (facts.decoded or facts.width * facts.height > max_pixels):
            found[path] = facts
        else:
            unknown.append(path)
    advance(len(found))
    workers = min(workers or len(os.sched_getaffinity(0)), -(-len(unknown) // FILES_PER_TASK))
    inspect = partial(inspect_picture, max_pixels=max_pixels)
    # Forked workers start at once; a picture that kills its decoder then kills no more than the worker.
    fork = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        stack.callback(cache.commit)
        run = map
        if workers > 1:
            run = stack.enter_context(ProcessPoolExecutor(workers, fork)).map
            run = partial(run, chunksize=FILES_PER_TASK)
        for path, facts in zip(unknown, run(inspect, unknown), strict=True):
            found[path] = facts
            cache.remember(path, facts)
            advance(1)
    return found


class PictureCache:
    """What was found in files before, by the hash of their contents; a file's hash is kept by its size and times.

    Args:
        file: an SQLite database, made when missing; None keeps nothing.
        read_only: for training, where many processes read and none writes.
    """

    def __init__(self, file: Path | None, read_only: bool = False):
        self._read_only = read_only
        self._database = None
        self._file = file
        # Written together, since a check that held the database for its whole length would keep others from it.
        self._unwritten: list[tuple[bytes, str, str, str]] = []
        if file is None or (read_only and not file.is_file()):
            return
        try:
            if not read_only:
                file.parent.mkdir(parents=True, exist_ok=True)
            mode = "ro" if read_only else "rwc"
            self._database = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # A read-only home must not keep anybody from training; the check only takes longer.
        print(f"{self._file}: checked pictures cannot be remembered there ({error})", file=sys.stderr, flush=True)
        self._database = None

    def _prepare(self) -> None:
        # Another Pillow may find other faults.
        wanted = f"{CACHE_VERSION} pillow {version('pillow')}"
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "maker" in tables and self._database.execute("SELECT version FROM maker").fetchone() == (wanted,):
            return
        if self._read_only:
            self._database.close()
            self._database = None
            return
        with self._database:
            for table in ("maker", "files", "contents"):
                self._database.execute(f"DROP TABLE IF EXISTS {table}")
            self._database.execute("CREATE TABLE maker (version TEXT)")
            self._database.execute("CREATE TABLE files (path BLOB PRIMARY KEY, state TEXT, sha256 TEXT)")
            self._database.execute("CREATE TABLE contents (sha256 TEXT PRIMARY KEY, facts TEXT)")
            self._database.execute("INSERT INTO maker VALUES (?)", (wanted,))

    def look_up(self, path: Path) -> PictureFacts | None:
        """What is known about a file, or None if it is unknown or changed since."""
        state = _describe_state(path)
        if self._database is None or state is None:
            return None
        try:
            row = self._database.execute(
                "SELECT facts FROM files JOIN contents USING (sha256) WHERE path = ? AND state = ?",
                (os.fsencode(path), state),
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        if row is None:
            return None
        values = json.loads(row[0])
        fault = values["fault"]
        return PictureFacts(
            **values | {"notes": tuple(map(tuple, values["notes"])), "fault": tuple(fault) if fault else None}
        )

    def remember(self, path: Path, facts: PictureFacts) -> None:
        """Keep what was found in a file; written with `commit`, or when there is much of it."""
        state = _describe_state(path)
        if self._database is None or self._read_only or facts.sha256 is None or state is None:
            return
        self._unwritten.append((os.fsencode(path), state, facts.sha256, json.dumps(asdict(facts))))
        if len(self._unwritten) >= FILES_PER_COMMIT:
            self.commit()

    def commit(self) -> None:
        """Write what was remembered."""
        if self._database is None:
            return
        try:
            with self._database:
                for path, state, sha256, facts in self._unwritten:
                    self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (path, state, sha256))
                    self._database.execute("INSERT OR REPLACE INTO contents VALUES (?, ?)", (sha256, facts))
        except sqlite3.Error as error:
            self._give_up(error)
        self._unwritten = []


def find_default_cache() -> Path:
    """Where checked pictures are remembered unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meme_llava" / "pictures.sqlite"


def _describe_state(path: Path) -> str | None:
    # As git does: contents cannot change without one of these changing.
    try:
        state = path.stat()
    except OSError:
        return None
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
