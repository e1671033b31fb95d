"""Knows how the contents of a file get a name of their own."""

import hashlib
from pathlib import Path


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
