"""Settings of train.py, and the recipe of a train type. Without torch.

Every setting has one home. Those without a default are the user's: run.sh or the command line gives them. What makes a
train type stands in configs/train/<train_type>.yaml. The rest has its default here, or in the settings of the room that
uses it. Command line > recipe > default; an unknown or contradictory setting is an error.
"""

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from meme_llava import CONFIGS
from meme_llava.cli import list_free_settings, make_parser, refuse_repeated_keys, setting, suggest
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.sampling import BatchSettings
from meme_llava.dataset.user_files import read_text
from meme_llava.distributed.environment import AUTO, read_engine
from meme_llava.errors import UserError, first_line
from meme_llava.model.accelerators import CPU, name_accelerator
from meme_llava.model.settings import LearningRates, LoraRecipe

RECIPE_FOLDER = CONFIGS / "train"
# What every recipe says; nothing else does.
RECIPE_FIELDS = (
    *("vision_tower_training", "language_model_training"),
    *("lora_vision_modules", "lora_language_modules"),
)
TRACKERS = TENSORBOARD, WANDB, SWANLAB, MLFLOW = "tensorboard", "wandb", "swanlab", "mlflow"
NO_TRACKER = "none"
free = partial(setting, free=True)  # what may differ when a run continues, see `describe` in meme_llava/cli.py


@dataclass(kw_only=True)
class RunFiles:
    """What trains, on what, and where the result goes. Contents are compared when a run continues, not paths."""

    model: Path = setting("LLaVA folder that build_base_model.py or merge_lora.py wrote")
    annotations: Path = setting("annotation file, .json or .jsonl")
    image_folder: Path = setting("folder that the records' image paths start from")
    output_dir: Path = setting("where checkpoints and the final adapter go")


# dataclasses put the fields of the last base first.
@dataclass(kw_only=True)
class TrainArguments(RecordPolicy, LoraRecipe, LearningRates, BatchSettings, RunFiles):
    """All settings of train.py. A function takes the group that it uses; this is every one of them."""

    projector_from: Path | None = setting("a run or checkpoint on the same base, to begin with its projector", None)

    # How long a run is, and how its learning rates rise and fall.
    num_train_epochs: float = setting("passes over the records", expected="greater than 0")
    max_steps: int | None = setting("optimizer steps, in place of num_train_epochs", None, expected="at least 1")
    warmup_ratio: float | None = setting(
        "share of the steps in which rates rise from 0", None, expected="0 or more and below 1"
    )
    warmup_steps: int | None = setting("warmup in steps, in place of warmup_ratio", None, expected="0 or more")
    lr_scheduler_type: Literal["cosine", "linear"] = setting("how the learning rates fall to 0 after warmup", "cosine")
    max_grad_norm: float = setting("gradients are clipped to this norm; 0: they are not", 1.0, expected="0 or more")

    # How a step is computed, and by what.
    precision: Literal["auto", "bf16", "fp32"] = setting("auto: bf16 on a GPU, fp32 on a CPU", "auto")
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = free(
        "kernel of the language model; auto: the fastest one here", "auto"
    )
    gradient_checkpointing: Literal["auto", "none", "full"] = free(
        "recompute layers to save memory; auto: as few as the device's memory asks for", "auto"
    )
    fused_kernels: Literal["auto", "off"] = free(
        "auto: those of liger-kernel on a GPU where it is installed, for rotary positions and gated MLPs", "auto"
    )
    torch_compile: bool = free("compile the layers that repeat; needs a C++ compiler or Triton", False)
    engine: str = free(
        "what divides the work: single, ddp, or a file of configs/deepspeed or configs/fsdp, such as zero2; auto: "
        "single for one process, zero2 on several GPUs, ddp on several CPU processes",
        "auto",
    )
    hang_timeout: int = free("seconds without progress in a process that end the run", 600, expected="1 to 1000000")
    dataloader_workers: int | None = free(
        "processes a device that decode images; else 2 a GPU, none on a CPU", None, expected="0 or more"
    )

    # What is logged of a run, and where.
    logging_steps: int = free("steps between two log lines", 1, expected="at least 1")
    report_to: list[str] = free("trackers: tensorboard, wandb, swanlab, mlflow; or none", [TENSORBOARD])
    run_name: str | None = free("name of the run in the trackers; else its output_dir", None)

    # What a model is evaluated on while it trains.
    eval_every: int | None = free(
        "evaluate on other records every N steps and at the end; else never", None, expected="at least 1"
    )
    eval_annotations: Path | None = free("with --eval_every: the records that are evaluated, not trained on", None)
    eval_image_folder: Path | None = free("with --eval_every: folder that their image paths start from", None)
    eval_limit: int | None = free("with --eval_every: only the first N of their records", None, expected="at least 1")
    eval_images: int = free(
        "with --eval_every: images whose answers are shown, always the same", 4, expected="0 or more"
    )
    eval_max_new_tokens: int = free("with --eval_every: longest answer, in tokens", 128, expected="at least 1")

    # When checkpoints are written, and which one a run continues.
    save_steps: int = free("steps between two checkpoints", 500, expected="at least 1")
    # With one alone, damage to it would cost the whole run.
    save_total_limit: int = free("checkpoints kept, at least 2; older ones are deleted", 2, expected="at least 2")
    resume_from_checkpoint: str | None = free("a checkpoint, or latest: the newest whole one in output_dir", None)
    allow_changes: bool = free("continue a checkpoint although data, base, batch or recipe changed since", False)

    # What is shown of a run without training.
    show_batch: bool = free("print the first batch as a person reads it, and stop", False)
    plan: bool = free("print what the run would take, in memory and time, and stop", False)
    accelerator: str | None = free("with --plan: the GPU to plan for, such as a800-80gb; else this one's device", None)
    gpus: int | None = free("with --plan: how many; else as many as were started", None, expected="at least 1")

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        LoraRecipe.__post_init__(self)  # which holds the values of all fields against what they expect
        RecordPolicy.__post_init__(self)
        self._check_engine()
        self._check_training()
        self._check_companions()

    def _check_engine(self) -> None:
        """Stop at an engine that divides weights which must be whole, or at a compiler that cannot read them."""
        if self.load_in_4bit and self.torch_compile:
            raise UserError("--load_in_4bit and --torch_compile: layers in four bits do not compile; leave one out")
        engine = None if self.engine == AUTO else read_engine(self.engine)
        if engine is not None and engine.shards_weights and (flag := self.whole_weights_for):
            raise UserError(
                f"{flag} needs whole weights on every device, and --engine {self.engine} divides them; choose single, "
                f"ddp or zero2, or leave {flag} out"
            )

    @property
    def whole_weights_for(self) -> str:
        """The flag for which no engine may divide the weights; empty where there is none."""
        if self.load_in_4bit:
            return "--load_in_4bit"
        return "--lora_variant dora" if self.uses_lora and self.lora_variant == "dora" else ""

    def _check_training(self) -> None:
        """Stop at a length or trackers that cannot be meant."""
        if self.warmup_ratio is None and self.warmup_steps is None:
            raise UserError("give --warmup_ratio, a share of the steps, or --warmup_steps")
        for name in self.report_to:
            if name not in (*TRACKERS, NO_TRACKER):
                raise UserError(f"--report_to {name}: no such tracker; there are {', '.join(TRACKERS)}, or none")
        is_repeated = len(set(self.report_to)) < len(self.report_to)
        if is_repeated or (NO_TRACKER in self.report_to and len(self.report_to) > 1):
            raise UserError(f"--report_to is {' '.join(self.report_to)}; expected each tracker once, or none alone")

    def _check_companions(self) -> None:
        """Stop at a setting without the one that it belongs to."""
        for one in dataclasses.fields(self):
            is_given = getattr(self, one.name) != one.default
            if one.name.startswith("eval_") and is_given and not self.eval_every:
                raise UserError(f"--{one.name} belongs to --eval_every, which is not there; add it")
            if one.name in ("eval_annotations", "eval_image_folder") and self.eval_every and not is_given:
                raise UserError(
                    f"--eval_every needs --{one.name}, which is not there; add it, or leave --eval_every out (run.sh "
                    "takes EVAL_ANNOTATIONS and EVAL_IMAGE_FOLDER if neither flag is given)"
                )
        if self.allow_changes and self.resume_from_checkpoint is None:
            raise UserError("--allow_changes belongs to --resume_from_checkpoint, which is not there; add it")
        if (self.accelerator or self.gpus) and not self.plan:
            raise UserError("--accelerator and --gpus belong to --plan, which is not there; add it, or leave them out")
        if self.accelerator and self.accelerator.lower() != CPU:
            name_accelerator(self.accelerator)  # raises for one that is not known
        if self.plan and self.show_batch:
            raise UserError("--plan and --show_batch print different things and stop; pass one of them")

    def list_unused(self) -> list[str]:
        """Settings that this train type does not use, so that none is without effect in silence."""
        unused = [] if self.uses_lora else ["lora_r", "lora_alpha", "lora_dropout", "lora_variant"]
        if self.vision_tower_training == self.language_model_training == "frozen":
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

    def list_defaults(self) -> set[str]:
        """Settings that are as they are where nobody gives them."""
        makers = {one.name: one.default_factory for one in dataclasses.fields(self)}
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        defaults |= {name: make() for name, make in makers.items() if make is not dataclasses.MISSING}
        return {name for name, default in defaults.items() if getattr(self, name) == default}


def free_settings() -> frozenset[str]:
    """Settings that may differ when a run continues: they change neither which records a step trains on nor its
    update, so a finished run is the same with others."""
    return list_free_settings(TrainArguments)


def parse_train_arguments(argv: list[str] | None, description: str, prog: str | None = None) -> TrainArguments:
    """Like `parse_arguments`, with the recipe of `--train_type` between command line and defaults."""
    # deepspeed's launcher, or torch's old one, gives it to every process; the variable LOCAL_RANK says the same.
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if not re.match("--local[-_]rank=", word)]
    parser = make_parser(TrainArguments, description, prog)
    # The train type decides which recipe is read, so it is looked up before everything else.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = parser.error
    finder.add_argument("--train_type", "--train-type")
    train_type = finder.parse_known_args(argv)[0].train_type
    # Without one, what a recipe says is not what the user lacks.
    _set_defaults(parser, dict.fromkeys(RECIPE_FIELDS) if train_type is None else read_recipe(train_type))
    return TrainArguments(**vars(parser.parse_args(argv)))


class _RecipeLoader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        refuse_repeated_keys([(str(key.value).replace("-", "_"), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def read_recipe(train_type: str) -> dict:
    """The settings of configs/train/<train_type>.yaml, their values read by the parser of the command line. Raises
    UserError where there is none, or it holds an unknown, repeated or malformed setting; the message begins with its
    path then."""
    path = RECIPE_FOLDER / f"{train_type}.yaml"
    available = sorted(file.stem for file in RECIPE_FOLDER.glob("*.yaml"))
    if train_type not in available:
        known = ", ".join(available)
        raise UserError(f"--train_type {train_type}: no such recipe in {RECIPE_FOLDER}; there are {known}")
    try:
        recipe = yaml.load(read_text(path), _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not YAML at line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected 'setting: value' lines, found {type(recipe).__name__}")
    recipe = {str(name).replace("-", "_"): value for name, value in recipe.items()}
    known = [one.name for one in dataclasses.fields(TrainArguments)]
    for name in recipe.keys() - known:
        if name.removeprefix("no_") in known:
            raise UserError(f"{path}: {name} is a flag of the command line; write {name.removeprefix('no_')}: false")
        raise UserError(f"{path}: unknown setting {name}{suggest(name, known)}; docs/settings.md lists all")
    if "train_type" in recipe:
        raise UserError(f"{path}: train_type is the name of this file; leave it out")
    parser = make_parser(TrainArguments, "", prog=str(path))
    _set_defaults(parser, dict.fromkeys(known))
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    words = []
    for name, value in recipe.items():
        is_list = name in lists and isinstance(value, list)
        words += [f"--{name}", *map(str, value)] if is_list else [f"--{name}={value}"]
    try:
        settings = vars(parser.parse_args(words))
    except UserError as error:
        # About a line of the file, not about flags.
        message = re.sub(r"(argument )?(?<!\S)--(?=\w)", "", str(error).partition(". --help")[0])
        raise UserError(message) from error
    return {name: settings[name] for name in recipe}


def _set_defaults(parser: argparse.ArgumentParser, defaults: dict) -> None:
    """Give a parser defaults, by which what it required is given."""
    parser.set_defaults(**defaults)
    for action in parser._actions:
        action.required = action.required and action.dest not in defaults
