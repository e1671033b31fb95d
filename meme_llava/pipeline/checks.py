"""What would stop a stage, found before the first one runs."""

import dataclasses
import difflib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from meme_llava.cli import parse_arguments
from meme_llava.errors import UserError, count
from meme_llava.pipeline.plan import LOOKS, Flags, Stage, is_same
from meme_llava.pipeline.results import ONCE
from meme_llava.pipeline.settings import check_flag_names, list_settings, name_settings
from meme_llava.storage.run_record import ADAPTER_CONFIG, check_not_unfinished


def check_settings(stages: Sequence[Stage], train_flags: Flags) -> None:
    """Have the parsers of all scripts read their flags, so that none fails hours later."""
    from meme_llava.convert.settings import BuildArguments, MergeArguments
    from meme_llava.distributed.launch import parse_launch_arguments
    from meme_llava.evaluate.settings import EvaluateArguments
    from meme_llava.inference.settings import InferArguments
    from meme_llava.train.settings import TrainArguments, parse_train_arguments

    check_flag_names(os.environ, list_settings(), (one.name for one in dataclasses.fields(TrainArguments)))
    classes = {"build": BuildArguments, "merge": MergeArguments, "infer": InferArguments, "evaluate": EvaluateArguments}
    trainings = [stage for stage in stages if stage.name == "train"]
    for stage in stages:
        try:
            if stage.name in classes:
                parse_arguments(classes[stage.name], stage.arguments, "", prog=stage.program[1])
            elif stage.name == "train":
                if stage.program[1] == "-m":
                    parse_launch_arguments(stage.program[3:])
                parse_train_arguments([*stage.arguments, *stage.resume_flags], "", prog=stage.program[-1])
        except UserError as error:
            of_projector = len(trainings) == 2 and stage is trainings[0]
            raise UserError(name_settings(str(error), of_projector, train_flags)) from error


def check_start(
    chosen: Sequence[Stage], stages: Sequence[Stage], train_flags: Flags, variables: Mapping[str, str]
) -> None:
    """Stop at a file or result that is not there, and at a folder that cannot be written to; needs no library."""
    if "help" in train_flags:
        return
    check_paths({stage.name for stage in chosen}, train_flags, variables)
    if variables["NODE_RANK"] == "0":
        check_base_dir(chosen, stages, variables)
        check_needs(chosen, stages)
        if not LOOKS & train_flags.keys():
            check_towers(chosen)
            check_folders(chosen)


def check_paths(names: set[str], train_flags: Flags, variables: Mapping[str, str]) -> None:
    """Stop at data that is not there. Building downloads the models of a training, so it asks for its data, too."""
    given = {}
    if names & {"build", "train"}:
        for flag in ("annotations", "image_folder"):
            typed = train_flags.get(flag)
            given |= {f"--{flag} ": typed[0]} if typed else {f"{flag.upper()}=": variables[flag.upper()]}
    if names - {"merge", "report"}:
        given |= {f"{name}=": variables[name] for name in ("EVAL_ANNOTATIONS", "EVAL_IMAGE_FOLDER")}
    for name, path in given.items():
        if path not in ("auto", "none") and not Path(path).exists():
            raise UserError(f"{name}{path}: no such file or folder")


def check_towers(chosen: Sequence[Stage]) -> None:
    """Stop where a base would be built from a folder that is not there; what else is not there may be on a hub."""
    for stage in (stage for stage in chosen if stage.name == "build" and not stage.is_made):
        for flag in ("language_model", "vision_model"):
            path = stage.flags[flag][0]
            if path.startswith((".", "/", "~")) and not Path(path).is_dir():
                raise UserError(f"{flag.upper()}={path}: no such folder")


def check_base_dir(chosen: Sequence[Stage], stages: Sequence[Stage], variables: Mapping[str, str]) -> None:
    """Stop where BASE_DIR is an adapter, or not there while a trained model lies beside it under nearly its name: from
    a misspelt one a new base would be trained without a word."""
    build = next(stage for stage in stages if stage.name == "build")
    folder = build.folder
    if not any(build.flags["output_dir"][0] in stage.command for stage in chosen):
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"BASE_DIR={folder}: is an adapter, expected a whole model: give what it was merged into, such as "
            f"BASE_DIR={folder.parent / 'merged'} (bash run.sh merge)"
        )
    is_default = is_same(str(folder), f"{variables['OUTPUT_DIR']}/base")
    if near := [] if is_default or folder.exists() else find_near_models(build):
        raise UserError(
            f"BASE_DIR={folder}: no such folder; did you mean {near[0]}? (to build a new base there: mkdir -p {folder})"
        )


def find_near_models(build: Stage) -> list[Path]:
    """Models that were not built whose path differs from that of the base by a slip in one name, nearest first."""
    missing = build.folder
    while not missing.parent.exists():
        missing = missing.parent
    readable = missing.parent.is_dir() and os.access(missing.parent, os.R_OK)
    there = [path.name for path in missing.parent.iterdir() if path.is_dir()] if readable else []
    names = difflib.get_close_matches(missing.name, there, cutoff=0.8)
    paths = [missing.parent / name / build.folder.relative_to(missing) for name in names]
    return [path for path in paths if build.change(output_dir=str(path)).is_given]


def check_folders(chosen: Sequence[Stage]) -> None:
    """Stop where the result of a stage cannot be written."""
    for stage in chosen:
        if stage.name in ONCE and not stage.is_made:
            place = next(place for place in (stage.folder, *stage.folder.parents) if place.exists())
            setting = "BASE_DIR or OUTPUT_DIR" if stage.name == "build" else "OUTPUT_DIR"
            if not place.is_dir():
                raise UserError(f"{stage.folder}: {place} is a file, expected a folder; set another {setting}")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{stage.folder}: this user may not write to {place}; set another {setting}")


def check_needs(chosen: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Stop at a stage that needs the result of another one, which is neither there nor made before."""
    for stage in chosen:
        words = {word.rpartition("=")[2] for word in stage.command}
        for maker in (maker for maker in stages if maker.name != stage.name and maker not in chosen):
            if words & set(maker.flags.get("output_dir", [])) and not maker.is_made:
                check_not_unfinished(maker.folder)
                raise UserError(
                    f"{stage.name} needs {maker.folder}, which is not there; run first, with the same variables: "
                    f"bash run.sh {maker.name}"
                )


def check_gpus(gpus: str, processes: int, environment: Mapping[str, str]) -> None:
    """Stop where fewer GPUs can be used than are asked for, by commands with these variables."""
    # A driver too old for torch shows GPUs that torch cannot use.
    program = "import torch, torch.cuda as c; print(c.device_count() if c.is_available() else 0, torch.version.cuda)"
    command, options = [sys.executable, "-c", program], {"stdout": subprocess.PIPE, "text": True, "check": False}
    answer = subprocess.run(command, env=environment, **options)
    if answer.returncode:
        raise UserError(f"torch cannot be imported by {sys.executable}, for the reason above; install it anew")
    found, cuda = answer.stdout.split()
    if processes > int(found):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "unset")
        made = f"for CUDA {cuda}; nvidia-smi shows whether the driver is older" if cuda != "None" else "without CUDA"
        raise UserError(
            f"GPUS={gpus} asks for {count(processes, 'GPU')}, torch sees {found} (CUDA_VISIBLE_DEVICES={visible}, "
            f"torch made {made}); set GPUS={'cpu' if found == '0' else found}"
        )
