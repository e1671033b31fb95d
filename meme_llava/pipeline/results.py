"""Results of stages that stand: the note beside each of what it was made from, held against the settings of now."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from meme_llava.errors import UserError
from meme_llava.pipeline.commands import run_command
from meme_llava.pipeline.plan import Stage, is_same
from meme_llava.pipeline.settings import map_flags
from meme_llava.storage.files import hash_file, lock, write_json
from meme_llava.storage.json_files import read_json
from meme_llava.storage.run_record import RUN_RECORD

# Stages whose result stands, and which come next; the others run again, and find what they have.
ONCE = {"build": "train merge", "train": "merge", "merge": "infer evaluate"}
# What tells one folder of weights from another; the last one stands beside towers that were trained together.
IDENTIFYING_FILES = (RUN_RECORD, "config.json", f"../{RUN_RECORD}")
CONTENTS = "contents of "
LOCK_PATIENCE_SECONDS = 15  # a network's file system may know for a while of a process that has ended


def make_result(stage: Stage, is_first_node: bool) -> None:
    """Run a stage unless its result is there. Raises UserError for a reason of `check_result`, or where another run
    makes it."""
    making = describe_making(stage.flags)
    if is_there(stage, making):
        return
    if not is_first_node:
        run_command(*stage.command, *stage.resume_flags)
        return
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    # Of its own: the script locks its folder, and a note is replaced when it is written.
    lock_file = stage.folder.parent / f".{stage.folder.name}.lock"
    lock_file.touch()
    with lock(lock_file, LOCK_PATIENCE_SECONDS, stage.folder):
        if is_there(stage, making):  # another run has just made it
            return
        if stage.name == "build":
            print(f"{stage.folder} is not there yet: building it from LANGUAGE_MODEL and VISION_MODEL", flush=True)
        was_made = stage.is_made
        if not was_made:
            # Before it runs: a kill right after the result is in place must not leave one without a note.
            write_json(stage.note, making)
        run_command(*stage.command, *stage.resume_flags)
        if was_made:
            write_json(stage.note, making)


def is_there(stage: Stage, making: Mapping[str, str]) -> bool:
    """Whether a stage has nothing to do; says so then. Raises UserError for a reason of `check_result`."""
    check_result(stage, making)
    if stage.is_given:
        print(f"base model: {stage.folder}, as it is (LANGUAGE_MODEL and VISION_MODEL are not used)", flush=True)
    elif stage.is_finished:
        print(f"finished already: {stage.folder}", flush=True)
    return stage.is_given or stage.is_finished


def check_results(stages: Sequence[Stage]) -> None:
    """Raise UserError for a reason of `check_result`."""
    for stage in stages:
        if stage.name in ONCE:
            check_result(stage, describe_making(stage.flags))


def check_base(chosen: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Raise UserError where training takes a base that run.sh built from other towers than the settings name."""
    names = {stage.name for stage in chosen}
    build = next(stage for stage in stages if stage.name == "build")
    if "train" in names and "build" not in names and build.is_finished and not build.is_given:
        making, noted = describe_making(build.flags), read_note(build.note)
        # A base may have been copied without its towers.
        check_unchanged(build, {name: making.get(name, line) for name, line in noted.items()})


def check_result(stage: Stage, making: Mapping[str, str]) -> None:
    """Raise UserError where the result of a stage was made from something else than `making`, or nobody knows what."""
    if stage.is_given:
        return
    if stage.is_finished:
        check_unchanged(stage, making)
    # Of training its script knows more: it may go on from a checkpoint, or have nothing left to do.
    elif stage.is_made and stage.name != "train":
        raise UserError(
            f"{stage.folder} is there, but this run.sh did not make it and cannot tell from what it was made. Run only "
            f"the stages after it, such as bash run.sh {ONCE[stage.name]}, or {_name_another(stage)}."
        )


def _name_another(stage: Stage) -> str:
    return "set another OUTPUT_DIR" + (", and another BASE_DIR if you set it" if stage.name == "build" else "")


def check_unchanged(stage: Stage, making: Mapping[str, str]) -> None:
    """Raise UserError where the result was made from something else than `making`; what differs is printed before."""
    another = _name_another(stage)
    noted = read_note(stage.note, f"To keep {stage.folder}, {another}.")
    names = list_differences(noted, making)
    if names and all(name.startswith("--") and name not in making for name in names):
        flags = " ".join(f"{name} {noted[name]}".rstrip() for name in names)
        raise UserError(
            f"{stage.folder} was made with {flags}. Repeat that behind the stages (bash run.sh {flags}), or {another}; "
            "the old result stays."
        )
    if names:
        settings = map_flags(of_projector=stage.folder.name == "projector")
        print(*describe_differences(names, noted, making, settings), sep="\n", file=sys.stderr)
        raise UserError(
            f"{stage.folder} was made from other settings or input (< then, > now). Restore them, or {another}; the "
            "old result stays."
        )


def describe_making(flags: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Flags with their values, and hashes of the files that they name, without those flags that change no result."""
    from meme_llava.train.settings import free_settings

    making, free = {}, free_settings()
    for name, values in flags.items():
        if name.removeprefix("no_") in free:
            continue
        making[f"--{name}"] = shlex.join(values)
        if name != "output_dir" and len(values) == 1:
            for file in (values[0], *(f"{values[0]}/{part}" for part in IDENTIFYING_FILES)):
                if Path(file).is_file():
                    making[f"{CONTENTS}--{name}{file.removeprefix(values[0])}"] = hash_file(Path(file))
    return making


def read_note(path: Path, advice: str = "") -> dict[str, str]:
    """What `describe_making` said when a result was made. Raises UserError where the file says something else."""
    noted = read_json(path, advice)
    if not all(isinstance(line, str) for line in noted.values()):
        raise UserError(f"{path}: is no note of run.sh. {advice}")
    return noted


def list_differences(noted: Mapping[str, str], making: Mapping[str, str]) -> list[str]:
    """Names of the flags and files that were others when a result was made."""
    return [
        name
        for name in {**noted, **making}
        if name not in noted or name not in making or not _is_same_line(noted[name], making[name])
    ]


def _is_same_line(then: str, now: str) -> bool:
    try:
        before, after = shlex.split(then), shlex.split(now)
    except ValueError:  # quotes that do not close: somebody edited the note
        return False
    return len(before) == len(after) and all(map(is_same, before, after))


def describe_differences(
    names: Sequence[str], noted: Mapping[str, str], making: Mapping[str, str], settings: Mapping[str, str]
) -> list[str]:
    """Lines with what was so then (<) and what is so now (>), each with the one of `settings` that gives its flag; of
    files of the same name, that they changed."""
    lines = []
    for name in names:
        if name.startswith("--"):
            setting = settings.get(name.removeprefix("--"))
            ending = f" ({setting})" if setting else ""
            lines += [
                f"{sign} {name} {side[name]}{ending}" for sign, side in (("<", noted), (">", making)) if name in side
            ]
        elif name.removeprefix(CONTENTS).partition("/")[0] not in names:  # another folder has other files
            lines.append(f"  {name} changed")
    return lines
