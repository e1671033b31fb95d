"""The plan of a run: what it trains on, how long it is, and what is recorded of it."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meme_llava.cli import to_plain
from meme_llava.dataset.dataset import LoadedData, load_records
from meme_llava.distributed.environment import Engine, is_local_main_process
from meme_llava.distributed.processes import broadcast_from_main, gather
from meme_llava.errors import CheckpointError, UserError, count
from meme_llava.model.llava import Processing, load_processing
from meme_llava.model.packing import find_obstacle
from meme_llava.storage.files import hash_file
from meme_llava.storage.fingerprint import check_weights, identify_weights
from meme_llava.storage.run_record import (
    RUN_RECORD,
    describe_environment,
    list_library_versions,
    read_run_record,
    read_trained_record,
)
from meme_llava.train.session import Session, derive_accumulation
from meme_llava.train.settings import TrainArguments
from meme_llava.train.start import StartPoint, check_continues, choose_start
from meme_llava.train.trackers import check_trackers

# The order of all of them is made before the first step. A number beyond that is a slip.
MOST_RECORDS = 100_000_000
# A new projector needs a few hundred; so few show nothing.
FEW_STEPS = 20
# A trained model that is shown fewer records, each as often or more, learns them by heart and forgets others.
FEW_RECORDS, MANY_PASSES = 100, 5


@dataclass(frozen=True)
class RunPlan:
    """Everything a run depends on, known before its model is loaded.

    Args:
        accumulation: device batches per optimizer step.
        validation: the ValidationData of a run that is evaluated while it trains, else None.
        facts: what the run record says of the records that train ("data"), of those that are evaluated ("evaluation"),
            of the model that is trained ("base"), of the earlier run with whose projector it begins ("projector"), of
            the code and libraries with which it began ("environment") and was continued ("continued"); empty where
            nothing is trained.
    """

    arguments: TrainArguments
    engine: Engine
    processes: int
    start: StartPoint
    processing: Processing
    data: LoadedData
    steps: int
    warmup_steps: int
    accumulation: int
    validation: Any = None
    facts: dict = field(default_factory=dict)

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
            **self.facts,
        }

    def make_manifest_metadata(self, step: int) -> dict:
        """What a checkpoint's manifest says of the run."""
        return {
            "step": step,
            "records": self.count_records(step),
            "processes": self.processes,
            "engine": self.engine.name,
            "global_batch_size": self.arguments.global_batch_size,
            "data_sha256": self.facts["data"]["sha256"],
            "base_fingerprint": self.facts["base"]["fingerprint"],
            "libraries": list_library_versions(),
        }


def load_plan(arguments: TrainArguments, session: Session) -> RunPlan:
    """Find the start point, read and check all records; all processes call it together. Raises UserError where a
    tracker cannot be used, a checkpoint is damaged, a record is bad, or for a reason of `plan_run`."""
    beat = session.heartbeat.beat
    broadcast_from_main(lambda: check_trackers(arguments.report_to))
    beat()
    start = broadcast_from_main(lambda: choose_start(arguments))
    beat()
    processing = load_processing(arguments.model)
    # Before waiting for the others: of several that end for want of a beat, the stuck one is the first.
    beat()
    # One process looks at every image, and all train on what it found.
    data = broadcast_from_main(lambda: load_training_records(arguments, processing))
    beat()
    validation = None
    if arguments.eval_every is not None:
        from meme_llava.train.evaluation import load_validation

        validation = broadcast_from_main(lambda: load_validation(arguments, processing, data.checked))
    return plan_run(arguments, session.engine, session.processes, start, processing, data, validation)


def load_training_records(arguments: TrainArguments, processing: Processing, decode: bool = True) -> LoadedData:
    """The records that train; every image is opened whole, or without `decode` its header. Raises UserError where a
    record is bad or does not fit into model_max_length, or nothing is left."""
    files, length = (arguments.annotations, arguments.image_folder), arguments.model_max_length
    return load_records(*files, arguments, processing.encoder, length, processing.image_policy, decode)


def plan_run(
    arguments: TrainArguments,
    engine: Engine,
    processes: int,
    start: StartPoint,
    processing: Processing,
    data: LoadedData,
    validation: Any = None,
) -> RunPlan:
    """The plan of a run that trains. Raises UserError where the earlier projector belongs to another base, or for a
    reason of `outline_run`."""
    outline = outline_run(arguments, engine, processes, start, processing, data)
    fingerprint = fingerprint_base(arguments.model)
    has_record = (arguments.model / RUN_RECORD).is_file()
    facts = {
        "data": describe_data(arguments, data),
        "evaluation": None if validation is None else validation.description,
        "base": {
            "folder": str(arguments.model.resolve()),
            "fingerprint": fingerprint,
            "run_record": read_run_record(arguments.model) if has_record else None,
        },
        "projector": describe_earlier_projector(arguments.projector_from, fingerprint),
        **describe_environments(start),
    }
    return replace(outline, validation=validation, facts=facts)


def outline_run(
    arguments: TrainArguments,
    engine: Engine,
    processes: int,
    start: StartPoint,
    processing: Processing,
    data: LoadedData,
) -> RunPlan:
    """The plan of a run without its facts, for which every weight of the base would be read. Raises UserError where the
    batches do not divide, warmup fills the run, or the language model is not for four bits."""
    if arguments.load_in_4bit and (obstacle := find_obstacle(processing.config.text_config)):
        raise UserError(
            f"--load_in_4bit: the language model of {arguments.model} has {obstacle}, and layers beside attention and "
            "MLP are not known to work in four bits; leave --load_in_4bit out, or take one such as Qwen2 or Llama"
        )
    accumulation = derive_accumulation(arguments, processes)
    steps, warmup_steps = count_steps(arguments, len(data.dataset), start.step, start.records)
    return RunPlan(arguments, engine, processes, start, processing, data, steps, warmup_steps, accumulation)


def describe_environments(start: StartPoint) -> dict:
    """What the run record says of where a run began, which is what it is known by, and where it was continued."""
    now = describe_environment()
    if start.record is None:
        return {"environment": now, "continued": []}
    earlier = start.record.get("continued", [])
    return {"environment": start.record["environment"], "continued": [*earlier, {"step": start.step, **now}]}


def fingerprint_base(folder: Path) -> str:
    """The fingerprint of the base's weights; one process of each node reads them, for they are many gigabytes. Raises
    UserError where a node's are not those that were written, or nodes hold different ones."""

    def read() -> str | UserError:
        try:
            return check_weights(folder)
        except UserError as error:
            return error

    found = {one for one in gather(read() if is_local_main_process() else None) if one is not None}
    # All processes raise it, so that none waits for one that has.
    if damaged := next((one for one in found if isinstance(one, UserError)), None):
        raise damaged
    if len(found) > 1:
        raise UserError(f"{folder}: holds other weights on some nodes than on others; copy the folder to all of them")
    return found.pop()


def count_steps(arguments: TrainArguments, records: int, first_step: int = 0, first_record: int = 0) -> tuple[int, int]:
    """Optimizer steps and warmup steps of the run. Raises UserError when --warmup_steps fill the run, or it has no end.

    A checkpoint has done `first_step` steps on `first_record` records, in batches that may have been of another size.
    """
    batch, max_steps, epochs = arguments.global_batch_size, arguments.max_steps, arguments.num_train_epochs
    trained = records * epochs if max_steps is None else max_steps * batch
    if max(trained, batch) > MOST_RECORDS:
        flag = f"--num_train_epochs {epochs:g}" if max_steps is None else f"--max_steps {max_steps}"
        if batch > MOST_RECORDS:  # a single step is filled from pass after pass
            flag, trained = f"--global_batch_size {batch}", batch
        raise UserError(
            f"{flag}: trains on {trained:.2g} records, expected at most {MOST_RECORDS:,}, those of all passes counted"
        )
    steps = max_steps or first_step + max(0, math.ceil((trained - first_record) / batch))
    if arguments.warmup_steps is None:
        return steps, min(math.ceil(steps * arguments.warmup_ratio), steps - 1)
    if arguments.warmup_steps >= steps:
        raise UserError(f"warmup takes {arguments.warmup_steps} of {steps} steps; lower --warmup_steps or train longer")
    return steps, arguments.warmup_steps


def list_warnings(arguments: TrainArguments, records: int, steps: int) -> list[str]:
    """What is allowed and can hardly be meant."""
    batch, warnings = arguments.global_batch_size, []
    if batch > records:
        warnings.append(
            f"warning: a step takes {count(batch, 'record')}, and the run has {records:,}, so it takes some of them "
            "several times; lower --global_batch_size (GLOBAL_BATCH)"
        )
    record_file = arguments.model / RUN_RECORD
    if record_file.is_file() and read_run_record(arguments.model).get("stage") == "merge":
        passes = steps * batch / records
        if records < FEW_RECORDS and passes >= MANY_PASSES:
            warnings.append(
                f"warning: {arguments.model} is a trained model; it is shown {count(records, 'record')} about "
                f"{passes:.0f} times each, and may forget what it knows; mix in records of its training "
                "(data/prepare.py mix), or lower --num_train_epochs (EPOCHS)"
            )
    elif steps < FEW_STEPS and arguments.max_steps is None:
        warnings.append(
            f"warning: the whole run has {count(steps, 'step')}, and a new projector needs a few hundred; raise "
            "--num_train_epochs (EPOCHS), or lower --global_batch_size (GLOBAL_BATCH)"
        )
    return warnings


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
    """What the run record keeps of the run whose projector this one begins with; None without one. Raises UserError
    where `folder` holds no trained weights, is damaged, or belongs to another base."""
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
    """Whether the run was finished before; all processes ask it together. Prints how one that continues a checkpoint
    goes on. Raises CheckpointError where the checkpoint belongs to another run."""
    # One process looks: where a node sees another output_dir, some would leave and the others wait for them.
    return plan.start.checkpoint is not None and broadcast_from_main(lambda: _announce_rest(plan))


def _announce_rest(plan: RunPlan) -> bool:
    start, output_dir = plan.start, plan.arguments.output_dir
    ours = plan.to_record(start.step)
    changes = check_continues(start, ours, plan.arguments.allow_changes)
    lines = [f"continuing from {start.checkpoint}, after {start.step} steps and {start.records:,} records"]
    before, now = start.record["schedule"], ours["schedule"]
    if before["processes"] != now["processes"]:
        lines.append(
            f"{count(before['processes'], 'process', 'processes')} wrote it, and it goes on with {now['processes']}: "
            "the same records come next, but dropout draws other numbers and sums have another order, so losses agree "
            "without being the same bits"
        )
    if before["engine"] != now["engine"]:
        lines.append(f"the engine was {before['engine']}, is {now['engine']}; weights and optimizer state are the same")
    lines += [f"changed since, as allowed: {change}" for change in changes]
    has_result = (output_dir / RUN_RECORD).is_file() and read_run_record(output_dir).get("finished") is True
    is_finished = start.step == plan.steps and has_result
    print(f"nothing left to train: {output_dir}" if is_finished else "\n".join(lines), flush=True)
    return is_finished
