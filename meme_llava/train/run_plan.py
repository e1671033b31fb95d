"""The plan of a training run: how long it is, what it trains on, and what is recorded of it."""

from dataclasses import dataclass
from pathlib import Path

from meme_llava.cli import to_plain
from meme_llava.dataset.dataset import LoadedData
from meme_llava.distributed.engines import Engine
from meme_llava.distributed.environment import is_main_process
from meme_llava.errors import CheckpointError
from meme_llava.storage.fingerprint import fingerprint_folder, identify_weights
from meme_llava.storage.hashing import hash_file
from meme_llava.storage.run_record import RUN_RECORD, describe_environment, read_run_record, read_trained_record
from meme_llava.train.inputs import RunInputs
from meme_llava.train.resume import StartPoint, check_continues, describe_continuation, is_finished
from meme_llava.train.schedule import count_steps, derive_accumulation
from meme_llava.train.settings import TrainArguments


@dataclass(frozen=True)
class RunPlan:
    """Everything a run depends on, known before its model is loaded.

    Args:
        accumulation: device batches per optimizer step.
        data, base, projector, evaluation: what the run record says of the records, of the model that is trained, of
            the earlier run whose projector it begins with, and of the validation records; None where there are none.
    """

    arguments: TrainArguments
    engine: Engine
    processes: int
    start: StartPoint
    steps: int
    warmup_steps: int
    accumulation: int
    data: dict
    base: dict
    projector: dict | None
    evaluation: dict | None

    def count_records(self, step: int) -> int:
        """Records trained on up to an optimizer step."""
        return self.start.records + (step - self.start.step) * self.arguments.global_batch_size

    def to_record(self, step: int) -> dict:
        """The run record at an optimizer step, as far as it is known without the model."""
        return {
            "stage": "train",
            "step": step,
            "finished": step == self.steps,
            "position": {"step": step, "records": self.count_records(step)},
            "settings": to_plain(self.arguments),
            "schedule": {
                "steps": self.steps,
                "warmup_steps": self.warmup_steps,
                "processes": self.processes,
                "accumulation": self.accumulation,
                "engine": self.engine.name,
            },
            "data": self.data,
            "evaluation": self.evaluation,
            "base": self.base,
            "projector": self.projector,
            "environment": describe_environment(),
        }

    def make_manifest_metadata(self, step: int) -> dict:
        """What a checkpoint's manifest says of the run."""
        return {
            "step": step,
            "records": self.count_records(step),
            "processes": self.processes,
            "engine": self.engine.name,
            "global_batch_size": self.arguments.global_batch_size,
            "data_sha256": self.data["sha256"],
            "base_fingerprint": self.base["fingerprint"],
            "libraries": describe_environment()["libraries"],
        }


def plan_run(arguments: TrainArguments, engine: Engine, processes: int, inputs: RunInputs) -> RunPlan:
    """Derive steps and warmup, and look up what data and base are.

    Raises:
        UserError: the batches do not divide, warmup fills the run, or the earlier projector belongs to another base.
    """
    start, data = inputs.start, inputs.data
    steps, warmup_steps = count_steps(arguments, len(data.dataset), start.step, start.records)
    base_fingerprint = fingerprint_folder(arguments.model)
    has_record = (arguments.model / RUN_RECORD).is_file()
    return RunPlan(
        arguments=arguments,
        engine=engine,
        processes=processes,
        start=start,
        steps=steps,
        warmup_steps=warmup_steps,
        accumulation=derive_accumulation(arguments, processes),
        data=describe_data(arguments, data),
        base={
            "folder": str(arguments.model.resolve()),
            "fingerprint": base_fingerprint,
            "run_record": read_run_record(arguments.model) if has_record else None,
        },
        projector=describe_earlier_projector(arguments.projector_from, base_fingerprint),
        evaluation=None if inputs.validation is None else inputs.validation.description,
    )


def describe_data(arguments: TrainArguments, data: LoadedData) -> dict:
    """What the run record says of the records that train."""
    dataset = data.dataset
    return {
        "annotations": str(arguments.annotations.resolve()),
        "image_folder": str(arguments.image_folder.resolve()),
        "sha256": hash_file(arguments.annotations),
        "records": len(dataset),
        "bad_records": len(data.checked.bad),
        "findings": data.checked.counts,
        "cut_records": data.cut_records,
        "images": len(dataset.image_paths),
        "images_in_records": int(dataset.image_counts.sum()),
        "mean_positions": round(float(dataset.lengths.mean()), 1),
        "longest": int(dataset.lengths.max()),
        "mean_supervised": round(float(dataset.supervised_lengths.mean()), 1),
    }


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


def is_nothing_left(plan: RunPlan) -> bool:
    """Whether the run was finished before. Prints how one that continues a checkpoint goes on.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
    """
    if plan.start.checkpoint is None:
        return False
    ours = plan.to_record(plan.start.step)
    changes = check_continues(plan.start, ours, plan.arguments.allow_changes)
    finished = plan.start.step == plan.steps and is_finished(plan.arguments.output_dir)
    if is_main_process():
        nothing_left = f"nothing left to train: {plan.arguments.output_dir}"
        print(nothing_left if finished else describe_continuation(plan.start, ours, changes), flush=True)
    return finished
