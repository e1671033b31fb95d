"""The folder of what is kept between runs."""

import os
from pathlib import Path


def find_cache() -> Path:
    """Where fingerprints are remembered unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meme_llava"
