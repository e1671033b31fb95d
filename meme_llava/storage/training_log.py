"""The log of a training run, in the file where Hugging Face's Trainer has it, too: an entry a logged step."""

import json
from pathlib import Path

from meme_llava.storage.files import write_json

TRAINING_LOG = "trainer_state.json"


def write_training_log(folder: Path, step: int, entries: list[dict]) -> None:
    """Write the entries up to an optimizer step."""
    write_json(folder / TRAINING_LOG, {"global_step": step, "log_history": entries})


def read_training_log(folder: Path) -> list[dict]:
    """The entries that a checkpoint or a finished run keeps. Raises OSError where there are none."""
    return json.loads((folder / TRAINING_LOG).read_text(encoding="utf-8"))["log_history"]
