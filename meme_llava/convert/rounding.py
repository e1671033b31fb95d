"""Copying and rounding of tensors on their way into a file."""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from meme_llava.errors import UserError
from meme_llava.storage.tensor_reader import TensorReader
from meme_llava.storage.tensor_writer import PlannedTensor


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
