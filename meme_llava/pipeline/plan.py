"""What a call of run.sh runs: its settings, and its stages with the devices of this node, evaluation memes and flags of
the user. Without libraries: the first call comes before an environment is made.
"""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_llava.errors import UserError
from meme_llava.pipeline.settings import list_settings, read_count
from meme_llava.storage.run_record import RUN_RECORD, read_run_record

SAMPLES, UNSEEN = "data/annotations.json", "data/unseen/annotations.json"
LOOKS = {"plan", "show_batch", "help"}  # flags with which train.py trains nothing
OF_BOTH_STAGES = {"train_type", "num_train_epochs", "high_lr", "output_dir"}  # what the projector's own stage replaces
PATH_FLAGS = {"model", "annotations", "image_folder", "output_dir", "projector_from", "resume_from_checkpoint"}
PATH_FLAGS |= {"eval_annotations", "eval_image_folder"}
RECORD_FLAGS = {"bad_records", "allow", "refuse", "max_pixels"}
# Flags of train.py whose settings other stages take, too.
SHARED_SETTINGS = {
    "model": "BASE_DIR",
    "annotations": "ANNOTATIONS",
    "image_folder": "IMAGE_FOLDER",
    "output_dir": "OUTPUT_DIR",
}
SECONDS_TO_MEET = "7200"  # node 0 may have to download and build the base model before it meets the others

Flags = dict[str, list[str]]


@dataclass(frozen=True)
class Stage:
    """A line of run.sh: `python SCRIPT` and what else stands before the first flag, and the flags with their values."""

    name: str
    program: list[str]
    flags: Flags

    @property
    def arguments(self) -> list[str]:
        return [word for name, values in self.flags.items() for word in (f"--{name}", *values)]

    @property
    def command(self) -> list[str]:
        return [*self.program, *self.arguments]

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.flags["output_dir"][0])

    @property
    def title(self) -> str:
        """What tells it from the other stages, two of which may run one script."""
        return f"{self.name} {self.folder}" if "output_dir" in self.flags else self.name

    @property
    def note(self) -> Path:
        """The file beside the result that says what it was made from."""
        return Path(f"{self.folder}.command")

    @property
    def is_given(self) -> bool:
        """Whether the base model is one that was not built: a merged one, or somebody else's."""
        if self.name != "build" or not (self.folder / "config.json").is_file():
            return False
        has_record = (self.folder / RUN_RECORD).is_file()
        return not has_record or read_run_record(self.folder).get("stage") != "build"

    @property
    def is_made(self) -> bool:
        return (self.folder / RUN_RECORD).is_file() or self.is_given

    @property
    def is_finished(self) -> bool:
        return self.is_made and self.note.is_file()

    @property
    def resume_flags(self) -> list[str]:
        """Flags with which training continues, where there are checkpoints."""
        is_interrupted = not self.is_finished and any(self.folder.glob("checkpoint-[0-9]*"))
        return ["--resume_from_checkpoint", "latest"] if is_interrupted else []

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


def start_paths(flags: Flags, caller: str) -> Flags:
    """Flags of train.py with relative paths from the folder where the user typed them."""
    if os.path.realpath(caller) == os.path.realpath(os.curdir):
        return flags

    def start(name: str, value: str) -> str:
        is_path = name in PATH_FLAGS and (name, value) != ("resume_from_checkpoint", "latest")
        return os.path.join(caller, value) if is_path else value

    return {name: [start(name, value) for value in values] for name, values in flags.items()}


def split_stages(words: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages that run.sh declares, each after its number of words, and what stands after a 0."""
    stages, rest = [], list(words)
    while count := int(rest.pop(0)):
        stages.append(Stage(rest[0], *split_flags(rest[1:count])))
        del rest[:count]
    return stages, rest


def plan_stages(
    declared: Sequence[Stage], names: Sequence[str], train_flags: Flags, variables: Mapping[str, str], processes: int
) -> tuple[list[Stage], list[Stage]]:
    """All stages as they are started, and those of them that run.

    Args:
        declared: the stages as run.sh has them.
        names: the stages that the user named; none: all that can run.
        train_flags: what he gave to train.py besides.
        variables: the settings.
        processes: how many train on this node.

    Raises:
        UserError: a setting is wrong, as far as run.sh itself uses it.
    """
    known = list(dict.fromkeys(stage.name for stage in declared))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown stage {unknown[0]}; expected {', '.join(known)}")
    # The first value may be a name that a flag gives.
    if late := [value for values in train_flags.values() for value in values[1:] if value in known]:
        raise UserError(f"{late[0]} stands after the flags of train.py; put stages first")
    looks = LOOKS & train_flags.keys()
    if valued := [flag for flag in looks if train_flags[flag]]:
        raise UserError(f"--{valued[0]} {train_flags[valued[0]][0]}: write --{valued[0]} alone, or leave it out")
    # Before a base is built, the records are checked that it is to be trained on.
    if train_flags and names and "train" not in names and not ("build" in names and train_flags.keys() <= RECORD_FLAGS):
        raise UserError(
            f"--{next(iter(train_flags))} goes to train.py, and train is not among the stages; leave it out, or start "
            "the script itself (DRY_RUN=1 shows its command)"
        )
    if not looks and set(names) != {"train"} and (shared := SHARED_SETTINGS.keys() & train_flags.keys()):
        flag = min(shared)
        raise UserError(
            f"--{flag} reaches train alone, and other stages take {SHARED_SETTINGS[flag]}; set that in its place"
        )
    evaluation = choose_evaluation(variables)
    if "evaluate" in names and evaluation is None:
        raise UserError("evaluate needs EVAL_ANNOTATIONS, an annotation file of memes that are not trained on")
    if looks or variables["NODE_RANK"] != "0":
        # The other nodes wait for node 0, which checks and builds.
        names = ["train"]
    names = names or [name for name in known if evaluation or name not in ("evaluate", "report")]
    asked = evaluation or {"annotations": variables["ANNOTATIONS"], "image_folder": variables["IMAGE_FOLDER"]}
    stages = []
    for stage in declared:
        if stage.name == "train":
            stages += plan_training(stage, train_flags, variables, processes, evaluation)
        else:
            stages.append(stage.change(**asked) if "annotations" in stage.flags else stage)
    return stages, [stage for stage in stages if stage.name in names]


def plan_training(
    stage: Stage, train_flags: Flags, variables: Mapping[str, str], processes: int, evaluation: dict[str, str] | None
) -> list[Stage]:
    """The train stage, one process a GPU; with PROJECTOR_EPOCHS, the stage of the projector before it."""
    nodes, rank, port = read_count(variables, "NNODES"), variables["NODE_RANK"], variables["MASTER_PORT"]
    if not re.fullmatch(r"0|[1-9]\d*", rank):  # 00 would be a node that waits for another 0
        raise UserError(f"NODE_RANK is '{rank}', expected a whole number from 0 to below NNODES")
    batches = (read_count(variables, name) for name in ("GLOBAL_BATCH", "DEVICE_BATCH"))
    flags = stage.flags | {"device_batch_size": [str(choose_device_batch(*batches, processes * nodes))]}
    if "warmup_steps" in train_flags:
        flags.pop("warmup_ratio")
    if evaluation and "eval_every" in train_flags and "eval_annotations" not in train_flags:
        flags |= {f"eval_{name}": [value] for name, value in evaluation.items()}
    if "plan" in train_flags:
        flags["gpus"] = [str(processes * nodes)]
    looks = LOOKS & train_flags.keys()
    launcher = []
    if not looks and (processes, nodes, rank) != (1, 1, "0"):
        launcher = ["-m", "meme_llava.distributed.launch", "--nproc_per_node", str(processes)]
        if nodes > 1 or rank != "0":
            launcher += ["--nnodes", str(nodes), "--node_rank", rank, "--master_addr", variables["MASTER_ADDR"]]
            launcher += ["--start_timeout", SECONDS_TO_MEET]
            port = port or "29500"
        launcher += ["--master_port", port] if port else []
    python, *script = stage.program
    stage = Stage(stage.name, [python, *launcher, *script], flags | train_flags)
    epochs = variables["PROJECTOR_EPOCHS"]
    if is_same(epochs, "0"):
        if not is_same(variables["PROJECTOR_LR"], list_settings()["PROJECTOR_LR"]):
            raise UserError(
                f"PROJECTOR_LR={variables['PROJECTOR_LR']} has no use without PROJECTOR_EPOCHS; the projector's rate "
                "in the training is HIGH_LR"
            )
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


def choose_evaluation(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Annotations and image folder of the memes that are kept out of training; None without any."""
    annotations, folder = variables["EVAL_ANNOTATIONS"], variables["EVAL_IMAGE_FOLDER"]
    if annotations == "auto":
        annotations = UNSEEN if is_same(variables["ANNOTATIONS"], SAMPLES) else "none"
    if annotations == "none":
        if folder != "auto":
            raise UserError(f"EVAL_IMAGE_FOLDER={folder} has no use without EVAL_ANNOTATIONS; set that, too")
        return None
    if folder == "auto":
        folder = str(Path(UNSEEN).parent) if is_same(annotations, UNSEEN) else variables["IMAGE_FOLDER"]
    if is_same(annotations, variables["ANNOTATIONS"]):
        raise UserError("EVAL_ANNOTATIONS is ANNOTATIONS; give memes that are not trained on, or EVAL_ANNOTATIONS=none")
    return {"annotations": annotations, "image_folder": folder}


def choose_devices(gpus: str, visible: str | None) -> tuple[int, dict[str, str]]:
    """Processes of this node for a value of GPUS, and variables that tell libraries what they compute on.

    Args:
        visible: CUDA_VISIBLE_DEVICES as the user or a scheduler has set it.

    Raises:
        UserError: GPUS is none of what it can be, or lists GPUs that are not `visible`.
    """
    if not re.fullmatch(r"auto|cpu(:[1-9])?|0|[1-9]\d*|\d+(,\d+)*,|\d+(,\d+)+", gpus):
        raise UserError(f"GPUS is '{gpus}', expected auto, a count, a list such as 0,3, cpu or cpu:2 (up to cpu:9)")
    if "," in gpus:
        listed = gpus.rstrip(",").split(",")
        if visible and not set(listed) <= set(visible.split(",")):
            raise UserError(
                f"GPUS={gpus} names GPUs that CUDA_VISIBLE_DEVICES={visible} leaves out, which may be another job's; "
                "set GPUS to some of these or to a count, or unset CUDA_VISIBLE_DEVICES"
            )
        return len(listed), {"CUDA_VISIBLE_DEVICES": ",".join(listed)}
    if count := _count_gpus(visible) if gpus == "auto" else 0 if gpus.startswith("cpu") else int(gpus):
        # A single process must see a single GPU, or torch splits its batches over all of them.
        return count, {"CUDA_VISIBLE_DEVICES": (visible or "0").partition(",")[0]} if count == 1 else {}
    # OpenMP's threads spin while they wait; on a laptop that is busy otherwise, long spins halve the speed.
    spins = os.environ.get("GOMP_SPINCOUNT", "1000")
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": spins}
    return int(gpus.partition(":")[2] or 1), cpu


def _count_gpus(visible: str | None) -> int:
    """The GPUs that a job was given, by number or UUID; else those that the driver lists."""
    if visible is not None:
        return sum(word not in ("", "-1") for word in visible.split(","))
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
        near = max(1, round(global_batch / unit)) * unit
        fitting = [] if global_batch % gpus else [n for n in range(1, device_batch) if global_batch // gpus % n == 0]
        other = f" or DEVICE_BATCH={fitting[-1]}" if fitting else ""
        raise UserError(
            f"GLOBAL_BATCH={global_batch} is not a multiple of {product} = {unit}. Set GLOBAL_BATCH={near}{other}."
        )
    return device_batch


def is_same(then: str, now: str) -> bool:
    """Whether two values mean the same: one number, or one place on the disk, in whatever spelling."""
    try:
        return float(then) == float(now)
    except ValueError:
        return os.path.realpath(then) == os.path.realpath(now)
