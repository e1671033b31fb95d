"""Knows a LLaVA's tensors on disk: their names, how they are copied or rounded.

Files use the classic LLaVA layout, which old and new transformers read:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.*`.
Modules in memory are named as transformers 5 names them: `model.vision_tower.*`, … and `lm_head.*`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from meme_llava.errors import UserError
from meme_llava.storage.tensor_reader import TensorReader
from meme_llava.storage.tensor_writer import PlannedTensor

# (in memory, on disk); the first match wins.
_PREFIXES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def to_disk_name(name: str) -> str:
    """`model.vision_tower.x` → `vision_tower.vision_model.x`, and so on for every part of a LLaVA."""
    for in_memory, on_disk in _PREFIXES:
        if name.startswith(in_memory):
            return on_disk + name.removeprefix(in_memory)
    raise ValueError(f"tensor {name!r} belongs to no part of a LLaVA")


def to_memory_name(name: str) -> str:
    """The inverse of `to_disk_name`."""
    for in_memory, on_disk in _PREFIXES:
        if name.startswith(on_disk):
            return in_memory + name.removeprefix(on_disk)
    raise ValueError(f"tensor {name!r} is not in the classic LLaVA layout")


def find_stored(tensors: TensorReader, name: str) -> str:
    """The name on disk of a LLaVA's parameter in memory; a tied head is stored as the embedding."""
    disk_name = to_disk_name(name)
    if disk_name not in tensors and name == "lm_head.weight":
        return to_disk_name("model.language_model.embed_tokens.weight")
    return disk_name


class Rounding:
    """Rounds float32 values once to the dtype of a file, and counts those that it cannot hold."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.overflow = Counter()  # tensor name: values that are not finite in `dtype`
        self._examples = {}

    def apply(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` in the file's dtype."""
        rounded = values.to(self.dtype)
        if values.numel():
            # The extremes alone tell, and NaN is passed on; a mask over all values takes many times as long.
            extremes = torch.stack(torch.aminmax(values))
            if not torch.isfinite(extremes.to(self.dtype).float()).all():
                unstorable = ~torch.isfinite(rounded.float())
                self.overflow[name] += int(unstorable.sum())
                self._examples.setdefault(name, values[unstorable][0].item())
        return rounded

    def check(self) -> None:
        """Raise UserError if any value was not finite, or is not in the file's dtype."""
        if self.overflow:
            name, count = self.overflow.most_common(1)[0]
            dtype, limit = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype).max
            example = self._examples[name]
            advice = (
                "Train with a lower learning rate, or store it with --dtype bfloat16."
                if math.isfinite(example)
                else "What it is made of is damaged or diverged in training; make or download that again."
            )
            raise UserError(
                f"{sum(self.overflow.values())} values in {len(self.overflow)} tensors are not finite in {dtype}, "
                f"which holds up to {limit:.6g}: {name} has {count}, such as {example:g}. {advice}"
            )


def plan_copy(tensors: TensorReader, name: str) -> PlannedTensor:
    """The bytes of a stored tensor as they are."""
    stored = tensors.stored[name]
    return PlannedTensor(stored.dtype, stored.shape, lambda: tensors.read_pieces(name, reuse=True))


def plan_rounded(
    name: str, shape: tuple[int, ...], rounding: Rounding, make_values: Callable[[], Iterator[torch.Tensor]]
) -> PlannedTensor:
    """A tensor made of float pieces, each rounded to the file's dtype."""
    return PlannedTensor(
        rounding.dtype, shape, lambda: (rounding.apply(name, values.float()) for values in make_values())
    )


def check_same_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Raise UserError unless both name the same tensors."""
    expected, found = set(expected), set(found)
    if missing := sorted(expected - found):
        raise UserError(f"{source}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}")
    if unexpected := sorted(found - expected):
        raise UserError(f"{source}: {len(unexpected)} tensors are unexpected, e.g. {', '.join(unexpected[:3])}")
