"""Loading by transformers: from the disk alone, without Python code of the folder, one sentence for what fails."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from meme_llava.errors import UserError, first_line
from meme_llava.storage.json_files import MODEL_FILES, check_json_files, read_json

NO_CODE = {"trust_remote_code": False}
# For every `from_pretrained` that takes both; without a word transformers asks on a terminal whether to run such code.
LOCALLY = {"local_files_only": True, **NO_CODE}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; whatever they would say is checked and raised by us."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def explain_unloadable(folder: Path, what: str) -> Iterator[None]:
    """Raise UserError where transformers cannot read a model folder; `what` says so, as in "its tokenizer cannot be
    loaded"."""
    try:
        with quiet_transformers():
            yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and huggingface_hub raise a dozen kinds
        check_json_files(folder)
        reason = first_line(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        if "trust_remote_code" in str(error):
            reason = (
                f"Python code of the model's own, named by {' and '.join(_list_with_code(folder))} (auto_map), is "
                "never run here. Take a model that transformers itself knows, such as its -hf release"
            )
        raise UserError(f"{folder}: {what}: {reason}") from error


def _list_with_code(folder: Path) -> list[str]:
    return [name for name in MODEL_FILES if (folder / name).is_file() and "auto_map" in read_json(folder / name)]


def load_strictly(model_class, folder: Path, allowed_unexpected: tuple[str, ...] = (), **options):
    """`model_class.from_pretrained(folder)` that refuses a missing, unexpected or mismatched tensor; those that begin
    with `allowed_unexpected` may be in the folder without being used."""
    with explain_unloadable(folder, f"cannot be loaded as {model_class.__name__}"):
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **LOCALLY, **options)
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith(allowed_unexpected)]
    for kind, keys in (
        ("missing", report["missing_keys"]),
        ("unexpected", unexpected),
        ("of another shape", report["mismatched_keys"]),
    ):
        if keys:
            shown = ", ".join(str(key) for key in sorted(keys, key=str)[:3])
            raise UserError(f"{folder}: {len(keys)} tensors are {kind} for {model_class.__name__}, e.g. {shown}")
    return model
