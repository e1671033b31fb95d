"""Settings of train.py: all groups as one command line, and the recipe of a train type. Without torch.

Every setting has one home. Those without a default are the user's: run.sh or the command line gives them. What makes a
train type stands in configs/train/<train_type>.yaml. The rest has its default here. Command line > recipe > default;
an unknown or contradictory setting is an error.
"""

import argparse
import difflib
import sys
from dataclasses import dataclass

import yaml

from meme_llava import CONFIGS
from meme_llava.cli import Parser, list_free_settings, make_parser
from meme_llava.dataset.settings import BatchSettings, RecordPolicy, RecordSource
from meme_llava.errors import UserError
from meme_llava.model.settings import LearningRates, LoraRecipe
from meme_llava.train.setting_groups import (
    CheckpointSettings,
    ComputationSettings,
    EvaluationSettings,
    LookSettings,
    RunFiles,
    ScheduleSettings,
    TrackingSettings,
)

RECIPE_FOLDER = CONFIGS / "train"


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
