"""Towers in training: Chinese-CLIP's vision tower with heads that name what each patch shows, Qwen2 behind it.

The heads tell a character by a short code, and the language model's embeddings are mixed from codes of the same kind:
what a fresh multi_modal_projector has to learn is then a map of few dimensions, not one for each character.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from layout import PATCHES, SIDE, SLOTS
from scenery import FIGURE_NAMES, MOOD_NAMES, PROP_NAMES
from torch import nn
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel, Qwen2Config, Qwen2Model

CODE = 80  # numbers that tell a character
LOOKUP_SCORE = 8.0  # that wakes a neuron of make_lookup
LOUDNESS = 8  # of what a fresh projector hands on, next to the embeddings of text
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FACTS = (len(MOOD_NAMES), len(FIGURE_NAMES), len(PROP_NAMES))


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. `vision_layers` are those that are used, the last one as make_lookup says; the tower gets one
    more behind them."""

    vision_width: int = 288
    vision_layers: int = 7
    vision_heads: int = 4
    vision_mlp: int = 896
    width: int = 288
    layers: int = 4
    heads: int = 4
    mlp: int = 640
    vocabulary: int = 4096
    initializer_range: float = 0.035


def make_vision_config(sizes: Sizes) -> ChineseCLIPVisionConfig:
    return ChineseCLIPVisionConfig(
        hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_mlp,
        image_size=SIDE,
        patch_size=SIDE // PATCHES,
    )


def make_language_config(sizes: Sizes) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.mlp,
        max_position_embeddings=4096,
        initializer_range=sizes.initializer_range,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


class VisionTower(nn.Module):
    """The used layers of the tower: images (B, 3, SIDE, SIDE) become features (B, patches, width)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.model = ChineseCLIPVisionModel(make_vision_config(sizes))
        show_places(self.model.embeddings)
        silence(self.model.encoder.layers[-1])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.deviation).last_hidden_state[:, 1:]


def show_places(embeddings: nn.Module, patch_deviation: float = 0.02) -> None:
    """Let every patch begin with where it is, as loud as with what it shows.

    Positions become sines and cosines of row and column, of amplitude 1 and wavelengths from 2 pi to 100 times that
    (Vaswani et al. 2017, section 3.5, half of the channels for each axis). CLIP's own 0.02 is lost beside the pixels.
    """
    weight = embeddings.position_embedding.weight  # (1 + patches, width), the class token first
    quarter = weight.shape[1] // 4
    frequencies = 100 ** -(torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(PATCHES), torch.arange(PATCHES), indexing="ij")
    waves = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    with torch.no_grad():
        weight[1:] = torch.cat([wave for axis in waves for wave in (axis.sin(), axis.cos())], dim=1)
        embeddings.patch_embedding.weight *= patch_deviation / embeddings.patch_embedding.weight.std()


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Let a layer pass features on as they are. Among zeros no matrix has a gradient, so it stays silent."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.zero_()
            module.bias.zero_()


@torch.no_grad()
def make_lookup(layer: nn.Module, reader: "PatchReader", deviation: float) -> None:
    """Let a silent layer add the code of the letter that a patch's features (of this deviation) fit.

    Its MLP has a neuron for each of the first, most frequent characters: it is awake where the heads' score of the
    character is high, and writes the character's code where the heads read it. What the heads decide by a softmax then
    stands in the features, for a projector, which has none.
    """
    mlp, norm = layer.mlp, reader.norm
    codes = F.normalize(reader.codes[1 : 1 + mlp.fc1.out_features], dim=-1)  # (neurons, CODE)
    find = reader.code.weight[:CODE]  # of a patch's first letter
    none, one = reader.count.weight[:2]
    certainty = 0.3 * (reader.count.bias[1] - reader.count.bias[0]) - 1
    layer.layer_norm2.load_state_dict(norm.state_dict())
    neurons = slice(len(codes))
    mlp.fc1.weight[neurons] = codes @ find + 0.3 * (one - none)
    mlp.fc1.bias[neurons] = codes @ reader.code.bias[:CODE] - LOOKUP_SCORE + certainty
    mlp.fc2.weight[:, neurons] = 2 * deviation * torch.linalg.pinv(find) @ codes.T / norm.weight[:, None]


class PatchReader(nn.Module):
    """Heads on features: how many letters lie in a patch, which ones and where, and what figure stands there."""

    def __init__(self, sizes: Sizes, characters: int):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.vision_width)
        self.count = nn.Linear(sizes.vision_width, SLOTS + 1)
        self.code = nn.Linear(sizes.vision_width, SLOTS * CODE)
        self.place = nn.Linear(sizes.vision_width, SLOTS * 2)
        self.facts = nn.Linear(sizes.vision_width, sum(FACTS))
        # What a projector could do: codes, or nothing, by a map of the features as they are. It begins with nothing,
        # as features are large.
        self.plain = nn.Linear(sizes.vision_width, SLOTS * CODE)
        nn.init.zeros_(self.plain.weight)
        self.codes = nn.Parameter(torch.randn(characters + 1, CODE) * CODE**-0.5)  # row 0 is not used

    def losses(self, features: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, facts: torch.Tensor) -> dict:
        """Means over patches or letters; those of a character weigh less on pages that have many.

        Args:
            features: (B, patches, width).
            slots: (B, patches, SLOTS) int64; places: (B, patches, SLOTS, 2); see layout.Labels.
            facts: (B, patches, 3) int64, -1 where no figure has its middle.
        """
        has = slots > 0
        # Scores of a softmax may be right and the codes behind them far off. A projector has no softmax.
        target = F.normalize(self.codes, dim=-1).detach()[slots] * has[..., None]  # (B, patches, SLOTS, CODE)
        missed = (self.plain(features).float().view_as(target) - target).square().sum((1, 2, 3))  # (B,)
        letters = has.sum((1, 2))
        features = self.norm(features)
        counts = self.count(features)
        wanted = slots[has]
        codes = self.code(features).unflatten(-1, (SLOTS, CODE))[has]  # (letters, CODE)
        scores = 2 * codes @ self.codes.T.to(codes.dtype)
        places_found = self.place(features).unflatten(-1, (SLOTS, 2))[has]
        # A page of a hundred letters would count twelve times as much as a caption of eight; so, three times.
        page_weights = letters.clamp(min=1).rsqrt()
        weights = page_weights[has.nonzero()[:, 0]]  # (letters,)
        characters = F.cross_entropy(scores.float(), wanted, reduction="none")
        result = {
            "character": (characters * weights).sum() / weights.sum(),
            "count": F.cross_entropy(counts.flatten(0, 1).float(), has.sum(-1).flatten()),
            "place": (places_found.float() - places[has]).abs().mean(),
            "missed": (missed * page_weights).sum() / weights.sum(),
            "accuracy": (scores.argmax(-1) == wanted).float().mean(),
            "counted": (counts.argmax(-1) == has.sum(-1)).float().mean(),
        }
        shown = facts[..., 0] >= 0
        if shown.any():
            guesses = self.facts(features)[shown].float().split(FACTS, dim=-1)
            truths = facts[shown].unbind(-1)
            result["facts"] = sum(F.cross_entropy(guess, truth) for guess, truth in zip(guesses, truths, strict=True))
            result["mood"] = (guesses[0].argmax(-1) == truths[0]).float().mean()
        return result


class LanguageModel(nn.Module):
    """Qwen2 whose tied embeddings (tokens, width) are mixed from codes (tokens, CODE)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        config = make_language_config(sizes)
        config.vocab_size = 8  # its own embedding is not used
        self.model = Qwen2Model(config)
        self.codes = nn.Parameter(torch.randn(sizes.vocabulary, CODE) * CODE**-0.5)
        scale = sizes.initializer_range * sizes.width**0.5
        self.mix = nn.Parameter(nn.init.orthogonal_(torch.empty(CODE, sizes.width)) * scale)

    @property
    def embeddings(self) -> torch.Tensor:
        return self.codes @ self.mix

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, positions, width) in, states out."""
        return self.model(inputs_embeds=states, use_cache=False).last_hidden_state


class SpelledPatches(nn.Module):
    """What a perfect eye would hand to the language model: patches (B, patches, width) from labels alone."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        turns = torch.stack([nn.init.orthogonal_(torch.empty(sizes.width, sizes.width)) for _ in range(SLOTS)])
        turns[0] = torch.eye(sizes.width)
        self.turns = nn.Parameter(turns)
        self.place = nn.Parameter(torch.randn(SLOTS, 2, sizes.width) * sizes.initializer_range)
        self.blank = nn.Parameter(torch.randn(sizes.width) * sizes.initializer_range)
        self.facts = nn.ParameterList(torch.randn(count, sizes.width) * sizes.initializer_range for count in FACTS)

    def forward(
        self, letters: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, facts: torch.Tensor
    ) -> torch.Tensor:
        """`letters` (numbers, width) are the embeddings of characters by number; the others as in PatchReader."""
        has = (slots > 0)[..., None]
        states = torch.zeros(*slots.shape[:2], letters.shape[1], device=letters.device, dtype=letters.dtype)
        for slot in range(SLOTS):
            shown = letters[slots[:, :, slot]] @ self.turns[slot].to(letters.dtype)
            shown = shown + places[:, :, slot] @ self.place[slot]
            states = states + shown * has[:, :, slot]
        states = torch.where(has.any(2), states, self.blank)
        for kind, table in enumerate(self.facts):
            shown = facts[..., kind]
            states = states + table[shown.clamp(min=0)] * (shown >= 0)[..., None]
        return LOUDNESS * states


class ProjectorPool(nn.Module):
    """Several multi_modal_projectors of different ages, each drawn anew when it is old.

    Towers that learn behind all of them become such that a fresh projector learns quickly. Each is LLaVA's: two
    matrices with a GELU between them, drawn as build_base_model.py draws them. Seed 0, run.sh's, is never used.
    """

    def __init__(self, sizes: Sizes, count: int, life: int, peak: float, seed: int):
        super().__init__()
        shapes = ((sizes.width, sizes.vision_width), (sizes.width,), (sizes.width, sizes.width), (sizes.width,))
        self.weights = nn.ParameterList(torch.zeros(count, *shape) for shape in shapes)
        self.sizes, self.life, self.peak, self.next_seed = sizes, life, peak, seed
        self.moments = [[torch.zeros_like(weight) for weight in self.weights] for _ in range(2)]
        self.ages = [0] * count
        # The first ones live longer, each another while, so that later there are always some of every age.
        self.lives = [life + number * life // count for number in range(count)]
        for number in range(count):
            self.renew(number)

    @torch.no_grad()
    def renew(self, number: int) -> None:
        generator = torch.Generator().manual_seed(self.next_seed)
        self.next_seed += 1
        for weight in self.weights:
            drawn = torch.zeros(weight.shape[1:])
            if drawn.dim() == 2:
                drawn.normal_(std=self.sizes.initializer_range, generator=generator)
            weight[number] = drawn.to(weight.device)
        for moment in self.moments:
            for tensor in moment:
                tensor[number] = 0
        self.ages[number] = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, patches, vision width) to states (B, patches, width); B is shared out among the projectors."""
        first, first_bias, second, second_bias = self.weights
        count = len(first)
        parts = features.unflatten(0, (count, -1)).flatten(1, 2)  # (projectors, patches of all its pages, width)
        hidden = F.gelu(
            torch.baddbmm(first_bias[:, None].to(parts.dtype), parts, first.transpose(1, 2).to(parts.dtype))
        )
        states = torch.baddbmm(second_bias[:, None].to(hidden.dtype), hidden, second.transpose(1, 2).to(hidden.dtype))
        return states.reshape(*features.shape[:2], -1)

    def trust(self, device: torch.device) -> torch.Tensor:
        """(projectors,) how much the towers learn behind each: next to nothing behind very young ones."""
        ages = torch.tensor(self.ages, device=device, dtype=torch.float32)
        return (ages / (0.25 * self.life)).clamp(0.02, 1)

    @torch.no_grad()
    def step(self) -> None:
        """Adam with a rate that follows each projector's age, then renewal of the old."""
        device = self.weights[0].device
        ages = torch.tensor(self.ages, device=device, dtype=torch.float32) + 1
        lives = torch.tensor(self.lives, device=device, dtype=torch.float32)
        warm, done = (ages / (0.1 * lives)).clamp(max=1), (ages / lives).clamp(max=1)
        rates = self.peak * warm * (0.05 + 0.95 * (1 + torch.cos(done * torch.pi)) / 2)
        for weight, mean, square in zip(self.weights, *self.moments, strict=True):
            shape = (-1,) + (1,) * (weight.dim() - 1)
            mean.lerp_(weight.grad, 0.1)
            square.lerp_(weight.grad**2, 0.01)
            step = mean / (1 - 0.9**ages).view(shape) / ((square / (1 - 0.99**ages).view(shape)).sqrt() + 1e-10)
            weight -= rates.view(shape) * step
            weight.grad = None
        self.ages = [age + 1 for age in self.ages]
        for number, age in enumerate(self.ages):
            if age >= self.lives[number]:
                self.lives[number] = self.life
                self.renew(number)
