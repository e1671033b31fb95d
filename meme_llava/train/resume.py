"""Where a run starts: at the beginning, or after a checkpoint that belongs to it."""

from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.quarantine import QUARANTINE
from meme_llava.errors import CheckpointError, UserError
from meme_llava.storage.manifest import verify_directory
from meme_llava.storage.run_record import RUN_RECORD, read_run_record
from meme_llava.train.checkpoints import CORRUPT_SUFFIX, find_newest, list_checkpoints
from meme_llava.train.settings import TrainArguments, free_settings
from meme_llava.train.tracker_runs import FOLDERS
from meme_llava.train.validation import ANSWERS

LATEST = "latest"
# What an interrupted start leaves behind before its first checkpoint is not a result.
LEFTOVERS = {QUARANTINE, ANSWERS, *FOLDERS}
# Where a run's input and output lie may change; what lies there is compared.
PLACES = {"model", "annotations", "image_folder", "output_dir"}
# Settings that decide which tensors learn; no permission lets a checkpoint fit others.
FIXED_SETTINGS = {
    "train_type",
    "lora_r",
    "vision_tower_training",
    "language_model_training",
    "lora_vision_modules",
    "lora_language_modules",
}


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts: optimizer steps and records that a checkpoint has done, and its run record."""

    checkpoint: Path | None = None
    step: int = 0
    records: int = 0
    record: dict | None = None


def choose_start(arguments: TrainArguments) -> StartPoint:
    """Find the checkpoint to continue from, and read every byte of it.

    Raises:
        UserError: the one asked for is missing or damaged, or a fresh run would write into another run's directory.
    """
    output_dir, wanted = arguments.output_dir, arguments.resume_from_checkpoint
    if wanted is None:
        found = _list_results(output_dir)
        if found and not arguments.show_batch:
            raise UserError(
                f"{output_dir}: is not empty. Choose another --output_dir, or continue the run in it with "
                f"--resume_from_checkpoint {LATEST}."
            )
        return StartPoint()
    if wanted == LATEST:
        checkpoint = find_newest(output_dir)
        if checkpoint is None:
            raise _explain_missing(output_dir)
    else:
        checkpoint = Path(wanted)
        verify_directory(checkpoint)
    record = read_run_record(checkpoint)
    position = record["position"]
    return StartPoint(checkpoint, position["step"], position["records"], record)


def _explain_missing(output_dir: Path) -> CheckpointError:
    damaged = [path.name for path in list_checkpoints(output_dir)]
    if damaged:
        return CheckpointError(
            f"{output_dir}: none of {', '.join(damaged)} is whole, for the reasons above. To train from the beginning, "
            "delete them or choose another --output_dir."
        )
    return CheckpointError(f"--resume_from_checkpoint {LATEST}: {output_dir} holds no checkpoint")


def _list_results(output_dir: Path) -> list[str]:
    if not output_dir.is_dir():
        return []
    names = {path.name for path in output_dir.iterdir()} - LEFTOVERS
    return sorted(name for name in names if not name.startswith(".") and not name.endswith(CORRUPT_SUFFIX))


def is_finished(output_dir: Path) -> bool:
    """Whether `output_dir` holds the final output of a run."""
    return (output_dir / RUN_RECORD).is_file() and read_run_record(output_dir).get("finished") is True


def check_continues(start: StartPoint, ours: dict, allow_changes: bool) -> list[str]:
    """What differs between a checkpoint and the run that is to continue it, if that is allowed.

    Args:
        ours: the run record as this run would write it.

    Raises:
        CheckpointError: naming what differs, and was not allowed to.
    """
    theirs = start.record
    settings, own_settings = theirs["settings"], ours["settings"]
    changed = {
        name: f"{name} was {settings.get(name)!r}, is {own_settings.get(name)!r}"
        for name in sorted(settings.keys() | own_settings.keys())
        if name not in free_settings() | PLACES and settings.get(name) != own_settings.get(name)
    }
    if theirs["data"]["sha256"] != ours["data"]["sha256"]:
        changed["data"] = "the annotations' contents changed"
    if theirs["data"]["records"] != ours["data"]["records"]:
        changed["records"] = f"records that train were {theirs['data']['records']}, are {ours['data']['records']}"
    if theirs["base"]["fingerprint"] != ours["base"]["fingerprint"]:
        changed["base"] = "the base model is another one"
    if theirs["step"] >= ours["schedule"]["steps"] and not theirs["finished"]:
        raise CheckpointError(
            f"{start.checkpoint} has done {theirs['step']} steps, and this run is to have "
            f"{ours['schedule']['steps']}; raise --num_train_epochs or --max_steps, or continue an earlier checkpoint"
        )
    fixed = [text for name, text in changed.items() if name in FIXED_SETTINGS]
    if fixed:
        raise CheckpointError(
            f"{start.checkpoint} cannot be continued: {'; '.join(fixed)}. Other tensors would learn; start again in "
            "another --output_dir."
        )
    if changed and not allow_changes:
        raise CheckpointError(
            f"{start.checkpoint} cannot be continued: {'; '.join(changed.values())}. Restore what changed, start again "
            "in another --output_dir, or pass --allow_changes to go on with it."
        )
    return list(changed.values())


def describe_continuation(start: StartPoint, ours: dict, changes: list[str]) -> str:
    """What a user should know about a run that goes on."""
    lines = [f"continuing from {start.checkpoint}, after {start.step} steps and {start.records:,} records"]
    before, now = start.record["schedule"], ours["schedule"]
    if before["processes"] != now["processes"]:
        lines.append(
            f"{before['processes']} process(es) wrote it, {now['processes']} continue(s): the same records come next, "
            "but dropout draws other numbers and sums have another order, so losses agree without being the same bits"
        )
    if before["engine"] != now["engine"]:
        lines.append(f"the engine was {before['engine']}, is {now['engine']}; weights and optimizer state are the same")
    lines += [f"changed since, as allowed: {change}" for change in changes]
    return "\n".join(lines)
