"""Settings of what trains in a model, and how fast. Without torch."""

from dataclasses import dataclass
from typing import Literal

from meme_llava.cli import check_settings, setting
from meme_llava.errors import UserError

RoleTraining = Literal["frozen", "lora", "full"]


@dataclass(kw_only=True)
class LoraRecipe:
    """What trains in each tower, and the LoRA matrices of one that trains by LoRA. The projector trains in full."""

    train_type: str = setting("name of a recipe in configs/train")
    # What makes a train type: its recipe file.
    vision_tower_training: RoleTraining = setting("how the vision tower learns")
    language_model_training: RoleTraining = setting("how the language model learns")
    lora_vision_modules: list[str] = setting("vision projections that get LoRA", nargs="*")
    lora_language_modules: list[str] = setting("language projections that get LoRA", nargs="*")
    lora_r: int = setting("rank of the LoRA matrices", expected="greater than 0")
    lora_alpha: float = setting("LoRA updates are scaled by lora_alpha / lora_r", expected="greater than 0")
    lora_dropout: float = setting("dropout in front of the LoRA matrices", 0.05, expected="0 or more and below 1")
    lora_variant: Literal["lora", "rslora", "dora"] = setting(
        "rslora: scaled by lora_alpha / sqrt(lora_r); dora: the length of each row of a weight learns by itself", "lora"
    )
    load_in_4bit: bool = setting(
        "keep the language model's frozen linear layers in four bits (QLoRA); needs bitsandbytes", False
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_settings(self)
        if {self.vision_tower_training, self.language_model_training} >= {"lora", "full"}:
            raise UserError("vision_tower_training and language_model_training mix lora and full; choose one of them")
        for training, modules in (
            ("vision_tower_training", "lora_vision_modules"),
            ("language_model_training", "lora_language_modules"),
        ):
            if getattr(self, training) == "lora" and not getattr(self, modules):
                raise UserError(f"--{training} is lora, but --{modules} names no module")
        if self.load_in_4bit and self.language_model_training == "full":
            raise UserError(
                f"--load_in_4bit: the language model learns in full (--train_type {self.train_type}), and weights in "
                "four bits cannot learn; choose lora or projector, or leave --load_in_4bit out"
            )

    @property
    def uses_lora(self) -> bool:
        return "lora" in (self.vision_tower_training, self.language_model_training)


@dataclass(kw_only=True)
class LearningRates:
    """Peak learning rates and weight decay of the parameter groups."""

    high_lr: float = setting("peak learning rate of the multi_modal_projector", expected="greater than 0")
    low_lr: float = setting("peak learning rate of everything else that learns", expected="greater than 0")
    weight_decay: float = setting("decay of matrices; never of biases and norms", 0.0, expected="0 or more")
