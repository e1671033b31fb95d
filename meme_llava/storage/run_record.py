"""How an output folder came to be: its run record, the libraries of that day, the base that an adapter needs."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from meme_llava import ROOT
from meme_llava.errors import UserError
from meme_llava.storage.manifest import verify_directory

RUN_RECORD = "run_record.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What learned in full, for train types without LoRA: the classic names of design, only trained tensors.
TRAINED_WEIGHTS = "trained_weights.safetensors"
# In front of a parameter group's name where a training log keeps its learning rate.
RATE_PREFIX = "learning_rate/"
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
