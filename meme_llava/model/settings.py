"""Settings of what trains in a model, and how fast. Without torch."""

from dataclasses import dataclass, field
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.errors import UserError

RoleTraining = Literal["frozen", "lora", "full"]


@dataclass(kw_only=True)
class LoraRecipe:
    """What trains in each tower, and the LoRA matrices of one that trains by LoRA. The projector trains in full."""

    train_type: str = field(metadata=describe("name of a recipe in configs/train"))
    # What makes a train type: its recipe file.
    vision_tower_training: RoleTraining = field(metadata=describe("how the vision tower learns"))
    language_model_training: RoleTraining = field(metadata=describe("how the language model learns"))
    lora_vision_modules: list[str] = field(metadata=describe("vision projections that get LoRA", nargs="*"))
    lora_language_modules: list[str] = field(metadata=describe("language projections that get LoRA", nargs="*"))
    lora_r: int = field(metadata=describe("rank of the LoRA matrices"))
    lora_alpha: float = field(metadata=describe("LoRA updates are scaled by lora_alpha / lora_r"))
    lora_dropout: float = field(default=0.05, metadata=describe("dropout in front of the LoRA matrices"))

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        if {self.vision_tower_training, self.language_model_training} >= {"lora", "full"}:
            raise UserError("vision_tower_training and language_model_training mix lora and full; choose one of them")
        for role in ("vision", "language"):
            training = "vision_tower_training" if role == "vision" else "language_model_training"
            if getattr(self, training) == "lora" and not getattr(self, f"lora_{role}_modules"):
                raise UserError(f"--{training} is lora, but --lora_{role}_modules names no module")
        for name in ("lora_r", "lora_alpha"):
            check_setting(self, name, getattr(self, name) > 0, "greater than 0")
        check_setting(self, "lora_dropout", 0 <= self.lora_dropout < 1, "between 0 and 1")

    @property
    def uses_lora(self) -> bool:
        return "lora" in (self.vision_tower_training, self.language_model_training)


@dataclass(kw_only=True)
class LearningRates:
    """Peak learning rates and weight decay of the parameter groups."""

    high_lr: float = field(metadata=describe("peak learning rate of the multi_modal_projector"))
    low_lr: float = field(metadata=describe("peak learning rate of everything else that learns"))
    # Only the makers of the embedded towers set it: for a vision tower that learns in full, from random weights.
    muon_lr: float | None = field(default=None, metadata=describe("peak learning rate of Muon", public=False))
    weight_decay: float = field(default=0.0, metadata=describe("decay of matrices; never of biases and norms"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        for name in ("high_lr", "low_lr"):
            check_setting(self, name, getattr(self, name) > 0, "greater than 0")
        check_setting(self, "muon_lr", self.muon_lr is None or self.muon_lr > 0, "greater than 0")
        check_setting(self, "weight_decay", self.weight_decay >= 0, "0 or more")
