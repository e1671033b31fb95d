"""Activation checkpointing: which layers keep their activations for the backward pass and which recompute them to save
memory.

Nothing about how much memory there is: `choose_recomputed_layers` asks a function that does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from meme_llava.model.llava import LANGUAGE_MODEL, VISION_TOWER, count_used_vision_layers


@dataclass(frozen=True)
class CheckpointedLayers:
    """How many layers of each tower compute their activations again in the backward pass, counted from the input.

    The first layers, because the backward pass reaches them last: what it then computes again takes the place of what
    the later layers have freed.
    """

    language: int = 0
    vision: int = 0


def count_layers(config: LlavaConfig, vision_trainable: bool) -> CheckpointedLayers:
    """All layers that keep activations; a frozen vision tower keeps none."""
    vision = count_used_vision_layers(config) if vision_trainable else 0
    return CheckpointedLayers(config.text_config.num_hidden_layers, vision)


def choose_recomputed_layers(
    setting: str, most: CheckpointedLayers, fits: Callable[[CheckpointedLayers], bool]
) -> CheckpointedLayers:
    """The layers that --gradient_checkpointing auto, none or full stands for.

    auto: the fewest that fit, language layers before vision layers; all of them where nothing fits.

    Args:
        most: all layers, from `count_layers`.
        fits: whether a step fits in memory when these are computed again.
    """
    if setting == "none":
        return CheckpointedLayers()
    if setting == "auto":
        more_and_more = [CheckpointedLayers(count, 0) for count in range(most.language + 1)]
        more_and_more += [CheckpointedLayers(most.language, count) for count in range(1, most.vision + 1)]
        for recomputed in more_and_more:
            if fits(recomputed):
                return recomputed
    return most


def recompute_layers(model: nn.Module, recomputed: CheckpointedLayers) -> None:
    """Let exactly these layers of a LLaVA, bare or wrapped by peft, compute their activations again."""
    for role, count in ((LANGUAGE_MODEL, recomputed.language), (VISION_TOWER, recomputed.vision)):
        for number, layer in enumerate(_find_layers(model, role)):
            layer.gradient_checkpointing = number < count
            # Reentrant checkpointing needs inputs with a gradient, which LoRA's first layers have not.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _find_layers(model: nn.Module, role: str) -> list[GradientCheckpointingLayer]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and role in name.split(".")
    ]
