"""An experiment as a report sees it: an evaluation, with what is known of the run that made the model.

Nothing about pages.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_llava.errors import UserError, count
from meme_llava.evaluate.results_folder import (
    METRICS,
    check_same_questions,
    read_finished_evaluation,
    read_predictions,
)
from meme_llava.evaluate.scores import Score, describe_most_frequent, read_scores
from meme_llava.inference.questions import Prediction
from meme_llava.storage.run_record import read_run_record, read_training_log
from meme_llava.terminal import format_seconds


@dataclass(frozen=True)
class Experiment:
    """One column of a report, which `name` heads."""

    name: str
    scores: dict[str, Score]  # by the names of `evaluate.scores`
    predictions: dict[tuple, Prediction]  # by their questions, as `read_predictions` gives them
    image_folder: Path
    asked: dict  # what decides about the answers; of two experiments the same annotations and limit
    facts: dict[str, str]  # what is known of model and training, by labels in the order to be shown
    log_history: list[dict]  # of the training; empty for a model that we did not train, or where it is gone
    warning: str = ""  # what speaks against its being what the run's name says


def read_experiments(runs: list[str]) -> list[Experiment]:
    """Read every run: an OUTPUT_DIR of run.sh or a folder of evaluate.py, as FOLDER or NAME=FOLDER.

    Raises UserError where a folder holds no finished evaluation, two have one name, or their questions differ.
    """
    experiments = [_read_experiment(run) for run in runs]
    names = [experiment.name for experiment in experiments]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two experiments are called {name!r}; name them differently, as in before=FOLDER")
    for run, experiment in zip(runs, experiments, strict=True):
        check_same_questions(run, experiment.asked, runs[0], experiments[0].asked)
    return experiments


def _read_experiment(run: str) -> Experiment:
    name, separator, rest = run.partition("=")
    # A folder may have "=" in its name.
    folder, given_name = (Path(rest), name) if separator and name and not Path(run).exists() else (Path(run), None)
    evaluation, metrics = read_finished_evaluation(folder)
    try:
        facts, log_history = _read_recipe(folder, metrics)
        warning = "" if evaluation == folder else _warn_of_other_training(folder, metrics)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{evaluation / METRICS}: its model's run record cannot be read ({error!r}); evaluate the model anew"
        ) from error
    predictions = read_predictions(evaluation)
    default_name = metrics["title"] if evaluation == folder else folder.resolve().name
    return Experiment(
        name=given_name or default_name,
        scores=read_scores(metrics),
        predictions=predictions,
        image_folder=Path(metrics["image_folder"]),
        asked=metrics["asked"],
        facts={"most frequent answer": describe_most_frequent(list(predictions.values())), **facts},
        log_history=log_history,
        warning=warning,
    )


def _read_recipe(folder: Path, metrics: dict) -> tuple[dict[str, str], list[dict]]:
    """What is known of the model that was evaluated, and the log of its training."""
    training, facts, log_history = find_training_record(metrics["model"]), describe_model(metrics), []
    if training is not None:
        log_history = _read_log_history([folder / "train", Path(metrics["settings"]["model"])], training)
        facts |= describe_training(training, log_history)
        if (projector := training.get("projector")) is not None:
            earlier = projector["run_record"]
            facts |= describe_projector(earlier, _read_log_history([folder / "projector"], earlier))
    return facts, log_history


def _warn_of_other_training(folder: Path, metrics: dict) -> str:
    """That the evaluation in an OUTPUT_DIR of run.sh is of another training than the one there, if it is."""
    there, training = _read_record(folder / "train"), find_training_record(metrics["model"])
    is_same = _is_same_training(there, training)
    # Of one training that went on, the earlier result is another one; a checkpoint never was the result.
    if there is None or (is_same and (not training["finished"] or training["step"] == there["step"])):
        return ""
    return (
        f"{folder}: the model that was evaluated, {metrics['title']}, is not of the training in {folder / 'train'}; "
        "merge and evaluate that one anew"
    )


def _read_record(folder: Path) -> dict | None:
    """The run record of a folder; None where it has none."""
    with contextlib.suppress(OSError, UserError):
        return read_run_record(folder)
    return None


def _is_same_training(record: dict | None, training: dict | None) -> bool:
    """Whether both are of one training, known by what its environment says of when it began."""
    return None not in (record, training) and record.get("environment") == training["environment"]


def find_training_record(record: dict | None) -> dict | None:
    """The run record of train.py behind a model's run record; None for a model that was not trained by us."""
    if record is None or record.get("stage") == "train":
        return record
    return record.get("training")


def _read_log_history(places: Sequence[Path], training: dict) -> list[dict]:
    """The log of just this training, from the first of the places that has it."""
    for place in (*places, Path(training["settings"]["output_dir"])):
        if _is_same_training(_read_record(place), training):
            with contextlib.suppress(UserError, KeyError, TypeError):
                # It may have gone on since.
                return [entry for entry in read_training_log(place) if entry["step"] <= training["step"]]
    return []


def describe_model(metrics: dict) -> dict[str, str]:
    """What answered, and of which towers it is made."""
    build = find_build_record(metrics["model"])
    names = {"language model": "language_model", "vision tower": "vision_model", "images": "image_policy"}
    return {"model": metrics["title"]} | ({k: build["settings"][name] for k, name in names.items()} if build else {})


def find_build_record(record: dict | None) -> dict | None:
    """The run record of build_base_model.py at the beginning of a model, through all trainings on one another."""
    while record is not None and record.get("stage") != "build":
        training = find_training_record(record)
        record = None if training is None else training["base"]["run_record"]
    return record


def describe_training(training: dict, log_history: list[dict]) -> dict[str, str]:
    """The recipe, in the words of the settings, with what it was applied to and how long it took."""
    settings, schedule, data = training["settings"], training["schedule"], training["data"]
    facts = {"train type": settings["train_type"]}
    if any(group["kind"] == "LoRA" for group in training["parameter_groups"]):
        facts["LoRA"] = f"r {settings['lora_r']}, alpha {settings['lora_alpha']:g}"
        for part, way in (("vision", "vision_tower_training"), ("language", "language_model_training")):
            on = ", ".join(settings[f"lora_{part}_modules"]) or "nothing"
            facts[f"{part} LoRA on"] = on if settings[way] == "lora" else f"nothing ({settings[way]})"
    for group in training["parameter_groups"]:
        facts[f"learning rate: {group['role']}"] = f"{group['learning_rate']:g}"
    facts["projector alone first"] = "no"
    facts |= {
        "passes": f"{settings['num_train_epochs']:g}" if settings["max_steps"] is None else "as max_steps",
        "steps": f"{training['step']:,}",
        "warmup steps": f"{schedule['warmup_steps']:,}",
        "schedule": settings["lr_scheduler_type"],
        "global batch": f"{settings['global_batch_size']:,}",
        "model_max_length": f"{settings['model_max_length']:,}",
        "data": settings["annotations"],
        "data sha256": data["sha256"][:12],
        "records": f"{data['records']:,}",
        "precision": training.get("computation", {}).get("precision", settings["precision"]),
        "seed": str(settings["seed"]),
        "devices": f"{schedule['processes']} ({schedule['engine']})",
    }
    if seconds := measure_training_seconds(log_history, settings["global_batch_size"]):
        facts["training time"] = format_seconds(round(seconds))
    environment = training["environment"]
    facts["begun"] = str(environment["time"])[:16].replace("T", " ")
    # Those of a run that was continued with other code in the order in which they trained.
    commits = map(_describe_commit, [environment, *training.get("continued", [])])
    if known := list(dict.fromkeys(filter(None, commits))):
        facts["git commit"] = ", then ".join(known)
    return facts


def _describe_commit(environment: dict) -> str | None:
    commit, changed = environment.get("git_commit"), environment.get("git_changed_files")
    return commit and commit[:10] + (f", {count(changed, 'file')} changed" if changed else "")


def describe_projector(earlier: dict, log_history: list[dict]) -> dict[str, str]:
    """The stage in which the projector learned alone, by the run record of that, and the time that it took besides."""
    settings = earlier["settings"]
    seconds = measure_training_seconds(log_history, settings["global_batch_size"])
    time = f", {format_seconds(round(seconds))} more" if seconds else ""
    passes = "1 pass" if settings["num_train_epochs"] == 1 else f"{settings['num_train_epochs']:g} passes"
    return {"projector alone first": f"{passes} at {settings['high_lr']:g}{time}"}


def measure_training_seconds(log_history: list[dict], global_batch_size: int) -> float:
    """Seconds that the logged steps took by their speed, without checkpoints and pauses; 0 where none is logged."""
    seconds, last_step = 0.0, 0
    for entry in log_history:
        if "captions_per_second" in entry:
            seconds += (entry["step"] - last_step) * global_batch_size / entry["captions_per_second"]
            last_step = entry["step"]
    return seconds
