"""Floating point operations: of a training step, from the model, its trainable parameters and a batch's counts, and of
a run as it goes.

Counted are model FLOPs as the field counts them: matrix multiplications, convolutions and attention, a multiplication
and an addition as two. Nothing that is recomputed to save memory counts, nor norms, activations and the optimizer. A
frozen weight costs no gradient of its own, and nothing flows back below the first thing that learns.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass

import accelerate
import numpy as np
import torch
from torch import nn

from meme_llava.model.accelerators import recognise_accelerator
from meme_llava.model.llava import (
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_TOWER,
    count_image_tokens,
    count_used_vision_layers,
    has_class_token,
    role_of,
)
from meme_llava.model.packing import count_computed

COUNTS, RECORD_IDS = "counts", "record_ids"
# The order in which a vision layer uses its projections; a gradient flows back only to where something learns.
VISION_LAYER_ORDER = ({"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"})


@dataclass(frozen=True)
class StepCounts:
    """What of a batch decides its cost; counts of several batches add up.

    Args:
        positions: of the packed row.
        attention_pairs: pairs of query and key that attend, over all segments; as if no sliding window kept any apart.
        images: that go through vision tower and projector.
        supervised: positions that carry loss.
    """

    positions: float = 0
    attention_pairs: float = 0
    images: float = 0
    supervised: float = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "StepCounts":
        return StepCounts(*(one * times for one in astuple(self)))


def count_batch(batch: Mapping) -> StepCounts:
    """The counts of a batch that `PackingCollator` returned. Reads tensors back: call it before they go to a device."""
    queries = batch["cu_seqlens_q"].long().diff()  # (segments,)
    keys = batch["cu_seqlens_k"].long().diff()  # (segments,)
    # Causal, aligned at the ends: a segment's first query sees all keys but the segment's other queries.
    pairs = queries * (keys - queries) + queries * (queries + 1) // 2
    positions, supervised = batch["input_ids"].numel(), batch["loss_positions"].numel()
    return StepCounts(positions, int(pairs.sum()), len(batch["pixel_values"]), supervised)


@dataclass(frozen=True)
class TrainingCosts:
    """The FLOPs of training a model, forward and backward: float64 (2,) per unit of each count of `StepCounts`.

    Args:
        per_encoded_image: in the vision tower; `per_image` is without it.
    """

    per_position: np.ndarray
    per_attention_pair: np.ndarray
    per_image: np.ndarray
    per_supervised: np.ndarray
    per_encoded_image: np.ndarray

    @classmethod
    def of_model(cls, model: nn.Module) -> "TrainingCosts":
        """Read the costs off a LLaVA that `prepare_trainable` prepared; its parameters may be without storage."""
        per_position, per_image, per_supervised = np.zeros((3, 2))
        vision_learns = any(p.requires_grad for name, p in model.named_parameters() if role_of(name) == VISION_TOWER)
        for name, linear in _find_linears(model):
            parts = name.split(".")
            if role_of(name) == PROJECTOR:
                # Behind a frozen tower the projector's first layer needs no gradient of its input.
                per_image += _cost_linear(name, linear, vision_learns or "linear_1" not in parts)
            elif role_of(name) == LANGUAGE_MODEL:
                # The projector always learns, so a gradient flows through the whole language model.
                cost = per_supervised if "lm_head" in parts else per_position
                cost += _cost_linear(name, linear, reached=True)
        text = model.config.text_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            per_position,
            _cost_attention_pair(text.num_attention_heads * head_size, reached=True) * text.num_hidden_layers,
            per_image * count_image_tokens(model.config),
            per_supervised,
            _cost_vision_tower(model),
        )

    def flops(self, counts: StepCounts) -> float:
        """All FLOPs of a batch, or of several whose counts were added, forward and backward."""
        per_image = self.per_image + self.per_encoded_image
        costs = [self.per_position, self.per_attention_pair, per_image, self.per_supervised]
        return float(np.sum(np.array(astuple(counts)) @ costs))


def _find_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers that compute, LoRA's own among them, without the frozen copies that peft keeps beside."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "original_module" not in name.split(".")
    ]


def _cost_linear(name: str, linear: nn.Linear, reached: bool) -> np.ndarray:
    """FLOPs per row; `reached`: something before it learns, so that its input needs a gradient."""
    # The second LoRA matrix follows the first, which learns.
    gradients = (reached or "lora_B" in name.split(".")) + linear.weight.requires_grad
    return 2.0 * linear.in_features * linear.out_features * np.array([1, gradients])


def _cost_attention_pair(width: int, reached: bool) -> np.ndarray:
    """FLOPs of one query and key over all heads: two products forward, four backward."""
    return 4.0 * width * np.array([1, 2 * reached])


def _cost_vision_tower(model: nn.Module) -> np.ndarray:
    """FLOPs per image of the vision layers that are used."""
    config = model.config.vision_config
    embedding = next(m for name, m in model.named_modules() if VISION_TOWER in name and isinstance(m, nn.Conv2d))
    patches = (config.image_size // config.patch_size) ** 2
    positions = patches + has_class_token(config)
    cost = 2.0 * embedding.weight.numel() * patches * np.array([1, embedding.weight.requires_grad])
    # From the first thing that learns, gradients flow through all that follows.
    reached = any(parameter.requires_grad for parameter in embedding.parameters())
    linears = [(name, linear) for name, linear in _find_linears(model) if VISION_TOWER in name]
    for layer in range(count_used_vision_layers(model.config)):
        for projections in VISION_LAYER_ORDER:
            stage = [
                (name, linear)
                for name, linear in linears
                if f".layers.{layer}." in name and projections & set(name.split("."))
            ]
            cost += sum(_cost_linear(name, linear, reached) for name, linear in stage) * positions
            reached = reached or any(linear.weight.requires_grad for _, linear in stage)
            if "q_proj" in projections:
                cost += _cost_attention_pair(config.hidden_size, reached) * positions**2
    return cost


def collate_and_count(examples: list[dict], collate: Callable[[list[dict]], dict]) -> dict:
    """The batch that `collate` makes, with its `StepCounts` and the ids of its records: counted where reading a tensor
    back costs no waiting."""
    batch = collate(examples)
    return {**batch, COUNTS: count_batch(batch), RECORD_IDS: [str(example["record_id"]) for example in examples]}


class ThroughputMeter:
    """The optimizer steps between two log lines, measured over all processes, which make every call together;
    `records_per_step` is the global batch."""

    def __init__(self, model: nn.Module, accelerator: accelerate.Accelerator, records_per_step: int):
        self._costs, self._accelerator = TrainingCosts.of_model(model), accelerator
        self._text_config = model.config.text_config
        self._records_per_step, device = records_per_step, accelerator.device
        known = recognise_accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        # Of all devices; None where it is unknown, as a CPU's is.
        self._peak_tflops = known.peak_tflops * accelerator.num_processes if known and known.peak_tflops else None
        self._reset()

    def _reset(self) -> None:
        self._counts, self._computed, self._steps, self._start, self._waited = StepCounts(), 0, 0, 0.0, 0.0

    def fetch(self, batches: Iterator[dict], count: int) -> list[dict]:
        """Take the device batches of an optimizer step from the loader, and note how long that took."""
        start = time.perf_counter()
        if self._steps == 0:
            # What happened since the last line, such as writing a checkpoint, is not training.
            self._start = start
        fetched = list(itertools.islice(batches, count))
        self._waited += time.perf_counter() - start
        self._counts = sum((batch.pop(COUNTS) for batch in fetched), self._counts)
        self._computed += sum(count_computed(batch, self._text_config) for batch in fetched)
        self._steps += 1
        return fetched

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Do something between two steps that is not training, such as evaluating."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Figures since the last call, for the log; empty if no step was measured.

        captions_per_second, tokens_per_second and model_tflops_per_second are over all devices; a token is a position
        of a record. data_wait_share is the share of the time in which this process waited for its batches;
        useful_token_share that of computed positions which belong to a record and do not fill up a row. mfu, the model
        FLOPs utilisation, is the share of the devices' bf16 peak that the model's own arithmetic makes up.
        """
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._start
        own = [*astuple(self._counts), self._computed]
        own = torch.tensor(own, dtype=torch.float64, device=self._accelerator.device)
        *totals, computed = (int(value) for value in self._accelerator.reduce(own, "sum").tolist())
        counts, captions = StepCounts(*totals), self._steps * self._records_per_step
        teraflops = self._costs.flops(counts) / seconds / 1e12
        figures = {
            "captions_per_second": captions / seconds,
            "tokens_per_second": counts.positions / seconds,
            "positions_per_caption": counts.positions / captions,
            "images_per_caption": counts.images / captions,
            "useful_token_share": counts.positions / computed,
            "data_wait_share": self._waited / seconds,
            "model_tflops_per_second": teraflops,
        }
        if self._peak_tflops is not None:
            figures["mfu"] = teraflops / self._peak_tflops
        self._reset()
        return figures
