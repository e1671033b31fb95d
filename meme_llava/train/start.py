"""Where a run starts: at nothing or a checkpoint, and whether it may go on from there."""

from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.findings import QUARANTINE
from meme_llava.distributed.processes import broadcast_from_main
from meme_llava.errors import CheckpointError, UserError
from meme_llava.storage.json_files import check_fields
from meme_llava.storage.run_record import RUN_RECORD, list_checkpoints, read_run_record, verify_directory
from meme_llava.train.checkpoints import CORRUPT_SUFFIX, find_newest
from meme_llava.train.settings import TrainArguments, free_settings
from meme_llava.train.trackers import ANSWERS, FOLDERS

LATEST = "latest"
# What an interrupted start leaves behind before its first checkpoint is not a result.
LEFTOVERS = {QUARANTINE, ANSWERS, *FOLDERS.values()}
# Where a run's input and output lie may change; what lies there is compared.
PLACES = {"model", "annotations", "image_folder", "output_dir", "projector_from"}
# Settings that decide which tensors learn; no permission lets a checkpoint fit others.
FIXED_SETTINGS = {
    *("train_type", "lora_r", "lora_variant", "vision_tower_training", "language_model_training"),
    *("lora_vision_modules", "lora_language_modules"),
}
# What a run record must hold for its checkpoint to be continued.
CONTINUED_FIELDS = {
    "position.step": int,
    "position.records": int,
    "step": int,
    "finished": bool,
    "settings": dict,
    "environment": dict,
    "base.fingerprint": str,
    "data.sha256": str,
    "data.records": int,
    "schedule.processes": int,
    "schedule.engine": str,
}


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts: optimizer steps and records that a checkpoint has done, and its run record; what runs had
    left in output_dir when it was chosen."""

    checkpoint: Path | None = None
    step: int = 0
    records: int = 0
    record: dict | None = None
    left: frozenset[str] = frozenset()


def choose_start(arguments: TrainArguments) -> StartPoint:
    """Find the checkpoint to continue from, and read every byte of it. Raises UserError where the one asked for is
    missing, damaged or none, or the run would write into another run's directory."""
    output_dir, wanted = arguments.output_dir, arguments.resume_from_checkpoint
    checkpoint = None if wanted in (None, LATEST) else Path(wanted)
    if checkpoint is not None and "updates" not in (manifest := verify_directory(checkpoint)):
        raise CheckpointError(
            f"--resume_from_checkpoint {wanted}: is a run's result, which has no optimizer state; expected a "
            f"checkpoint, such as {checkpoint / manifest.get('copied_from', 'checkpoint-N')}, or {LATEST}"
        )
    left = list_left(output_dir)
    if left and wanted != LATEST and (checkpoint is None or checkpoint.resolve().parent != output_dir.resolve()):
        raise UserError(
            f"{output_dir}: is not empty. Choose another --output_dir, or continue the run in it with "
            f"--resume_from_checkpoint {LATEST}."
        )
    if wanted is None:
        return StartPoint()
    if wanted == LATEST and (checkpoint := find_newest(output_dir)) is None:
        damaged = ", ".join(path.name for path in list_checkpoints(output_dir))
        raise CheckpointError(
            f"{output_dir}: none of {damaged} is whole, for the reasons above. To train from the beginning, move "
            "them elsewhere or choose another --output_dir."
            if damaged
            else f"--resume_from_checkpoint {LATEST}: {output_dir} holds no checkpoint"
        )
    record = read_run_record(checkpoint)
    check_fields(checkpoint / RUN_RECORD, record, CONTINUED_FIELDS, error=CheckpointError)
    return StartPoint(checkpoint, record["position"]["step"], record["position"]["records"], record, left)


def list_left(output_dir: Path) -> frozenset[str]:
    """Names of what runs left in their folder, but for what an interrupted start or a damaged checkpoint leaves."""
    names = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    return frozenset(
        name for name in names - LEFTOVERS if not name.startswith(".") and not name.endswith(CORRUPT_SUFFIX)
    )


def check_unchanged(output_dir: Path, start: StartPoint) -> None:
    """See under the lock of output_dir that no other run wrote there since the start was chosen; all processes call it
    together. Raises UserError where one did."""
    if broadcast_from_main(lambda: list_left(output_dir)) != start.left:
        raise UserError(
            f"{output_dir}: another run wrote there while this one was being prepared, and nothing of it was changed. "
            "Start the same command again, or choose another --output_dir."
        )


def check_continues(start: StartPoint, ours: dict, allow_changes: bool) -> list[str]:
    """What differs between a checkpoint and the run that is to continue it, whose run record `ours` is. Raises
    CheckpointError naming what differs and was not allowed to."""
    theirs, steps = start.record, ours["schedule"]["steps"]
    settings, own_settings = theirs["settings"], ours["settings"]
    changed = {
        name: f"{name} was {settings.get(name)!r}, is {own_settings.get(name)!r}"
        for name in sorted((settings.keys() | own_settings.keys()) - free_settings() - PLACES)
        if settings.get(name) != own_settings.get(name)
    }
    if theirs["data"]["sha256"] != ours["data"]["sha256"]:
        changed["data"] = "the annotations' contents changed"
    if theirs["data"]["records"] != ours["data"]["records"]:
        changed["records"] = f"records that train were {theirs['data']['records']}, are {ours['data']['records']}"
    if theirs["base"]["fingerprint"] != ours["base"]["fingerprint"]:
        changed["base"] = "the base model is another one"
    before, now = ((record.get("projector") or {}).get("weights") for record in (theirs, ours))
    if before != now:
        changed["projector"] = "the projector of --projector_from is another one"
    if theirs["step"] >= steps and not theirs["finished"]:
        raise CheckpointError(
            f"{start.checkpoint} has done {theirs['step']} steps, and this run is to have {steps}; raise "
            "--num_train_epochs (EPOCHS) or --max_steps, or continue an earlier checkpoint"
        )
    # A setting that came later than the checkpoint decided nothing there.
    if fixed := [text for name, text in changed.items() if name in FIXED_SETTINGS & settings.keys()]:
        raise CheckpointError(
            f"{start.checkpoint} cannot be continued: {'; '.join(fixed)}. Other tensors would learn; start again in "
            "another --output_dir (OUTPUT_DIR)."
        )
    if changed and not allow_changes:
        raise CheckpointError(
            f"{start.checkpoint} cannot be continued: {'; '.join(changed.values())}. Restore what changed, start again "
            "in another --output_dir (OUTPUT_DIR), or pass --allow_changes to go on with it."
        )
    return list(changed.values())
