"""Folders of models and results: outputs written whole or not at all, inputs from the disk or a hub.

Every output stands alone: it loads without any other, and its run record says how it came to be.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from meme_llava.errors import UserError, first_line
from meme_llava.storage.files import explain_full_disk, fsync_path, lock, raise_os_errors
from meme_llava.storage.proxy import check_proxy
from meme_llava.storage.run_record import RUN_RECORD

MODELSCOPE_PREFIX = "modelscope:"
DESCRIPTION_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


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
    check_output_dir(output_dir, overwrite)
    temporary = output_dir.with_name(f".{output_dir.name}.incomplete")
    replaced = output_dir.with_name(f".{output_dir.name}.replaced")
    if replaced.exists() and not output_dir.exists():
        replaced.rename(output_dir)
        check_output_dir(output_dir, overwrite)
    temporary.mkdir(parents=True, exist_ok=True)
    with lock(temporary, result=output_dir), explain_full_disk(temporary, "Free some, or choose another --output_dir."):
        empty_directory(temporary)
        _remove(replaced)
        try:
            with raise_os_errors():
                yield temporary
            for path in (*sorted(temporary.rglob("*")), temporary):
                fsync_path(path)
            check_output_dir(output_dir, overwrite)  # again: it took a while
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if output_dir.exists():
            output_dir.rename(replaced)
        temporary.rename(output_dir)
        fsync_path(output_dir.parent)
        _remove(replaced)


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
        raise UserError(f"{output_dir}: is not a name for a new directory; give --output_dir one of its own")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir}: is a file, expected a directory to write to")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output_dir}: is not empty. Choose another --output_dir, or pass --overwrite to replace it.")
    if not (output_dir / RUN_RECORD).is_file():
        raise UserError(
            f"{output_dir}: has no {RUN_RECORD}, so it is not an output of ours and --overwrite leaves it alone. "
            "Choose another --output_dir."
        )


def resolve_model_folder(name: str) -> Path:
    """The local folder of `name`: a folder itself, a hub id `org/model`, or `modelscope:org/model`.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as huggingface_hub documents them.

    Raises:
        UserError: nothing is found under that name, with what was tried.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(MODELSCOPE_PREFIX):
        return _download_from_modelscope(name.removeprefix(MODELSCOPE_PREFIX))
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{name}: no such folder. Give a folder with config.json and weights, a hub id such as "
            f"Qwen/Qwen2-7B-Instruct, or a ModelScope id such as {MODELSCOPE_PREFIX}qwen/Qwen2-7B-Instruct."
        )
    return _download_from_hub(name)


def _download_from_hub(model_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError

    check_proxy()
    # Subfolders hold other formats (onnx, original) that nothing here reads.
    download = partial(snapshot_download, model_id, ignore_patterns=["*/*"])
    try:
        folder = Path(download(allow_patterns=DESCRIPTION_FILES))
        # Chinese-CLIP comes as pytorch_model.bin only; where both forms exist one download is enough.
        return folder if any(folder.glob("*.safetensors")) else Path(download(allow_patterns=["*.bin"]))
    # HTTPError also is a line that breaks or a proxy that refuses; ValueError a log-in page in place of JSON.
    except (HTTPError, OSError, ValueError) as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{model_id}: is not a local folder, HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} "
                "does not hold all of it. Unset HF_HUB_OFFLINE to download it, or give a folder."
            ) from error
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UserError(
            f"{model_id}: is not a local folder, and downloading it from {endpoint} failed: {first_line(error)}\n"
            "Check the spelling; behind a slow or closed connection set HF_ENDPOINT to a mirror, use "
            f"{MODELSCOPE_PREFIX}{model_id}, or download it elsewhere and give the folder."
        ) from error


def _download_from_modelscope(model_id: str) -> Path:
    try:
        from modelscope import snapshot_download as download
    except ImportError as error:
        raise UserError(
            f"{MODELSCOPE_PREFIX}{model_id} needs the modelscope package: pip install modelscope"
        ) from error
    try:
        return Path(download(model_id))
    except Exception as error:  # modelscope raises its own, requests' and plain exceptions alike
        raise UserError(f"{MODELSCOPE_PREFIX}{model_id}: downloading it from ModelScope failed: {error}") from error
