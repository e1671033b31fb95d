"""A cache of what was found in image files, by the hash of their contents.

Nothing about how images are looked at.
"""

import json
import os
import sqlite3
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from meme_llava.storage.hashing import describe_state

# Raise it when inspection finds more or other things than before: results of older code are then looked up anew.
CACHE_VERSION = 1
FILES_PER_COMMIT = 500  # so that a check that is stopped goes on from there


@dataclass(frozen=True)
class ImageFacts:
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


class ImageCache:
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
        print(f"{self._file}: checked images cannot be remembered there ({error})", file=sys.stderr, flush=True)
        self._database = None

    def _prepare(self) -> None:
        # Another Pillow may find other faults.
        wanted = f"{CACHE_VERSION} pillow {version('pillow')}"
        if self._was_made_by(wanted):
            return
        if self._read_only:
            self._database.close()
            self._database = None
            return
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            # Another process may have done it in between.
            if self._was_made_by(wanted):
                return
            for table in ("maker", "files", "contents"):
                self._database.execute(f"DROP TABLE IF EXISTS {table}")
            self._database.execute("CREATE TABLE maker (version TEXT)")
            self._database.execute("CREATE TABLE files (path BLOB PRIMARY KEY, state TEXT, sha256 TEXT)")
            self._database.execute("CREATE TABLE contents (sha256 TEXT PRIMARY KEY, facts TEXT)")
            self._database.execute("INSERT INTO maker VALUES (?)", (wanted,))

    def _was_made_by(self, maker: str) -> bool:
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return "maker" in tables and self._database.execute("SELECT version FROM maker").fetchone() == (maker,)

    @property
    def holds_contents(self) -> bool:
        """Whether anything is known."""
        return self._read("SELECT 1 FROM contents LIMIT 1", ()) is not None

    def look_up(self, path: Path) -> ImageFacts | None:
        """What is known about a file, or None if it is unknown or changed since."""
        state = describe_state(path)
        if state is None:
            return None
        query = "SELECT facts FROM files JOIN contents USING (sha256) WHERE path = ? AND state = ?"
        return _parse_facts(self._read(query, (os.fsencode(path), state)))

    def look_up_contents(self, sha256: str | None) -> ImageFacts | None:
        """What is known about contents, whatever file they are in."""
        return _parse_facts(self._read("SELECT facts FROM contents WHERE sha256 = ?", (sha256,)))

    def _read(self, query: str, values: tuple) -> tuple | None:
        if self._database is None:
            return None
        try:
            return self._database.execute(query, values).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None

    def remember(self, path: Path, facts: ImageFacts) -> None:
        """Keep what was found in a file; written with `commit`, or when there is much of it."""
        state = describe_state(path)
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


def _parse_facts(row: tuple | None) -> ImageFacts | None:
    if row is None:
        return None
    values = json.loads(row[0])
    fault = values["fault"]
    return ImageFacts(
        **values | {"notes": tuple(map(tuple, values["notes"])), "fault": tuple(fault) if fault else None}
    )
