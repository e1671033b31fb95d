"""Where a language model or vision tower comes from: a folder, the Hugging Face hub, or ModelScope."""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from meme_llava.errors import UserError

MODELSCOPE_PREFIX = "modelscope:"
DESCRIPTION_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
PICKLED_FILES = ["*.bin"]
SUBFOLDERS = ["*/*"]  # other formats (onnx, original) that nothing here reads


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
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=DESCRIPTION_FILES, ignore_patterns=SUBFOLDERS))
        # Chinese-CLIP comes as pytorch_model.bin only; where both forms exist one download is enough.
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model_id, allow_patterns=PICKLED_FILES, ignore_patterns=SUBFOLDERS))
        return folder
    # HTTPError also is a line that breaks or a proxy that refuses; ValueError a log-in page in place of JSON.
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{model_id}: is not a local folder, HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} "
                "does not hold all of it. Unset HF_HUB_OFFLINE to download it, or give a folder."
            ) from error
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{model_id}: is not a local folder, and downloading it from {endpoint} failed: {reason}\n"
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
