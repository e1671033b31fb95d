"""The manifest of a folder: every file with its size and sha256, written last, so that a whole folder can be told from
a part.

`manifest.json` is canonical: JSON with sorted keys and an indent of two, whose `manifest_sha256` is the sha256 of the
same text without that key. So a change of any byte, in a file or in the manifest itself, is found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from meme_llava.errors import CheckpointError
from meme_llava.storage.files import hash_file, write_whole

MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"


def describe_file(path: Path) -> dict:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def write_manifest(folder: Path, files: Mapping[str, dict], facts: Mapping) -> None:
    """Write the manifest of a directory.

    Args:
        files: {name: what `describe_file` returned} of every file that belongs to the directory.
        facts: what else a reader must know before it takes the directory.
    """
    content = {**facts, "files": dict(files)}
    own_hash = hashlib.sha256(_to_text(content).encode()).hexdigest()
    write_whole(folder / MANIFEST, _to_text({**content, _OWN_HASH: own_hash}))


def read_manifest(folder: Path) -> dict:
    """The manifest's content. Raises CheckpointError when it is missing or any of its bytes changed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was not written to its end, or not copied whole")
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        own_hash = content.pop(_OWN_HASH)
        whole = _to_text({**content, _OWN_HASH: own_hash}) == text
        if not whole or own_hash != hashlib.sha256(_to_text(content).encode()).hexdigest():
            raise ValueError("its own checksum differs")
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error
    return content


def verify_directory(folder: Path) -> dict:
    """Read every file that the manifest lists, and return the manifest's content.

    Raises:
        CheckpointError: the first thing that is wrong, with the file's name.
    """
    content = read_manifest(folder)
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, {MANIFEST} lists it")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path}: has {size} bytes, {MANIFEST} says {expected['size']}")
        if hash_file(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its contents changed since it was written (sha256 differs)")
    return content


def _to_text(content: Mapping) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
