"""Knows what a directory that we write holds: file names, the run record, complete or absent.

Every directory stands alone: it loads without any other, and its run record says how it came to be.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from meme_llava.errors import CheckpointError, DiskFullError, UserError, means_full_disk
from meme_llava.paths import ROOT
from meme_llava.storage.fingerprint import fingerprint_folder
from meme_llava.storage.hashing import hash_file
from meme_llava.storage.manifest import MANIFEST, verify_directory

RUN_RECORD = "run_record.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What learned in full, for train types without LoRA: the classic names of design, only trained tensors.
TRAINED_WEIGHTS = "trained_weights.safetensors"
RECORDED_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "pillow",
)


@contextlib.contextmanager
def write_directory(output_dir: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory beside `output_dir` and rename it into place when the block succeeds.

    Everything is on the disk before the rename, so whenever the machine or the process stops, `output_dir` is what it
    was before or the complete result. What a killed process left is removed by the next one. A directory that is
    replaced stands as `.NAME.replaced` for the moment between two renames; it comes back if that was the last moment.

    Raises:
        UserError: `output_dir` is a file, holds something and `overwrite` is off, or another process writes it.
    """
    if output_dir.is_symlink():
        output_dir = output_dir.resolve()  # to a larger disk; the link stays
    temporary = output_dir.with_name(f".{output_dir.name}.incomplete")
    replaced = output_dir.with_name(f".{output_dir.name}.replaced")
    if replaced.exists() and not output_dir.exists():
        replaced.rename(output_dir)
    check_output_dir(output_dir, overwrite)
    temporary.mkdir(parents=True, exist_ok=True)
    with lock_directory(temporary):
        empty_directory(temporary)
        _remove(replaced)
        try:
            yield temporary
            set_file_modes(temporary)
            for path in (*sorted(temporary.rglob("*")), temporary):
                bring_to_disk(path)
            check_output_dir(output_dir, overwrite)  # again: it took a while
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and means_full_disk(error):
                raise DiskFullError(
                    f"{temporary}: the disk is full. Free some, or choose another --output_dir."
                ) from error
            raise
        if output_dir.exists():
            output_dir.rename(replaced)
        temporary.rename(output_dir)
        bring_to_disk(output_dir.parent)
        _remove(replaced)


@contextlib.contextmanager
def lock_directory(directory: Path, patience: float = 0) -> Iterator[None]:
    """Keep other processes off a directory; the kernel lets go of the lock when this process ends, however it does.

    Args:
        patience: seconds to wait for a lock that another process holds.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    end = time.monotonic() + patience
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise UserError(f"{directory}: is being written by another process; wait for it or stop it")
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems know no locks
    return True


def empty_directory(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(replaced: Path) -> None:
    # Under another name first: half of a directory must not come back as the old result.
    removed = replaced.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if replaced.exists():
        replaced.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def bring_to_disk(path: Path) -> None:
    """Return when a file's or directory's content would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_apart(output_dir: Path, inputs: dict[str, Path]) -> None:
    """Raise UserError if writing `output_dir` could touch an input, given as {what it is: its folder}."""
    output = output_dir.resolve()
    for name, folder in inputs.items():
        path = folder.resolve()
        if output.is_relative_to(path) or path.is_relative_to(output):
            raise UserError(f"{output_dir}: is, holds or lies in the {name} {folder}; choose another --output_dir")


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raise UserError unless something may be written to `output_dir`; --overwrite replaces only what we wrote."""
    if output_dir.name in ("", ".."):
        raise UserError(f"{output_dir}: is no name for a new directory; give --output_dir one of its own")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file, expected a directory to write to")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise UserError(f"{output_dir}: is not empty. Choose another --output_dir, or pass --overwrite to replace it.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / RUN_RECORD).is_file():
        raise UserError(
            f"{output_dir}: has no {RUN_RECORD}, so it is no output of ours and --overwrite leaves it alone. Choose "
            "another --output_dir, or delete it yourself."
        )


def set_file_modes(directory: Path) -> None:
    """Give weight files the mode that the umask allows; safetensors writes them readable by the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def describe_environment() -> dict:
    """Library versions, Python and the git commit of this code, for a run record."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: _find_version(name) for name in RECORDED_LIBRARIES},
        "git_commit": commit.stdout.strip() or None,
        "git_changed_files": len(changed.stdout.splitlines()),
    }


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: Path, value) -> None:
    """Write readable UTF-8 JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_run_record(directory: Path) -> dict:
    """The run record of a directory that one of our scripts wrote.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = directory / RUN_RECORD
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not path.is_file():
        raise UserError(f"{directory}: has no {RUN_RECORD}, so it is not a finished output of our scripts")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is damaged ({error})") from error


def holds_trained_weights(directory: Path) -> bool:
    """Whether `directory` is an output or checkpoint of train.py, which needs its base model."""
    return (directory / ADAPTER_WEIGHTS).is_file() or (directory / TRAINED_WEIGHTS).is_file()


def identify_weights(folder: Path) -> str:
    """64 hexadecimal digits that are others whenever the weights are: of a whole model, or of trained weights and base.

    Raises:
        UserError: the folder holds neither.
    """
    # The manifest of trained weights lists their hash and that of their run record, which names the base.
    return hash_file(folder / MANIFEST) if holds_trained_weights(folder) else fingerprint_folder(folder)


def read_trained_record(folder: Path) -> dict:
    """The run record of an output or checkpoint of train.py, of which every byte is as it was written.

    Raises:
        UserError: `folder` holds no trained weights or is damaged.
    """
    record = read_run_record(folder)
    if not holds_trained_weights(folder):
        raise UserError(
            f"{folder}: holds neither {ADAPTER_WEIGHTS} nor {TRAINED_WEIGHTS}; expected an output_dir or checkpoint "
            "of train.py"
        )
    verify_directory(folder)
    return record


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
    if fingerprint_folder(folder) != record["base"]["fingerprint"]:
        raise CheckpointError(
            f"{folder}: is not the base model that {adapter} was trained on (their weights differ); give the right "
            "one with --base_model"
        )
    return folder
