"""Settings of train.py: all groups as one command line, and the recipe of a train type. Without torch.

Every setting has one home. Those without a default are the user's: run.sh or the command line gives them. What makes a
train type stands in configs/train/<train_type>.yaml. The rest has its default here. Command line > recipe > default;
an unknown or contradictory setting is an error.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from meme_llava import CONFIGS
from meme_llava.cli import Parser, check_setting, describe, list_free_settings, make_parser
from meme_llava.dataset.check import RecordPolicy, RecordSource
from meme_llava.dataset.sampling import BatchSettings
from meme_llava.distributed.engines import check_engine_name
from meme_llava.errors import UserError
from meme_llava.model.settings import LearningRates, LoraRecipe


@dataclass(kw_only=True)
class RunFiles:
    """What trains, on what, and where the result goes. Contents are compared when a run continues, not paths."""

    model: Path = field(metadata=describe("LLaVA folder that build_base_model.py or merge_lora.py wrote"))
    annotations: Path = field(metadata=describe("annotation file, .json or .jsonl"))
    image_folder: Path = field(metadata=describe("folder that the records' image paths start from"))
    output_dir: Path = field(metadata=describe("where checkpoints and the final adapter go"))
    projector_from: Path | None = field(
        default=None,
        metadata=describe(
            "output_dir or checkpoint of an earlier run on the same base, with whose multi_modal_projector this one "
            "begins"
        ),
    )


@dataclass(kw_only=True)
class ScheduleSettings:
    """How long a run is, and how its learning rates rise and fall."""

    num_train_epochs: float = field(metadata=describe("passes over the records"))
    max_steps: int | None = field(default=None, metadata=describe("optimizer steps, in place of num_train_epochs"))
    warmup_ratio: float | None = field(
        default=None, metadata=describe("share of the steps in which the learning rates rise from 0")
    )
    warmup_steps: int | None = field(default=None, metadata=describe("warmup in steps, in place of warmup_ratio"))
    lr_scheduler_type: Literal["cosine", "linear"] = field(
        default="cosine", metadata=describe("how the learning rates fall to 0 after warmup")
    )
    max_grad_norm: float = field(default=1.0, metadata=describe("gradients are clipped to this norm"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "num_train_epochs", self.num_train_epochs > 0, "greater than 0")
        check_setting(self, "max_steps", self.max_steps is None or self.max_steps > 0, "at least 1")
        if self.warmup_ratio is None and self.warmup_steps is None:
            raise UserError("give --warmup_ratio, a share of the steps, or --warmup_steps")
        has_share = self.warmup_ratio is None or 0 <= self.warmup_ratio < 1
        check_setting(self, "warmup_ratio", has_share, "between 0 and 1")
        check_setting(self, "warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "0 or more")
        check_setting(self, "max_grad_norm", self.max_grad_norm >= 0, "0 or more")


@dataclass(kw_only=True)
class ComputationSettings:
    """How a step is computed, and by what."""

    precision: Literal["auto", "bf16", "tf32", "fp32"] = field(
        default="auto",
        metadata=describe("auto: bf16 on a GPU, fp32 on a CPU; tf32: fp32 with a GPU's shorter multiplications"),
    )
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "matmul"] = field(
        default="auto", metadata=describe("kernel of the language model; auto: the fastest one here", free=True)
    )
    gradient_checkpointing: Literal["auto", "none", "full"] = field(
        default="auto",
        metadata=describe("recompute layers to save memory; auto: as few as the device's memory asks for", free=True),
    )
    torch_compile: bool = field(
        default=False,
        metadata=describe("compile the layers that repeat; needs a C++ compiler or Triton", free=True),
    )
    engine: str = field(
        default="auto",
        metadata=describe(
            "what divides the work: single, ddp, or a file of configs/deepspeed or configs/fsdp, such as zero2; auto: "
            "single for one process, zero2 on several GPUs, ddp on several CPU processes",
            free=True,
        ),
    )
    hang_timeout: int = field(
        default=600,
        metadata=describe("seconds without progress in any process after which the run is ended", free=True),
    )
    dataloader_workers: int | None = field(
        default=None,
        metadata=describe("processes a device that decode images; else 2 a GPU, none on a CPU", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "hang_timeout", self.hang_timeout > 0, "at least 1")
        workers = self.dataloader_workers
        check_setting(self, "dataloader_workers", workers is None or workers >= 0, "0 or more")
        check_engine_name(self.engine)


@dataclass(kw_only=True)
class CheckpointSettings:
    """When checkpoints are written, and which one a run continues."""

    save_steps: int = field(default=500, metadata=describe("steps between two checkpoints", free=True))
    save_total_limit: int = field(
        default=2, metadata=describe("checkpoints kept, at least 2; older ones are deleted", free=True)
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=describe("a checkpoint folder, or latest for the newest whole one in output_dir", free=True),
    )
    allow_changes: bool = field(
        default=False,
        metadata=describe("continue a checkpoint although data, base, batch or recipe changed since", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "save_steps", self.save_steps > 0, "at least 1")
        # With one alone, damage to it would cost the whole run.
        check_setting(self, "save_total_limit", self.save_total_limit >= 2, "at least 2")
        if self.allow_changes and self.resume_from_checkpoint is None:
            raise UserError("--allow_changes belongs to --resume_from_checkpoint, which is not there; add it")


@dataclass(kw_only=True)
class TrackingSettings:
    """What is logged of a run, and where."""

    logging_steps: int = field(default=1, metadata=describe("steps between two log lines", free=True))
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata=describe("trackers: tensorboard, wandb, swanlab, mlflow; or none", free=True),
    )
    run_name: str | None = field(default=None, metadata=describe("the run's name in trackers", free=True))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "logging_steps", self.logging_steps > 0, "at least 1")
        check_tracker_names(self.report_to)


@dataclass(kw_only=True)
class EvaluationSettings:
    """What a model is evaluated on while it trains."""

    eval_every: int | None = field(
        default=None,
        metadata=describe("evaluate on other records every N steps and at the end; else not while training", free=True),
    )
    eval_annotations: Path | None = field(
        default=None, metadata=describe("with --eval_every: the records that are evaluated, not trained on", free=True)
    )
    eval_image_folder: Path | None = field(
        default=None, metadata=describe("with --eval_every: folder that their image paths start from", free=True)
    )
    eval_limit: int | None = field(
        default=None, metadata=describe("with --eval_every: only the first N of their records", free=True)
    )
    eval_images: int = field(
        default=4,
        metadata=describe("with --eval_every: images whose answers are shown, always the same ones", free=True),
    )
    eval_max_new_tokens: int = field(
        default=128, metadata=describe("with --eval_every: an answer stops here if not by itself", free=True)
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "eval_every", self.eval_every is None or self.eval_every > 0, "at least 1")
        check_setting(self, "eval_limit", self.eval_limit is None or self.eval_limit > 0, "at least 1")
        check_setting(self, "eval_images", self.eval_images >= 0, "0 or more")
        check_setting(self, "eval_max_new_tokens", self.eval_max_new_tokens > 0, "at least 1")
        for name in ("eval_annotations", "eval_image_folder"):
            if self.eval_every is not None and getattr(self, name) is None:
                raise UserError(
                    f"--eval_every needs --{name}, which is not there; add it, or leave --eval_every out (run.sh takes "
                    "EVAL_ANNOTATIONS and EVAL_IMAGE_FOLDER if neither flag is given)"
                )
        for setting in dataclasses.fields(EvaluationSettings):
            is_set = getattr(self, setting.name) != setting.default
            if self.eval_every is None and is_set:
                raise UserError(f"--{setting.name} belongs to --eval_every, which is not there; add it")


@dataclass(kw_only=True)
class LookSettings:
    """What train.py shows of a run without training."""

    show_batch: bool = field(
        default=False, metadata=describe("print the first batch as a person reads it, and stop", free=True)
    )
    plan: bool = field(
        default=False, metadata=describe("print what the run would take, in memory and time, and stop", free=True)
    )
    accelerator: str | None = field(
        default=None,
        metadata=describe("with --plan: the GPU to plan for, such as a800-80gb; else this one's device", free=True),
    )
    gpus: int | None = field(
        default=None,
        metadata=describe("with --plan: how many of them; else as many as the launcher started", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "gpus", self.gpus is None or self.gpus > 0, "at least 1")
        if not self.plan and (self.accelerator is not None or self.gpus is not None):
            raise UserError("--accelerator and --gpus belong to --plan, which is not there; add it, or leave them out")
        if self.plan and self.show_batch:
            raise UserError("--plan and --show_batch print different things and stop; pass one of them")


RECIPE_FOLDER = CONFIGS / "train"
TRACKERS = TENSORBOARD, WANDB, SWANLAB, MLFLOW = "tensorboard", "wandb", "swanlab", "mlflow"
NO_TRACKER = "none"


# dataclasses put the fields of the last base first.
@dataclass(kw_only=True)
class TrainArguments(
    LookSettings,
    CheckpointSettings,
    EvaluationSettings,
    TrackingSettings,
    ComputationSettings,
    RecordPolicy,
    LoraRecipe,
    LearningRates,
    ScheduleSettings,
    BatchSettings,
    RunFiles,
):
    """All settings of train.py. A function takes the group that it uses; this is every one of them."""

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        for group in TrainArguments.__bases__:
            if "__post_init__" in vars(group):
                group.__post_init__(self)
        if self.muon_lr is not None and self.vision_tower_training != "full":
            raise UserError(
                "--muon_lr is for a vision tower that learns in full, and --train_type "
                f"{self.train_type} has none; leave it out"
            )

    @property
    def source(self) -> RecordSource:
        """The records that train."""
        return RecordSource(self.annotations, self.image_folder)

    @property
    def eval_source(self) -> RecordSource | None:
        """The records that are evaluated while others train, if there are some."""
        return None if self.eval_every is None else RecordSource(self.eval_annotations, self.eval_image_folder)

    def list_unused(self) -> list[str]:
        """Settings that this train type does not use, so that none is without effect in silence."""
        unused = []
        if not self.uses_lora:
            unused += ["lora_r", "lora_alpha", "lora_dropout"]
        if {self.vision_tower_training, self.language_model_training} == {"frozen"}:
            unused.append("low_lr")
        if self.vision_tower_training != "lora":
            unused.append("lora_vision_modules")
        if self.language_model_training != "lora":
            unused.append("lora_language_modules")
        if self.max_steps is not None:
            unused.append("num_train_epochs")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            unused.append("warmup_ratio")
        return unused


def check_tracker_names(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that does not exist, one given twice, or others beside none."""
    unknown = [name for name in names if name not in (*TRACKERS, NO_TRACKER)]
    if unknown:
        raise UserError(f"--report_to {unknown[0]}: no such tracker; there are {', '.join(TRACKERS)}, or none")
    if len(set(names)) < len(names) or (NO_TRACKER in names and len(names) > 1):
        raise UserError(f"--report_to is {' '.join(names)}; expected each tracker once, or none alone")


def free_settings() -> frozenset[str]:
    """Settings that may differ when a run continues: they change neither which records a step trains on nor its
    update, so a finished run is the same with others."""
    return list_free_settings(TrainArguments)


def parse_train_arguments(argv: list[str] | None, description: str, prog: str | None = None) -> TrainArguments:
    """Like `parse_arguments`, with the recipe of `--train_type` between command line and defaults."""
    # deepspeed's launcher gives it to every process; the variable LOCAL_RANK says the same.
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank=")]
    parser = make_parser(TrainArguments, description, prog)
    # The train type decides which recipe is read, so it is looked up before everything else.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = parser.error
    finder.add_argument("--train_type", "--train-type")
    train_type = finder.parse_known_args(argv)[0].train_type
    if train_type is not None:
        recipe = read_recipe(train_type)
        for action in parser._actions:
            if action.dest in recipe:
                action.required = False
        parser.set_defaults(**recipe)
    return TrainArguments(**vars(parser.parse_args(argv)))


def read_recipe(train_type: str) -> dict:
    """The settings of configs/train/<train_type>.yaml, each checked to exist and to be of its type."""
    path = RECIPE_FOLDER / f"{train_type}.yaml"
    available = sorted(file.stem for file in RECIPE_FOLDER.glob("*.yaml"))
    if train_type not in available:
        raise UserError(
            f"--train_type {train_type}: no such recipe in {RECIPE_FOLDER}; there are {', '.join(available)}"
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected 'setting: value' lines, found {type(recipe).__name__}")
    parser = make_parser(TrainArguments, "")
    actions = {action.dest: action for action in parser._actions}
    resolved = {}
    for key, value in recipe.items():
        if key not in actions or key in ("train_type", "help"):
            near = difflib.get_close_matches(str(key), actions, n=1)
            raise UserError(f"{path}: unknown setting {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        if value == [] and actions[key].nargs == "+":
            # A role without LoRA; the command line has no spelling for an empty list.
            resolved[key] = []
            continue
        words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        # Through the same parser as the command line, so both accept the same spellings.
        actions[key].required = True
        try:
            resolved[key] = vars(_parse_one(actions[key], words))[key]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return resolved


def _parse_one(action: argparse.Action, words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="recipe", allow_abbrev=False, add_help=False)
    parser._add_action(action)
    return parser.parse_args([action.option_strings[0], *words])
