"""How an output folder came to be: its run record and log, its manifest, the note of what it was made from.

The manifest lists every file with its size and sha256 and is written last, so that a whole folder can be told from a
part. `manifest.json` is canonical: JSON with sorted keys and an indent of two, whose `manifest_sha256` is the sha256 of
the same text without that key. So a change of any byte, in a file or in the manifest itself, is found.
"""

import contextlib
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from meme_llava import ROOT
from meme_llava.errors import CheckpointError, UserError
from meme_llava.storage.files import hash_file, write_json, write_whole
from meme_llava.storage.json_files import DAMAGED, check_fields, read_json

RUN_RECORD = "run_record.json"
TRAINING_LOG = "trainer_state.json"  # where Hugging Face's Trainer has it, too: an entry a logged step
MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LANGUAGE_LORA = "language_lora"  # folder of what `merge_lora.py --export vllm_lora` keeps apart
# What learned in full, for train types without LoRA: the classic names of design, only trained tensors.
TRAINED_WEIGHTS = "trained_weights.safetensors"
LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "tokenizers", "pillow"),
    "bitsandbytes",
)
# What those who read a run record of train.py rely on.
TRAINED_FIELDS = {
    "base.folder": str,
    "base.fingerprint": str,
    "data.annotations": str,
    "data.image_folder": str,
    "settings.max_pixels": int,
    "parameter_groups": list,
}
RATE_PREFIX = "learning_rate/"  # in front of a parameter group's name in a training log


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
    content = read_json(path, error=CheckpointError)
    check_fields(path, content, {_OWN_HASH: str, "files": dict}, error=CheckpointError)
    own_hash, text = content.pop(_OWN_HASH), path.read_bytes().decode()
    if (
        text != _to_text({**content, _OWN_HASH: own_hash})
        or own_hash != hashlib.sha256(_to_text(content).encode()).hexdigest()
    ):
        raise CheckpointError(f"{path}: is damaged (its own checksum differs)")
    for name, file in content["files"].items():
        if Path(name).name != name:
            raise CheckpointError(f"{path}: lists {name!r}, expected a file of its own folder. {DAMAGED}")
        check_fields(path, file, {"size": int, "sha256": str}, error=CheckpointError)
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


def list_library_versions() -> dict[str, str | None]:
    """The versions of the libraries that a run depends on; None for one that is not installed."""
    libraries = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return libraries


def describe_environment() -> dict:
    """Library versions, Python and the git commit of this code, for a run record."""
    changed = _ask_git("status", "--porcelain")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": list_library_versions(),
        "git_commit": _ask_git("rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
    }


def _ask_git(*words: str) -> str | None:
    """What git says of this code; None where there is no git, or no checkout that it may read."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()
    return None


def write_run_record(folder: Path, stage: str, **facts) -> None:
    """Say in an output folder which stage wrote it, with what, and in which environment."""
    write_json(folder / RUN_RECORD, {"stage": stage, **facts, "environment": describe_environment()})


def read_run_record(directory: Path) -> dict:
    """The run record of a directory that one of our scripts wrote.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = directory / RUN_RECORD
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    check_not_unfinished(directory)
    if not path.is_file():
        if directory.name == LANGUAGE_LORA and (directory.parent / RUN_RECORD).is_file():
            raise UserError(f"{directory}: is for vLLM alone; give {_name_adapter(directory.parent)}")
        raise UserError(f"{directory}: has no {RUN_RECORD}, so it is not a finished output of our scripts")
    return read_json(path)


def _name_adapter(merged: Path) -> str:
    """What a merged model was made from, in the words of its record."""
    return f"what learned it (--adapter {read_json(merged / RUN_RECORD).get('settings', {}).get('adapter')})"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first; whether they are whole is not looked at."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=read_step)


def read_step(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def check_is_whole(folder: Path) -> None:
    """Raise UserError for a model without a part of what it learned."""
    if (folder / LANGUAGE_LORA).is_dir():
        raise UserError(
            f"{folder}: is for vLLM (--export vllm_lora), and what its language model learned is apart, in "
            f"{LANGUAGE_LORA}. Merge without --export, or give {_name_adapter(folder)}"
        )


def check_not_unfinished(directory: Path) -> None:
    """Raise UserError for the folder of a training that has no result yet."""
    if not (directory / RUN_RECORD).is_file() and (checkpoints := list_checkpoints(directory)):
        newest = checkpoints[-1]
        raise UserError(
            f"{directory}: its training has not finished (there is {newest.name} and no {RUN_RECORD}). Wait if it "
            "still runs, else continue it (bash run.sh train with the same variables, or train.py "
            f"--resume_from_checkpoint latest), or give {newest}"
        )


def holds_trained_weights(directory: Path) -> bool:
    """Whether `directory` is an output or checkpoint of train.py, which needs its base model."""
    return (directory / ADAPTER_WEIGHTS).is_file() or (directory / TRAINED_WEIGHTS).is_file()


def read_trained_record(folder: Path) -> dict:
    """The run record of an output or checkpoint of train.py, of which every byte is as it was written.

    Raises:
        UserError: `folder` holds no trained weights or is damaged.
    """
    record = read_run_record(folder)
    if record.get("stage") == "merge":
        raise UserError(f"{folder}: is a merged model, expected {_name_adapter(folder)}")
    if not holds_trained_weights(folder):
        raise UserError(
            f"{folder}: holds neither {ADAPTER_WEIGHTS} nor {TRAINED_WEIGHTS}; expected an output_dir or checkpoint "
            "of train.py"
        )
    verify_directory(folder)
    check_fields(folder / RUN_RECORD, record, TRAINED_FIELDS, error=CheckpointError)
    return record


def write_training_log(folder: Path, step: int, entries: list[dict]) -> None:
    """Write the entries up to an optimizer step."""
    write_json(folder / TRAINING_LOG, {"global_step": step, "log_history": entries})


def read_training_log(folder: Path) -> list[dict]:
    """The entries that a checkpoint or a finished run keeps. Raises UserError where there are none."""
    path = folder / TRAINING_LOG
    log = read_json(path)
    check_fields(path, log, {"log_history": list})
    return log["log_history"]
