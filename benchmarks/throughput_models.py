"""Makes the models of throughput.py from random weights, and describes how near a scaled one comes to the real costs.

Every way of training uses the same parameters: a plain LLaVA of transformers, and ours, which can leave out steps of
its own to show what each of them brings.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from throughput_devices import Platform
from torch import nn
from torch.nn import functional
from transformers import ChineseCLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from meme_llava.dataset.images import ImagePolicy
from meme_llava.model.cross_entropy_head import CrossEntropyHead
from meme_llava.model.llava import count_image_tokens, make_empty_model
from meme_llava.model.packed_attention import choose_attention
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava
from meme_llava.model.trainable import ParameterGroup, plan_parameter_groups, prepare_trainable
from meme_llava.train.settings import TrainArguments, read_recipe

PATCH_SIZE = 14
# OpenAI's CLIP and Chinese-CLIP normalise with these.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# The published settings.
HIGH_LR, LOW_LR = 1e-3, 2e-5


@dataclass(frozen=True)
class Shapes:
    """Dimensions of both towers, and the LoRA in them."""

    language: dict
    vision: dict
    patches_a_side: int
    image_token_id: int
    lora_r: int
    lora_alpha: int
    lora_dropout: float

    @property
    def config(self) -> LlavaConfig:
        """The configuration that build_base_model.py would write."""
        text_config = Qwen2Config(
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=False,
            use_cache=False,
            **self.language,
        )
        vision_config = ChineseCLIPVisionConfig(
            image_size=self.patches_a_side * PATCH_SIZE, patch_size=PATCH_SIZE, **self.vision
        )
        return LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_id=self.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )

    @property
    def image_policy(self) -> ImagePolicy:
        return ImagePolicy(self.patches_a_side * PATCH_SIZE, IMAGE_MEAN, IMAGE_STD)


def _shape_language(width: int, layers: int, heads: int, key_value_heads: int, mlp: int, vocabulary: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


def _shape_vision(width: int, layers: int, heads: int, mlp: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


SHAPES = {
    # Qwen2-7B-Instruct with Chinese-CLIP ViT-L/14-336.
    "full": Shapes(
        _shape_language(3584, 28, 28, 4, 18944, 152_064),
        _shape_vision(1024, 24, 16, 4096),
        *(24, 151_646, 32, 64, 0.05),
    ),
    # The same depth, everything else about 3/32 as large: 7 x 7 patches in place of 24 x 24. Drawing dropout's random
    # numbers takes a CPU longer than the layers that they are for.
    "scaled": Shapes(
        _shape_language(336, 28, 7, 1, 1776, 14_256),
        _shape_vision(96, 24, 3, 384),
        *(7, 14_255, 3, 6, 0.0),
    ),
    # For tests: every line of the code in seconds.
    "tiny": Shapes(
        _shape_language(64, 2, 4, 2, 160, 512),
        _shape_vision(32, 3, 2, 64),
        *(3, 511, 2, 4, 0.0),
    ),
}


class LadderHead(CrossEntropyHead):
    """Our head, which can also make the logits of all positions that it is given, in float32, as the published way."""

    makes_all_logits = False

    def forward(self, hidden, targets=None, weights=None):
        """As `CrossEntropyHead.forward`."""
        if not self.makes_all_logits or targets is None:
            return super().forward(hidden, targets, weights)
        logits = functional.linear(hidden, self.weight).float()  # (positions, vocabulary)
        return (weights * functional.cross_entropy(logits, targets, reduction="none")).sum()


class LadderLlava(PackedLlava):
    """Our model, which can also run the vision tower as the published way does: all layers, pixels as float32."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.lm_head = LadderHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `PackedLlava.encode_images` for uint8; pixels that are float32 already go through all layers."""
        if pixel_values.dtype == torch.uint8:
            return super().encode_images(pixel_values)
        outputs = self.model.vision_tower(pixel_values.to(self.model.vision_tower.dtype), output_hidden_states=True)
        return outputs.hidden_states[self.config.vision_feature_layer][:, 1:]


@dataclass(frozen=True)
class Models:
    """Two readings of the same parameters, and what of them learns."""

    plain: nn.Module
    packed: nn.Module
    groups: list[ParameterGroup]
    start_values: list[torch.Tensor]  # of the groups' parameters, one after another

    def restore(self) -> None:
        """Put everything that learns back to its start, without gradients."""
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, self.start_values, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    @property
    def head(self) -> LadderHead:
        return next(module for module in self.packed.modules() if isinstance(module, LadderHead))


def make_models(shapes: Shapes, platform: Platform, seed: int) -> Models:
    """Both models with random weights, made on the device."""
    device, dtype = platform.device, platform.dtype
    packed = make_empty_model(LadderLlava, shapes.config, dtype)
    _fill_with_random_values(packed, device, seed)
    attention = choose_attention("auto", device, uses_bf16=dtype == torch.bfloat16)
    prepare_packed_llava(packed, shapes.image_policy, attention, "the benchmark's model")
    arguments = make_arguments(shapes, seed)
    packed = prepare_trainable(packed, arguments, seed).to(device).train()
    plain = prepare_trainable(make_empty_model(LlavaForConditionalGeneration, shapes.config, dtype), arguments, seed)
    for name, parameter in list(packed.named_parameters()):
        set_parameter(plain, name, parameter)
    plain = plain.to(device).train()
    groups = plan_parameter_groups(packed, arguments)
    start_values = [parameter.detach().cpu().clone() for group in groups for parameter in group.parameters]
    return Models(plain, packed, groups, start_values)


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one of that name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


def make_arguments(shapes: Shapes, seed: int) -> TrainArguments:
    """The published settings; nothing is read from the paths."""
    return TrainArguments(
        model=Path("model"),
        annotations=Path("annotations.json"),
        image_folder=Path("images"),
        output_dir=Path("output"),
        train_type="lora",
        num_train_epochs=5,
        high_lr=HIGH_LR,
        low_lr=LOW_LR,
        lora_r=shapes.lora_r,
        lora_alpha=shapes.lora_alpha,
        lora_dropout=shapes.lora_dropout,
        warmup_ratio=0.1,
        model_max_length=2048,
        global_batch_size=64,
        device_batch_size=8,
        seed=seed,
        **read_recipe("lora"),
    )


def _fill_with_random_values(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give every parameter storage on the device: norms 1, biases 0, matrices so that activations keep their size."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, outline in list(model.named_parameters()):
        value = torch.empty(outline.shape, dtype=outline.dtype, device=device)
        if value.dim() > 1:
            fan_in = value[0].numel()
            value.normal_(std=fan_in**-0.5, generator=generator)
        else:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        set_parameter(model, name, nn.Parameter(value, requires_grad=False))


def measure_proportions(shapes: Shapes, padded_length: int, text_length: float) -> dict[str, float]:
    """What a record of the published way costs, part by part, as shares of the language model's linear layers.

    Args:
        padded_length: positions of a padded record.
        text_length: mean positions of prompt and caption.
    """
    text, vision = shapes.config.text_config, shapes.config.vision_config
    width, head_width = text.hidden_size, text.hidden_size // text.num_attention_heads
    sides = [(width, width), *[(width, head_width * text.num_key_value_heads)] * 2, (width, width)]
    sides += [(width, text.intermediate_size)] * 3
    body = text.num_hidden_layers * sum(2 * rows * columns for rows, columns in sides)  # per position
    image_tokens = count_image_tokens(shapes.config)
    vision_width, patches = vision.hidden_size, image_tokens + 1
    vision_layer = patches * (8 * vision_width**2 + 4 * vision_width * vision.intermediate_size)
    vision_layer += 4 * vision_width * patches**2
    lora = text.num_hidden_layers * sum(2 * shapes.lora_r * (rows + columns) for rows, columns in sides)
    return {
        "text tokens for one image token": text_length / image_tokens,
        "padded positions for one real": padded_length / (image_tokens + text_length),
        "vocabulary for one of the width": text.vocab_size / width,
        "LM head": 2 * width * text.vocab_size / body,
        "attention": 2 * text.num_hidden_layers * width * padded_length / body,
        "LoRA": lora / body,
        "vision tower": vision.num_hidden_layers * vision_layer / (body * padded_length),
    }
