"""Which weights a folder holds: a hash over all tensors, and whether they are those that it was written with."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from meme_llava import count_cores
from meme_llava.errors import CheckpointError
from meme_llava.storage.files import hash_file, write_whole
from meme_llava.storage.run_record import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LANGUAGE_LORA,
    MANIFEST,
    RUN_RECORD,
    holds_trained_weights,
    read_manifest,
    read_run_record,
    read_trained_record,
)
from meme_llava.storage.tensor_files import StoredTensor, open_model_tensors, view_bytes

HASHING_THREADS = 4


def fingerprint_folder(folder: Path) -> str:
    """The fingerprint of a model folder's weights, whatever files they are divided into: 64 hexadecimal digits.

    It is a sha256 over every tensor's name, shape, dtype and bytes, and over the files of a LoRA that is kept apart,
    whose configuration holds the factor of its product. 15 GB take seconds to hash, so what was found is
    remembered together with the state of the files it was found in.

    Raises:
        UserError: the folder holds no weights, or a file of them is damaged.
    """
    tensors = dict(sorted(open_model_tensors(folder).items()))
    apart = [folder / LANGUAGE_LORA / name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
    apart = [path for path in apart if path.is_file()]
    paths = [*sorted({stored.path for stored in tensors.values()}), *apart]
    # Files whose contents change get another state, as git takes it; nobody can set the time of a change back. It goes
    # without their names, so that a folder that is renamed when it is whole is found again.
    states = [
        (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for state in (path.stat() for path in paths)
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "meme_llava", "fingerprints")
    remembered = cache / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return remembered.read_text(encoding="ascii")
    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(HASHING_THREADS, count_cores())) as pool:
        for name, digest in zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True):
            whole.update(f"{name} {digest}\n".encode())
    for path in apart:
        whole.update(f"{path.name} {hash_file(path)}\n".encode())
    fingerprint = whole.hexdigest()
    # A home that cannot be written, or of which the system knows nothing (then ~ stays), costs time alone.
    with contextlib.suppress(OSError):
        if cache.is_absolute():
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(remembered, fingerprint)
    return fingerprint


def _hash_tensor(stored: StoredTensor) -> str:
    digest = hashlib.sha256(f"{stored.shape} {stored.dtype}\n".encode())
    for piece in stored.make_pieces():
        digest.update(view_bytes(piece))
    return digest.hexdigest()


def check_weights(folder: Path) -> str:
    """The fingerprint of a model folder, which is that of its run record if it has one with a fingerprint.

    Raises:
        CheckpointError: the weights are not those that the folder was written with.
        UserError: the folder holds no weights, or a file of them is damaged.
    """
    fingerprint = fingerprint_folder(folder)
    record = read_run_record(folder) if (folder / RUN_RECORD).is_file() else {}
    if record.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"{folder}: its weights are not those that it was written with (the fingerprint of {RUN_RECORD} differs). "
            f"Copy or make it again; if they were changed on purpose, delete its {RUN_RECORD}"
        )
    return fingerprint


def identify_weights(folder: Path) -> str:
    """64 hexadecimal digits that are others whenever the weights are: of a whole model, or of trained weights and base.

    Raises:
        UserError: the folder holds neither, or damaged ones.
    """
    if not holds_trained_weights(folder):
        return check_weights(folder)
    read_run_record(folder)
    read_manifest(folder)
    # The manifest lists the hash of the weights and that of their run record, which names the base.
    return hash_file(folder / MANIFEST)


def find_base(adapter: Path, base_model: Path | None) -> Path:
    """The base model that trained weights belong to.

    Args:
        adapter: output or checkpoint of train.py.
        base_model: where the base is now, if it moved since training.

    Raises:
        UserError: `adapter` holds no trained weights, is damaged, or its base is missing or another one.
    """
    record = read_trained_record(adapter)
    folder = base_model or Path(record["base"]["folder"])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the base model of {adapter} is not there; say where it is with --base_model")
    if check_weights(folder) != record["base"]["fingerprint"]:
        raise CheckpointError(
            f"{folder}: is not the base model that {adapter} was trained on (their weights differ); give the right "
            "one with --base_model"
        )
    return folder
