"""Settings of train.py.

Every setting has one home. Those without a default are the user's: run.sh or the command line gives them. What makes a
train type stands in configs/train/<train_type>.yaml. The rest has its default here. Command line > recipe > default;
an unknown or contradictory setting is an error.
"""

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from meme_llava.cli import Parser, check_setting, describe, make_parser
from meme_llava.dataset.policy import LossAverage, RecordPolicy
from meme_llava.distributed.engines import check_engine_name
from meme_llava.errors import UserError
from meme_llava.paths import CONFIGS
from meme_llava.train.trackers import check_tracker_names

RECIPE_FOLDER = CONFIGS / "train"
RoleTraining = Literal["frozen", "lora", "full"]


@dataclass
class TrainArguments(RecordPolicy):
    # What to train, on what: run.sh's variables.
    model: Path = field(metadata=describe("LLaVA folder that build_base_model.py or merge_lora.py wrote"))
    annotations: Path = field(metadata=describe("annotation file, .json or .jsonl"))
    image_folder: Path = field(metadata=describe("folder that the records' image paths start from"))
    output_dir: Path = field(metadata=describe("where checkpoints and the final adapter go"))
    train_type: str = field(metadata=describe("name of a recipe in configs/train"))
    num_train_epochs: float = field(metadata=describe("passes over the records"))
    high_lr: float = field(metadata=describe("peak learning rate of the multi_modal_projector"))
    low_lr: float = field(metadata=describe("peak learning rate of everything else that learns"))
    lora_r: int = field(metadata=describe("rank of the LoRA matrices"))
    lora_alpha: float = field(metadata=describe("LoRA updates are scaled by lora_alpha / lora_r"))
    warmup_ratio: float = field(metadata=describe("share of the steps in which the learning rates rise from 0"))
    model_max_length: int = field(metadata=describe("positions a record may take, image tokens counted"))
    global_batch_size: int = field(metadata=describe("records per optimizer step, over all processes"))
    device_batch_size: int = field(metadata=describe("records a device computes at once"))
    # What makes a train type: its recipe file.
    vision_tower_training: RoleTraining = field(metadata=describe("how the vision tower learns"))
    language_model_training: RoleTraining = field(metadata=describe("how the language model learns"))
    lora_vision_modules: list[str] = field(metadata=describe("vision projections that get LoRA"))
    lora_language_modules: list[str] = field(metadata=describe("language projections that get LoRA"))
    # Right for every run unless somebody knows better.
    projector_from: Path | None = field(
        default=None,
        metadata=describe(
            "output_dir or checkpoint of an earlier run on the same base, with whose multi_modal_projector this one "
            "begins"
        ),
    )
    lora_dropout: float = field(default=0.05, metadata=describe("dropout in front of the LoRA matrices"))
    warmup_steps: int | None = field(default=None, metadata=describe("warmup in steps, in place of warmup_ratio"))
    lr_scheduler_type: Literal["cosine", "linear"] = field(
        default="cosine", metadata=describe("how the learning rates fall to 0 after warmup")
    )
    muon_lr: float | None = field(
        default=None,
        metadata=describe(
            "peak learning rate of Muon, which then updates the matrices of the vision tower's layers; else AdamW, "
            "at low_lr"
        ),
    )
    weight_decay: float = field(default=0.0, metadata=describe("decay of matrices; never of biases and norms"))
    max_grad_norm: float = field(default=1.0, metadata=describe("gradients are clipped to this norm"))
    max_steps: int | None = field(default=None, metadata=describe("optimizer steps, in place of num_train_epochs"))
    seed: int = field(default=42, metadata=describe("order of the records, LoRA start values, dropout"))
    precision: Literal["auto", "bf16", "tf32", "fp32"] = field(
        default="auto",
        metadata=describe("auto: bf16 on a GPU, fp32 on a CPU; tf32: fp32 with a GPU's shorter multiplications"),
    )
    loss_average: LossAverage = field(
        default="token", metadata=describe("what weighs the same in an optimizer step: every token, or every caption")
    )
    shared_images: bool = field(
        default=True,
        metadata=describe("draw images instead of records; all captions of one share its encoding and prompt"),
    )
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "matmul"] = field(
        default="auto", metadata=describe("kernel of the language model; auto: the fastest one here")
    )
    gradient_checkpointing: Literal["auto", "none", "full"] = field(
        default="auto",
        metadata=describe("recompute layers to save memory; auto: as few as the device's memory asks for"),
    )
    cache_vision_features: bool = field(
        default=False,
        metadata=describe("with a frozen vision tower: encode every image once, before training, to output_dir"),
    )
    torch_compile: bool = field(
        default=False,
        metadata=describe("compile the layers that repeat; needs a C++ compiler or Triton"),
    )
    engine: str = field(
        default="auto",
        metadata=describe(
            "what divides the work: single, ddp, or a file of configs/deepspeed or configs/fsdp, such as zero2; auto: "
            "single for one process, zero2 on several GPUs, ddp on several CPU processes"
        ),
    )
    hang_timeout: int = field(
        default=600, metadata=describe("seconds without progress in any process after which the run is ended")
    )
    dataloader_workers: int | None = field(
        default=None,
        metadata=describe("processes a device that decode images and tokenise; else 2 a GPU, none on a CPU"),
    )
    logging_steps: int = field(default=1, metadata=describe("steps between two log lines"))
    save_steps: int = field(default=500, metadata=describe("steps between two checkpoints"))
    save_total_limit: int = field(default=2, metadata=describe("checkpoints kept, at least 2; older ones are deleted"))
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata=describe("trackers: tensorboard, wandb, swanlab, mlflow; or none"),
    )
    run_name: str | None = field(default=None, metadata=describe("the run's name in trackers"))
    eval_every: int | None = field(
        default=None,
        metadata=describe("evaluate on other records every N steps and at the end; else not while training"),
    )
    eval_annotations: Path | None = field(
        default=None, metadata=describe("with --eval_every: the records that are evaluated, not trained on")
    )
    eval_image_folder: Path | None = field(
        default=None, metadata=describe("with --eval_every: folder that their image paths start from")
    )
    eval_limit: int | None = field(
        default=None, metadata=describe("with --eval_every: only the first N of their records")
    )
    eval_images: int = field(
        default=4, metadata=describe("with --eval_every: images whose answers are shown, always the same ones")
    )
    eval_max_new_tokens: int = field(
        default=128, metadata=describe("with --eval_every: an answer stops here if not by itself")
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata=describe("a checkpoint folder, or latest for the newest whole one in output_dir")
    )
    allow_changes: bool = field(
        default=False, metadata=describe("continue a checkpoint although data, base, batch or recipe changed since")
    )
    show_batch: bool = field(default=False, metadata=describe("print the first batch as a person reads it, and stop"))
    plan: bool = field(default=False, metadata=describe("print what the run would take, in memory and time, and stop"))
    accelerator: str | None = field(
        default=None, metadata=describe("with --plan: the GPU to plan for, such as a800-80gb; else this one's device")
    )
    gpus: int | None = field(
        default=None, metadata=describe("with --plan: how many of them; else as many as the launcher started")
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        super().__post_init__()
        trainings = {self.vision_tower_training, self.language_model_training}
        if trainings >= {"lora", "full"}:
            raise UserError("vision_tower_training and language_model_training mix lora and full; choose one of them")
        for role in ("vision", "language"):
            training = "vision_tower_training" if role == "vision" else "language_model_training"
            if getattr(self, training) == "lora" and not getattr(self, f"lora_{role}_modules"):
                raise UserError(f"--{training} is lora, but --lora_{role}_modules names no module")
        check_setting(self, "muon_lr", self.muon_lr is None or self.muon_lr > 0, "greater than 0")
        if self.muon_lr is not None and self.vision_tower_training != "full":
            raise UserError(
                "--muon_lr is for a vision tower that learns in full, and --train_type "
                f"{self.train_type} has none; leave it out"
            )
        for name in ("num_train_epochs", "high_lr", "low_lr", "lora_r", "lora_alpha", "model_max_length"):
            check_setting(self, name, getattr(self, name) > 0, "greater than 0")
        for name in ("global_batch_size", "device_batch_size", "logging_steps", "save_steps", "hang_timeout"):
            check_setting(self, name, getattr(self, name) > 0, "at least 1")
        # With one alone, damage to it would cost the whole run.
        check_setting(self, "save_total_limit", self.save_total_limit >= 2, "at least 2")
        if self.allow_changes and self.resume_from_checkpoint is None:
            raise UserError("--allow_changes belongs to --resume_from_checkpoint, which is not there; add it")
        for name in ("weight_decay", "max_grad_norm", "seed"):
            check_setting(self, name, getattr(self, name) >= 0, "0 or more")
        check_setting(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "between 0 and 1")
        check_setting(self, "lora_dropout", 0 <= self.lora_dropout < 1, "between 0 and 1")
        check_setting(self, "max_steps", self.max_steps is None or self.max_steps > 0, "at least 1")
        for name in ("warmup_steps", "dataloader_workers"):
            check_setting(self, name, getattr(self, name) is None or getattr(self, name) >= 0, "0 or more")
        self._check_evaluation()
        check_engine_name(self.engine)
        check_tracker_names(self.report_to)
        check_setting(self, "gpus", self.gpus is None or self.gpus > 0, "at least 1")
        if self.cache_vision_features and self.vision_tower_training != "frozen":
            raise UserError(
                f"--cache_vision_features needs a frozen vision tower; --train_type {self.train_type} trains it "
                f"({self.vision_tower_training}), so its features change"
            )
        if not self.plan and (self.accelerator is not None or self.gpus is not None):
            raise UserError("--accelerator and --gpus belong to --plan, which is not there; add it, or leave them out")
        if self.plan and self.show_batch:
            raise UserError("--plan and --show_batch print different things and stop; pass one of them")

    def _check_evaluation(self) -> None:
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
        for setting in dataclasses.fields(self):
            is_set = getattr(self, setting.name) != setting.default
            if self.eval_every is None and setting.name.startswith("eval_") and is_set:
                raise UserError(f"--{setting.name} belongs to --eval_every, which is not there; add it")

    @property
    def uses_lora(self) -> bool:
        return "lora" in (self.vision_tower_training, self.language_model_training)

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
        if self.warmup_steps is not None:
            unused.append("warmup_ratio")
        return unused


def parse_train_arguments(argv: list[str] | None, description: str, prog: str | None = None) -> TrainArguments:
    """Like `parse_arguments`, with the recipe of `--train_type` between command line and defaults."""
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
