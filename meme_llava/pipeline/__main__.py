"""Checks and runs of the stages of run.sh.

    python -m meme_llava.pipeline check|run CALLER STAGES 0 [STAGE…] [FLAGS OF train.py…]

scripts/stages.sh calls it: `check` needs no environment; `run` runs what is not finished. STAGES are those that run.sh
declares, each after its number of words; CALLER is the folder where the user called it. Settings are environment
variables.
"""

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from meme_llava.distributed.launchers import check_started_once
from meme_llava.errors import UserError, printable, stop_on_user_error
from meme_llava.pipeline.checks import check_gpus, check_settings, check_start
from meme_llava.pipeline.commands import run_command
from meme_llava.pipeline.plan import (
    LOOKS,
    Stage,
    choose_devices,
    is_same,
    plan_stages,
    split_flags,
    split_stages,
    start_paths,
)
from meme_llava.pipeline.results import ONCE, check_base, check_results, make_result
from meme_llava.pipeline.settings import check_names, describe_settings, read_settings


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    mode, caller, *words = sys.argv[1:] if argv is None else argv
    declared, words = split_stages(words)
    names, train_flags = split_flags("--help" if word == "-h" else word for word in words)
    train_flags = start_paths(train_flags, caller)
    if not names and train_flags == {"help": []}:
        print(describe_settings())
        return
    variables = read_settings(os.environ)
    check_names(os.environ, list(variables))
    if variables["NNODES"] == "1":
        check_started_once(os.environ)
    if variables["DRY_RUN"] not in ("0", "1"):
        raise UserError(f"DRY_RUN is '{variables['DRY_RUN']}', expected 1 (print the commands, run nothing) or 0")
    processes, environment = choose_devices(variables["GPUS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    stages, chosen = plan_stages(declared, names, train_flags, variables, processes)
    is_dry, looks = variables["DRY_RUN"] == "1", LOOKS & train_flags.keys()
    has_libraries = importlib.util.find_spec("transformers") is not None
    if mode == "run" and not has_libraries:
        raise UserError("the active Python environment lacks our libraries: pip install -r requirements.txt")
    if has_libraries and (is_dry or mode == "run") and not looks:
        check_settings(chosen, train_flags)
    if is_dry:
        print(*(shlex.join(stage.command) for stage in chosen), sep="\n")
    try:
        check_start(chosen, stages, train_flags, variables)
        if has_libraries and (is_dry or mode == "run"):
            check_results([] if looks else chosen)
            if "help" not in train_flags:
                check_base(chosen, stages)
            # Towers are joined on the CPU, so that a plan can be had on any machine.
            needs_gpus = any(stage.name != "build" for stage in chosen) and "DS_ACCELERATOR" not in environment
            if needs_gpus and not looks:
                check_gpus(variables["GPUS"], processes, os.environ | environment)
    except UserError as error:
        if not is_dry:
            raise
        print(printable(f"the run would stop: {error}"), file=sys.stderr)
    if mode == "check":
        return
    os.environ.update(environment)
    if looks:
        run_command(*chosen[0].command)
        return
    run_stages(chosen, stages, variables)


def run_stages(chosen: Sequence[Stage], stages: Sequence[Stage], variables: Mapping[str, str]) -> None:
    """Check records and images, then run the chosen stages in their order, and say where the results are."""
    output, is_first_node = Path(variables["OUTPUT_DIR"]), variables["NODE_RANK"] == "0"
    if is_first_node:
        check_input(chosen, stages)
    for number, stage in enumerate(chosen, 1):
        if len(chosen) > 1:
            print(f"\n=== {number} of {len(chosen)}: {stage.title} ===", flush=True)
        left_out = output / "train" / "quarantine.jsonl"
        if stage.name in ONCE:
            make_result(stage, is_first_node)
            continue
        words = []
        if stage.name == "infer" and is_same(*stage.flags["annotations"], variables["ANNOTATIONS"]):
            print("\nthe model was trained on these memes; EVAL_ANNOTATIONS names others", flush=True)
            # What was left out of training is no reference to compare with.
            words = ["--quarantine", str(left_out)] if left_out.is_file() else []
        run_command(*stage.command, *words)
    if not is_first_node:
        print(f"node {variables['NODE_RANK']} is done; node 0 goes on", file=sys.stderr)
    elif (output / "merged").is_dir():
        print(describe_results(variables))


def check_input(chosen: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Check records and images of training and evaluation, before anything is built for them."""
    # A base is built for a training, whether that follows at once or not.
    is_asked = any(stage.name == "train" or (stage.name == "build" and not stage.is_made) for stage in chosen)
    training = [stage for stage in stages if stage.name == "train" and is_asked]
    if len(training) == 2 and not training[0].is_finished and (training[1].is_finished or training[1].resume_flags):
        raise UserError(
            f"{training[1].folder} holds a training, but {training[0].folder}, from which it would start, is not "
            "there; set another OUTPUT_DIR"
        )
    evaluations = [stage.flags for stage in chosen if stage.name == "evaluate"]
    words = [flags[name][0] for flags in evaluations[:1] for name in ("annotations", "image_folder")]
    if training and not training[-1].is_finished:
        # Of two trainings the last one: both have the same records and images.
        words += [*training[-1].arguments, *training[-1].resume_flags]
    if words:
        run_command("python", "-m", "meme_llava.pipeline.precheck", *words)


def describe_results(variables: Mapping[str, str]) -> str:
    """Where the results are, and what to do with them."""
    output = variables["OUTPUT_DIR"]
    python = "python" if variables["VENV"] == "active" else f"{variables['VENV']}/bin/python"
    curves = f"training_curves.png; tensorboard --logdir {output}/train/tensorboard"
    lines = {"base model": variables["BASE_DIR"], "adapter, curves": f"{output}/train ({curves})"}
    lines["standalone model"] = f"{output}/merged"
    if Path(output, "report.html").is_file():
        lines["scores, answers"] = f"{output}/scores, before training {output}/scores_before"
        lines["page to look at"] = f"{output}/report.html (others beside it: {python} report.py {output} OTHER_DIR)"
    model = shlex.quote(f"{output}/merged")
    lines["ask it yourself"] = f"{python} infer.py --model {model} --image FILE"
    return "\n" + "\n".join(f"{name:<20}{place}" for name, place in lines.items())


if __name__ == "__main__":
    main()
