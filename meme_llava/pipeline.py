"""Stages of run.sh: what each of them runs, which are finished, which resume.

scripts/stages.sh calls it, first with `check`, which needs no environment, then with `run`. Then come the stages that
run.sh declares, each after its number of words, 0, and what the user typed. Settings are environment variables.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meme_llava.cli import parse_arguments
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.paths import ROOT
from meme_llava.storage.made_from import describe_making, is_same, list_differences, write_note
from meme_llava.storage.run_record import RUN_RECORD

SETTINGS_FILES = (ROOT / "run.sh", ROOT / "scripts" / "more_settings.sh")
ONCE = ("build", "train", "merge")  # stages whose result stands; the others run again, and find what they have
SAMPLES, UNSEEN = "data/annotations.json", "data/unseen/annotations.json"
LOOKS = {"plan", "show_batch", "help"}  # flags with which train.py trains nothing
SETTING = re.compile(r"^([A-Z_]+)=\$\{\1:-(.*?)\} *", re.MULTILINE)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OF_BOTH_STAGES = {"train_type", "num_train_epochs", "high_lr", "output_dir"}  # what the projector's own stage replaces
Flags = dict[str, list[str]]


@dataclass(frozen=True)
class Stage:
    """A line of run.sh: `python SCRIPT` and what else stands before the first flag, and the flags with their values."""

    name: str
    program: list[str]
    flags: Flags
    launcher: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.flags["output_dir"][0])

    @property
    def note(self) -> Path:
        return Path(f"{self.folder}.command")

    @property
    def arguments(self) -> list[str]:
        return [word for name, values in self.flags.items() for word in (f"--{name}", *values)]

    @property
    def command(self) -> list[str]:
        return [self.program[0], *self.launcher, *self.program[1:], *self.arguments]

    @property
    def resume_flags(self) -> list[str]:
        """An interrupted run goes on from its newest checkpoint; train.py refuses if settings changed since."""
        has_checkpoints = self.name == "train" and any(self.folder.glob("checkpoint-[0-9]*"))
        return ["--resume_from_checkpoint", "latest"] if has_checkpoints and not self.is_finished else []

    @property
    def is_made(self) -> bool:
        return (self.folder / RUN_RECORD).is_file()

    @property
    def is_finished(self) -> bool:
        return self.is_made and self.note.is_file()

    def change(self, **values: str) -> "Stage":
        """The stage with other values of some flags."""
        return dataclasses.replace(self, flags=self.flags | {name: [value] for name, value in values.items()})


def split_flags(words: Iterable[str]) -> tuple[list[str], Flags]:
    """What stands before the first flag, and flag → values; of a flag that comes twice, the last, as argparse does."""
    values = before = []
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            values = flags[name.replace("-", "_")] = [value] if has_value else []
        else:
            values.append(word)
    return before, flags


def split_stages(words: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages that run.sh declares, and the words of the user."""
    stages, rest = [], list(words)
    while count := int(rest.pop(0)):
        stages.append(Stage(rest[0], *split_flags(rest[1:count])))
        del rest[:count]
    return stages, rest


def list_settings() -> list[str]:
    """The names of all settings."""
    return [found[1] for path in SETTINGS_FILES for found in SETTING.finditer(path.read_text(encoding="utf-8"))]


def describe_settings() -> str:
    """The text of `bash run.sh --help`: how run.sh is called, and its settings with their defaults."""
    page, more = (path.read_text(encoding="utf-8") for path in SETTINGS_FILES)
    about, _, page = page.partition("\n[ -n ")
    about = re.sub(r"^# ?", "", about.partition("\n")[2], flags=re.MULTILINE)
    settings = page[page.index("# ---") : page.index("source scripts/more")] + "\n" + more[more.index("# ---") :]
    return f"{about}\n\n{SETTING.sub(lambda found: f'{found[1]}={found[2]}'.ljust(34) + ' ', settings)}".rstrip()


def check_names(variables: Mapping[str, str], known: Sequence[str]) -> None:
    """Stop at a variable whose name is nearly that of a setting: it would change nothing."""
    # ENV is set in many containers.
    for name in sorted(name for name, value in variables.items() if value and name not in (*known, "ENV")):
        if near := difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
            raise UserError(
                f"the variable {name} is set, which run.sh does not know; did you mean {near[0]}? (else: unset {name})"
            )


def choose_evaluation(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Annotations and image folder of the memes that are kept out of training; None without any."""
    annotations, folder = variables["EVAL_ANNOTATIONS"], variables["EVAL_IMAGE_FOLDER"]
    if annotations == "auto":
        annotations = UNSEEN if is_same(variables["ANNOTATIONS"], SAMPLES) else "none"
    if annotations == "none":
        return None
    if folder == "auto":
        folder = str(Path(UNSEEN).parent) if is_same(annotations, UNSEEN) else variables["IMAGE_FOLDER"]
    for name, path in (("EVAL_ANNOTATIONS", annotations), ("EVAL_IMAGE_FOLDER", folder)):
        if not Path(path).exists():
            raise UserError(f"{name}={path}: no such file or folder")
    if is_same(annotations, variables["ANNOTATIONS"]):
        raise UserError("EVAL_ANNOTATIONS is ANNOTATIONS; give memes that are not trained on, or EVAL_ANNOTATIONS=none")
    return {"annotations": annotations, "image_folder": folder}


def choose_devices(gpus: str, visible: str | None) -> tuple[int, dict[str, str]]:
    """Processes of this node for a value of GPUS, and variables that tell libraries what they compute on."""
    if not re.fullmatch(r"auto|cpu(:[1-9])?|0|[1-9]\d*|\d+(,\d+)*,|\d+(,\d+)+", gpus):
        raise UserError(f"GPUS is '{gpus}', expected auto, a count, a list such as 0,3, cpu or cpu:2 (up to cpu:9)")
    if "," in gpus:
        listed = gpus.rstrip(",")
        return listed.count(",") + 1, {"CUDA_VISIBLE_DEVICES": listed}
    if count := count_gpus() if gpus == "auto" else 0 if gpus.startswith("cpu") else int(gpus):
        # A single process must see a single GPU, or torch splits its batches over all of them.
        return count, {"CUDA_VISIBLE_DEVICES": (visible or "0").partition(",")[0]} if count == 1 else {}
    # OpenMP's threads spin while they wait; on a laptop that is busy otherwise, long spins halve the speed.
    spins = os.environ.get("GOMP_SPINCOUNT", "1000")
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": spins}
    return int(gpus.partition(":")[2] or 1), cpu


def count_gpus() -> int:
    """The GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU") for line in listed.splitlines())


def choose_device_batch(global_batch: int, device_batch: int, gpus: int) -> int:
    """Records that a GPU computes at once: `device_batch`, or fewer where a step has not so many for each."""
    unit, product = device_batch * gpus, "DEVICE_BATCH x GPUs"
    if global_batch < unit:
        unit, product, device_batch = gpus, "GPUs", global_batch // gpus
    if global_batch % unit or not device_batch:
        nearest = max(1, round(global_batch / unit)) * unit
        raise UserError(
            f"GLOBAL_BATCH={global_batch} is not a multiple of {product} = {unit}. Set GLOBAL_BATCH={nearest}."
        )
    return device_batch


def read_count(variables: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", variables[name]):
        raise UserError(f"{name} is '{variables[name]}', expected a whole number above 0")
    return int(variables[name])


def plan_stages(
    declared: Sequence[Stage], train_flags: Flags, variables: Mapping[str, str], processes: int
) -> list[Stage]:
    """The stages as they are started.

    Raises:
        UserError: a setting is wrong, as far as run.sh itself uses it.
    """
    evaluation = choose_evaluation(variables)
    asked = evaluation or {"annotations": variables["ANNOTATIONS"], "image_folder": variables["IMAGE_FOLDER"]}
    if Path(variables["OUTPUT_DIR"]).is_file():
        raise UserError(f"OUTPUT_DIR={variables['OUTPUT_DIR']} is a file, expected a folder")
    stages = []
    for stage in declared:
        if stage.name == "train":
            stages += plan_training(stage, train_flags, variables, processes, evaluation)
        else:
            stages.append(stage.change(**asked) if "annotations" in stage.flags else stage)
    return stages


def plan_training(
    stage: Stage,
    train_flags: Flags,
    variables: Mapping[str, str],
    processes: int,
    evaluation: dict[str, str] | None,
) -> list[Stage]:
    """The train stage, one process a GPU; with PROJECTOR_EPOCHS, the stage of the projector before it."""
    nodes, node = read_count(variables, "NNODES"), variables["NODE_RANK"]
    if not node.isdecimal() or int(node) >= nodes:
        raise UserError(f"NODE_RANK is '{node}', expected 0 to {nodes - 1}, below NNODES={nodes}")
    batches = (read_count(variables, name) for name in ("GLOBAL_BATCH", "DEVICE_BATCH"))
    flags = stage.flags | {"device_batch_size": [str(choose_device_batch(*batches, processes * nodes))]}
    if "warmup_steps" in train_flags:
        flags.pop("warmup_ratio")
    if evaluation and "eval_every" in train_flags and "eval_annotations" not in train_flags:
        flags |= {f"eval_{name}": [value] for name, value in evaluation.items()}
    if "plan" in train_flags:
        flags["gpus"] = [str(processes * nodes)]
    launcher = ["-m", "meme_llava.distributed.launch", "--die_with_parent", "--processes", str(processes)]
    port = variables["MASTER_PORT"]
    if nodes > 1:
        # Node 0 may have to download and build the base model before it meets the others.
        launcher += ["--nodes", str(nodes), "--node_rank", node, "--start_timeout", "7200"]
        launcher += ["--master_addr", variables["MASTER_ADDR"]]
        port = port or "29500"
    launcher += ["--master_port", port] if port else []
    looks = LOOKS & train_flags.keys()
    stage = dataclasses.replace(stage, flags=flags | train_flags, launcher=[] if looks else launcher)
    epochs = variables["PROJECTOR_EPOCHS"]
    if epochs == "0":
        return [stage]
    if twice := sorted(OF_BOTH_STAGES & train_flags.keys()):
        raise UserError(
            f"--{twice[0]} counts for both stages of PROJECTOR_EPOCHS={epochs}; set TRAIN_TYPE, EPOCHS, HIGH_LR or "
            "OUTPUT_DIR in its place"
        )
    if variables["TRAIN_TYPE"] == "projector":
        raise UserError(f"PROJECTOR_EPOCHS={epochs} and TRAIN_TYPE=projector train the same; set PROJECTOR_EPOCHS=0")
    alone = {"train_type": "projector", "num_train_epochs": epochs, "high_lr": variables["PROJECTOR_LR"]}
    projector = stage.change(**alone, output_dir=f"{variables['OUTPUT_DIR']}/projector")
    # What is shown of a run does not wait for its first stage.
    return [stage] if looks else [projector, stage.change(projector_from=str(projector.folder))]


def choose_stages(
    stages: Sequence[Stage], names: Sequence[str], train_flags: Flags, variables: Mapping[str, str]
) -> list[Stage]:
    """Those of the stages that run: the named ones, or all that can."""
    known = list(dict.fromkeys(stage.name for stage in stages))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown stage {unknown[0]}; expected {', '.join(known)}")
    # The first value may be a name that a flag gives.
    if late := [value for values in train_flags.values() for value in values[1:] if value in known]:
        raise UserError(f"{late[0]} stands after the flags of train.py; put stages first")
    evaluation = choose_evaluation(variables)
    if "evaluate" in names and evaluation is None:
        raise UserError("evaluate needs EVAL_ANNOTATIONS, an annotation file of memes that are not trained on")
    if LOOKS & train_flags.keys() or variables["NODE_RANK"] != "0":
        # The other nodes wait for node 0, which checks and builds.
        names = ["train"]
    names = names or [name for name in known if evaluation or name not in ("evaluate", "report")]
    return [stage for stage in stages if stage.name in names]


def check_settings(stages: Sequence[Stage], train_flags: Flags) -> None:
    """Have the parsers of all scripts read their flags, so that none fails hours later."""
    from meme_llava.convert.settings import BuildArguments, MergeArguments
    from meme_llava.distributed.launch import parse_launch_arguments
    from meme_llava.evaluate.settings import EvaluateArguments
    from meme_llava.inference.settings import InferArguments
    from meme_llava.train.settings import parse_train_arguments

    classes = {"build": BuildArguments, "merge": MergeArguments, "infer": InferArguments, "evaluate": EvaluateArguments}
    for stage in stages:
        try:
            if stage.name in classes:
                parse_arguments(classes[stage.name], stage.arguments, "", prog=stage.program[1])
            elif stage.name == "train":
                parse_launch_arguments([*stage.launcher[2:], *stage.program[1:]])
                parse_train_arguments(stage.arguments, "", prog=stage.program[1])
        except UserError as error:
            raise UserError(name_settings(str(error), stage, train_flags)) from error


def name_settings(message: str, stage: Stage, train_flags: Flags) -> str:
    """A message about flags as one about the settings of run.sh that gave them."""
    given = dict(re.findall(r'--(\w+) "\$([A-Z_]+)"', SETTINGS_FILES[0].read_text(encoding="utf-8")))
    given |= {"master_port": "MASTER_PORT"}
    if stage.flags.get("train_type") == ["projector"]:
        given |= {"num_train_epochs": "PROJECTOR_EPOCHS", "high_lr": "PROJECTOR_LR"}
    message = re.sub(r"^.*?: argument (--\w+): (.*?)(\. --help lists.*)?$", r"\1: \2", message)
    for flag in given.keys() - train_flags.keys():
        message = re.sub(rf"--{flag}\b", given[flag], message)
    return message


def check_needs(chosen: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Stop at a stage that needs the result of another one, which is neither there nor made before."""
    for stage in chosen:
        words = {word.rpartition("=")[2] for word in stage.command}
        for maker in (maker for maker in stages if maker.name != stage.name and maker not in chosen):
            if words & set(maker.flags.get("output_dir", [])) and not maker.is_made:
                raise UserError(
                    f"{stage.name} needs {maker.folder}, which is not there; run first, with the same variables: "
                    f"bash run.sh {maker.name}"
                )


def check_gpus(gpus: str, processes: int) -> None:
    """Stop where fewer GPUs can be used than are asked for."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = int(subprocess.run(count, stdout=subprocess.PIPE, text=True, check=True).stdout)
    if processes > found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise UserError(
            f"GPUS={gpus} asks for {processes} GPUs, torch sees {found} (CUDA_VISIBLE_DEVICES={visible}); set "
            f"GPUS={found or 'cpu'}"
        )


def check_input(chosen: Sequence[Stage], training: Sequence[Stage]) -> None:
    """Check records and images of training and evaluation, before anything is built for them."""
    if training and not training[-1].is_finished:
        for stage in training:
            run_command("python", "-m", "meme_llava.train.precheck", *stage.arguments, *stage.resume_flags)
    if len(training) == 2 and not training[0].is_finished and (training[1].is_finished or training[1].resume_flags):
        raise UserError(
            f"{training[1].folder} was trained with the projector of {training[0].folder}, which is not there; set "
            "another OUTPUT_DIR"
        )
    for stage in [stage for stage in chosen if stage.name == "evaluate"][:1]:
        asked = [f"--{name}={stage.flags[name][0]}" for name in ("annotations", "image_folder")]
        run_command("python", "-m", "meme_llava.evaluate.precheck", *asked)


def run_command(*command: str) -> None:
    """Run `python …` to its end; a signal to this process reaches it. Exits with its code unless that is 0."""
    signals, running = [], []

    def hand_on(number: int, frame: object) -> None:
        signals.append(number)
        for process in running:
            process.terminate()

    # Under nohup, whoever hangs up is not heard.
    heard = (number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
    handlers = {number: signal.signal(number, hand_on) for number in heard}
    # Ctrl-C reaches every process of a terminal; the command is to hear of it once, from here.
    prepare = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    running.append(subprocess.Popen([sys.executable, *command[1:]], stdin=subprocess.DEVNULL, preexec_fn=prepare))
    if signals:
        running[0].terminate()
    code = running[0].wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code == -signal.SIGTERM and signals:
        sys.exit(128 + signals[0])
    if code:
        sys.exit(code if code > 0 else 128 - code)


def make_result(stage: Stage, is_first_node: bool) -> None:
    """Run a stage unless its result is there, made from the same settings and input."""
    from meme_llava.train.settings import FREE_SETTINGS

    making = describe_making(stage.flags, FREE_SETTINGS)
    if not stage.is_finished:
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        run_command(*stage.command, *stage.resume_flags)
        if is_first_node:
            write_note(stage.note, making)
    elif differences := list_differences(stage.note, making):
        print(*differences, sep="\n", file=sys.stderr)
        raise UserError(
            f"{stage.folder} was made from other settings or input (< then, > now). Set another OUTPUT_DIR; the old "
            "result stays."
        )
    else:
        print(f"finished already: {stage.folder}", flush=True)


def run_stages(chosen: Sequence[Stage], variables: Mapping[str, str]) -> None:
    """Run the chosen stages in their order."""
    is_first_node = variables["NODE_RANK"] == "0"
    training = [stage for stage in chosen if stage.name == "train"]
    if is_first_node:
        check_input(chosen, training)
    for stage in chosen:
        if len(training) == 2 and stage in training:
            which = "1 of 2: the projector alone" if stage is training[0] else "2 of 2: with that projector"
            print(f"\n=== train {which} ===", flush=True)
        quarantine = Path(variables["OUTPUT_DIR"], "train", "quarantine.jsonl")
        if stage.name in ONCE:
            make_result(stage, is_first_node)
        elif (
            stage.name == "infer"
            and is_same(stage.flags["annotations"][0], variables["ANNOTATIONS"])
            and quarantine.is_file()
        ):
            # What was left out of training is no true answer to ask for.
            run_command(*stage.command, "--quarantine", str(quarantine))
        else:
            run_command(*stage.command)
    if not is_first_node:
        print(f"node {variables['NODE_RANK']} is done; node 0 merges", file=sys.stderr)
    elif Path(variables["OUTPUT_DIR"], "merged").is_dir():
        print(describe_results(variables))


def describe_results(variables: Mapping[str, str]) -> str:
    """Where the results are, and what to do with them."""
    output = variables["OUTPUT_DIR"]
    python = "python" if variables["VENV"] == "active" else f"{variables['VENV']}/bin/python"
    curves = f"training_curves.png; tensorboard --logdir {output}/train/tensorboard"
    lines = {
        "base model": variables["BASE_DIR"],
        "adapter, curves": f"{output}/train ({curves})",
        "standalone model": f"{output}/merged",
    }
    if Path(output, "report.html").is_file():
        lines |= {
            "scores, answers": f"{output}/scores, before training {output}/scores_before",
            "page to look at": f"{output}/report.html (others beside it: python report.py {output} OTHER_DIR)",
        }
    model = shlex.quote(f"{output}/merged")
    lines["ask it yourself"] = f"{python} infer.py --model {model} --image FILE --question TEXT"
    return "\n" + "\n".join(f"{name:<20}{place}" for name, place in lines.items())


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    mode, *words = sys.argv[1:] if argv is None else argv
    declared, words = split_stages(words)
    names, train_flags = split_flags("--help" if word == "-h" else word for word in words)
    if not names and train_flags == {"help": []}:
        print(describe_settings())
        return
    known = list_settings()
    variables = {name: os.environ.get(name, "") for name in known}
    check_names(os.environ, known)
    processes, environment = choose_devices(variables["GPUS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    stages = plan_stages(declared, train_flags, variables, processes)
    chosen = choose_stages(stages, names, train_flags, variables)
    dry, looks = variables["DRY_RUN"] != "0", LOOKS & train_flags.keys()
    if mode == "run" and importlib.util.find_spec("transformers") is None:
        raise UserError("the active Python environment lacks our libraries: pip install -r requirements.txt")
    if (mode == "run" or (dry and importlib.util.find_spec("yaml"))) and not looks:
        check_settings(chosen, train_flags)
    if dry:
        print(*(shlex.join(stage.command) for stage in chosen), sep="\n")
    if mode == "check":
        return
    os.environ |= environment
    if "help" not in train_flags and variables["NODE_RANK"] == "0":
        check_needs(chosen, stages)
    if looks:
        run_command(*chosen[0].command)
        return
    if "DS_ACCELERATOR" not in environment:
        check_gpus(variables["GPUS"], processes)
    run_stages(chosen, variables)


if __name__ == "__main__":
    main()
