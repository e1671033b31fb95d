"""One training run as a whole: how long it is and what is recorded of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from meme_llava.cli import to_plain
from meme_llava.dataset.dataset import LoadedData
from meme_llava.distributed.engines import Engine
from meme_llava.distributed.processes import count_processes
from meme_llava.errors import CheckpointError
from meme_llava.model.llava import Processing, quiet_transformers
from meme_llava.storage.fingerprint import fingerprint_folder, identify_weights
from meme_llava.storage.folders import write_json
from meme_llava.storage.hashing import hash_file
from meme_llava.storage.run_record import RUN_RECORD, describe_environment, read_run_record, read_trained_record
from meme_llava.terminal import print_table
from meme_llava.train.computation import Computation
from meme_llava.train.hf_arguments import count_steps
from meme_llava.train.resume import StartPoint
from meme_llava.train.settings import TrainArguments

MAX_LISTED_CUTS = 20


@dataclass
class TrainingRun:
    """Everything a run depends on; printed before the first step and saved beside the weights."""

    arguments: TrainArguments
    engine: Engine
    start: StartPoint
    steps: int
    warmup_steps: int
    accumulation: int
    data: dict
    base: dict
    projector: dict | None = None
    evaluation: dict | None = None  # the validation records, where there are some
    parameter_groups: list[dict] = field(default_factory=list)
    computation: Computation | None = None

    @classmethod
    def plan(
        cls, arguments: TrainArguments, data: LoadedData, accumulation: int, engine: Engine, start: StartPoint
    ) -> "TrainingRun":
        """Derive steps and warmup, and look up what data and base are."""
        records = len(data.dataset)
        base_fingerprint = fingerprint_folder(arguments.model)
        steps, warmup_steps = count_steps(arguments, records, start.step, start.records)
        record_file = arguments.model / RUN_RECORD
        return cls(
            arguments=arguments,
            engine=engine,
            start=start,
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
                "undecoded_images": data.checked.undecoded,
                "cut_records": data.cut_records,
                "images": len(data.dataset.image_paths),
                "images_in_records": int(data.dataset.image_counts.sum()),
                "mean_positions": round(float(data.dataset.lengths.mean()), 1),
                "longest": int(data.dataset.lengths.max()),
                "mean_supervised": round(float(data.dataset.supervised_lengths.mean()), 1),
            },
            base={
                "folder": str(arguments.model.resolve()),
                "fingerprint": base_fingerprint,
                "run_record": read_run_record(arguments.model) if record_file.is_file() else None,
            },
            projector=describe_earlier_projector(arguments.projector_from, base_fingerprint),
        )

    def to_record(self, step: int) -> dict:
        """The run record at an optimizer step."""
        return {
            "stage": "train",
            "step": step,
            "finished": step == self.steps,
            "position": {"step": step, "records": self.count_records(step)},
            "settings": to_plain(self.arguments),
            "schedule": {
                "steps": self.steps,
                "warmup_steps": self.warmup_steps,
                "processes": count_processes(),
                "accumulation": self.accumulation,
                "engine": self.engine.name,
            },
            "data": self.data,
            "evaluation": self.evaluation,
            "parameter_groups": self.parameter_groups,
            "computation": None if self.computation is None else self.computation.to_record(),
            "base": self.base,
            "projector": self.projector,
            "environment": describe_environment(),
        }

    def count_records(self, step: int) -> int:
        """Records trained on up to an optimizer step."""
        return self.start.records + (step - self.start.step) * self.arguments.global_batch_size

    def make_manifest_metadata(self, step: int) -> dict:
        """What a checkpoint's manifest says of the run."""
        return {
            "step": step,
            "records": self.count_records(step),
            "processes": count_processes(),
            "engine": self.engine.name,
            "global_batch_size": self.arguments.global_batch_size,
            "data_sha256": self.data["sha256"],
            "base_fingerprint": self.base["fingerprint"],
            "libraries": describe_environment()["libraries"],
        }

    def make_sidecar_writer(self, processing: Processing) -> Callable[[Path, int], None]:
        """A function (folder, step) that puts processor and run record beside trained weights."""

        def write_sidecars(folder: Path, step: int) -> None:
            with quiet_transformers():
                processing.processor.save_pretrained(folder)
            write_json(folder / RUN_RECORD, self.to_record(step))

        return write_sidecars


def describe_earlier_projector(folder: Path | None, base_fingerprint: str) -> dict | None:
    """What the run record keeps of the run whose projector this one begins with; None without one.

    Raises:
        UserError: `folder` holds no trained weights, is damaged, or belongs to another base.
    """
    if folder is None:
        return None
    record = read_trained_record(folder)
    if record["base"]["fingerprint"] != base_fingerprint:
        raise CheckpointError(
            f"--projector_from {folder}: was trained on another base ({record['base']['folder']}), so its "
            "multi_modal_projector fits other towers; give a run on the same --model"
        )
    return {"folder": str(folder.resolve()), "weights": identify_weights(folder), "run_record": record}


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
        f"{count_processes()} process(es) x {run.accumulation} accumulated), {run.warmup_steps} of them warmup; engine "
        f"{run.engine.name}"
    )
    print(run.computation.describe(), flush=True)
