"""Knows one training run as a whole: how long it is, what is recorded of it, and whether a checkpoint belongs to it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from meme_llava.arguments import TrainArguments, to_plain
from meme_llava.checkpoint import RUN_RECORD, describe_environment, read_run_record, write_json
from meme_llava.computation import Computation
from meme_llava.dataset import LoadedData
from meme_llava.display import print_table
from meme_llava.errors import UserError
from meme_llava.hashing import hash_file
from meme_llava.model import Processing, quiet_transformers
from meme_llava.quarantine import QUARANTINE
from meme_llava.trainer import TENSORBOARD_FOLDER, count_processes, count_steps
from meme_llava.vision_features import VISION_FEATURES
from meme_llava.weights import fingerprint_folder

LATEST = "latest"
MAX_LISTED_CUTS = 20
LEFTOVERS = {QUARANTINE, TENSORBOARD_FOLDER, VISION_FEATURES}
# Settings that may differ when a run continues: they change neither the data order nor an update.
FREE_SETTINGS = {
    "model",
    "annotations",
    "image_folder",
    "output_dir",
    "resume_from_checkpoint",
    "show_batch",
    "plan",
    "machine",
    "gpus",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "dataloader_workers",
    "attention",
    "gradient_checkpointing",
    "torch_compile",
    "cache_vision_features",
}


@dataclass
class TrainingRun:
    """Everything a run depends on; printed before the first step and saved beside the weights."""

    arguments: TrainArguments
    steps: int
    warmup_steps: int
    accumulation: int
    data: dict
    base: dict
    parameter_groups: list[dict] = field(default_factory=list)
    computation: Computation | None = None

    @classmethod
    def plan(cls, arguments: TrainArguments, data: LoadedData, accumulation: int) -> "TrainingRun":
        """Derive steps and warmup, and look up what data and base are."""
        records = len(data.dataset)
        steps, warmup_steps = count_steps(arguments, records)
        record_file = arguments.model / RUN_RECORD
        return cls(
            arguments=arguments,
            steps=steps,
            warmup_steps=warmup_steps,
            accumulation=accumulation,
            data={
                "annotations": str(arguments.annotations.resolve()),
                "image_folder": str(arguments.image_folder.resolve()),
                "sha256": hash_file(arguments.annotations),
                "records": records,
                "bad_records": len(data.checked.bad),
                "findings": data.checked.counts,
                "undecoded_pictures": data.checked.undecoded,
                "cut_records": data.cut_records,
                "pictures": len(data.dataset.image_paths),
                "pictures_in_records": int(data.dataset.image_counts.sum()),
                "mean_positions": round(float(data.dataset.lengths.mean()), 1),
                "longest": int(data.dataset.lengths.max()),
                "mean_supervised": round(float(data.dataset.supervised_lengths.mean()), 1),
            },
            base={
                "folder": str(arguments.model.resolve()),
                "fingerprint": fingerprint_folder(arguments.model),
                "run_record": read_run_record(arguments.model) if record_file.is_file() else None,
            },
        )

    def to_record(self, step: int) -> dict:
        """The run record at an optimizer step."""
        return {
            "stage": "train",
            "step": step,
            "finished": step == self.steps,
            "settings": to_plain(self.arguments),
            "schedule": {
                "steps": self.steps,
                "warmup_steps": self.warmup_steps,
                "processes": count_processes(),
                "accumulation": self.accumulation,
            },
            "data": self.data,
            "parameter_groups": self.parameter_groups,
            "computation": self.computation.to_record(),
            "base": self.base,
            "environment": describe_environment(),
        }

    def make_companion_writer(self, processing: Processing) -> Callable[[Path, int], None]:
        """A function (folder, step) that puts processor and run record beside trained weights."""

        def write_companions(folder: Path, step: int) -> None:
            with quiet_transformers():
                processing.processor.save_pretrained(folder)
            write_json(folder / RUN_RECORD, self.to_record(step))

        return write_companions

    def check_continues(self, checkpoint: Path) -> None:
        """Raise UserError naming what differs, if `checkpoint` belongs to another run than this one."""
        record = read_run_record(checkpoint)
        settings, ours = record["settings"], to_plain(self.arguments)
        names = (set(settings) | set(ours)) - FREE_SETTINGS
        differences = [
            f"{name} was {settings.get(name)!r}, is {ours.get(name)!r}"
            for name in sorted(names)
            if settings.get(name) != ours.get(name)
        ]
        if record["data"]["sha256"] != self.data["sha256"]:
            differences.append("the annotations' contents changed")
        if record["data"]["records"] != self.data["records"]:
            differences.append(f"records that train were {record['data']['records']}, are {self.data['records']}")
        if record["base"]["fingerprint"] != self.base["fingerprint"]:
            differences.append("the base model is another one")
        if record["schedule"]["processes"] != count_processes():
            differences.append(f"processes were {record['schedule']['processes']}, are {count_processes()}")
        if differences:
            raise UserError(
                f"{checkpoint} cannot be continued: {'; '.join(differences)}. Start again in another --output_dir, "
                "or restore what changed."
            )


def is_main_process() -> bool:
    """Whether this process prints and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def is_finished(output_dir: Path) -> bool:
    """Whether `output_dir` holds the final output of a run."""
    return (output_dir / RUN_RECORD).is_file() and read_run_record(output_dir).get("finished") is True


def describe_restart(output_dir: Path) -> str:
    """What is left of a run that was stopped, and how it goes on."""
    complete = [path for path in sorted(output_dir.glob("checkpoint-*"), key=_read_step) if _is_complete(path)]
    if not complete:
        return "No checkpoint was written yet; the run starts from the beginning next time."
    return f"{complete[-1]} is kept; continue with --resume_from_checkpoint {LATEST} (run.sh does so by itself)."


def choose_checkpoint(arguments: TrainArguments) -> Path | None:
    """The checkpoint to continue from, or None for a fresh run.

    Raises:
        UserError: the one asked for is missing, or a fresh run would write into another run's directory.
    """
    output_dir, wanted = arguments.output_dir, arguments.resume_from_checkpoint
    if wanted is None:
        # What an interrupted start leaves behind before its first checkpoint is no result.
        found = {path.name for path in output_dir.iterdir()} - LEFTOVERS if output_dir.is_dir() else set()
        if found and not arguments.show_batch:
            raise UserError(
                f"{output_dir}: is not empty. Choose another --output_dir, or continue the run in it with "
                f"--resume_from_checkpoint {LATEST}."
            )
        return None
    if wanted == LATEST:
        checkpoints = sorted(output_dir.glob("checkpoint-*"), key=_read_step, reverse=True)
        for checkpoint in checkpoints:
            if _is_complete(checkpoint):
                return checkpoint
            print(f"{checkpoint} is incomplete (the run was stopped while writing it) and is passed over")
        raise UserError(f"--resume_from_checkpoint {LATEST}: {output_dir} holds no complete checkpoint")
    if not _is_complete(Path(wanted)):
        raise UserError(f"--resume_from_checkpoint {wanted}: is no complete checkpoint folder")
    return Path(wanted)


def _read_step(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1


def _is_complete(checkpoint: Path) -> bool:
    # The Trainer writes its state last.
    return (checkpoint / RUN_RECORD).is_file() and (checkpoint / "trainer_state.json").is_file()


def choose_load_dtype(training_arguments: TrainingArguments) -> torch.dtype:
    """How the base is loaded: bf16, half the memory, where training computes in it; what learns becomes float32."""
    return torch.bfloat16 if training_arguments.bf16 else torch.float32


def print_run(run: TrainingRun) -> None:
    """Print settings, data, schedule and parameter groups."""
    unused = set(run.arguments.list_unused())
    settings = [
        (name, f"{value}" + ("   (not used by this run)" if name in unused else ""))
        for name, value in to_plain(run.arguments).items()
    ]
    print_table("Settings", ("setting", "value"), settings)
    listed_apart = ("cut_records", "findings")
    rows = [(name, str(value)) for name, value in run.data.items() if name not in listed_apart]
    print_table("Data", ("", "value"), rows)
    cut_records = run.data["cut_records"]
    for cut in cut_records[:MAX_LISTED_CUTS]:
        print(f"cut to model_max_length: {cut}")
    if cut_records:
        print(f"{len(cut_records)} answers are cut to model_max_length; run_record.json lists all of them")
    groups = [
        (g["role"], g["kind"], g["tensors"], g["parameters"], f"{g['learning_rate']:g}", f"{g['weight_decay']:g}")
        for g in run.parameter_groups
    ]
    columns = ("role", "kind", "tensors", "parameters", "peak rate", "decay")
    print_table("What learns", columns, groups)
    print(
        f"{run.steps} steps of {run.arguments.global_batch_size} records ({run.arguments.device_batch_size} a device x "
        f"{count_processes()} process(es) x {run.accumulation} accumulated), {run.warmup_steps} of them warmup"
    )
    print(run.computation.describe(), flush=True)
