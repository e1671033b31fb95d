"""Knows tensors on disk: names, shards, reading one tensor at a time, and which base a file belongs to.

Files use the classic LLaVA layout, which old and new transformers read:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.*`.
Modules in memory are named as transformers 5 names them: `model.vision_tower.*`, … and `lm_head.*`.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from meme_llava.errors import UserError

MAX_SHARD_SIZE = "5GB"
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
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


class TensorFolder:
    """The tensors of a model folder in safetensors form, read one at a time.

    Raises:
        UserError: weights are missing, or a file is not safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files = {}
        for path in self._list_files():
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: cannot be read ({error}). Download or build it again.") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def _list_files(self) -> list[Path]:
        index = self.folder / WEIGHTS_INDEX
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [self.folder / name for name in names]
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {WEIGHTS_INDEX}")

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def __iter__(self):
        return iter(sorted(self._files))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the shape and dtype of the file."""
        return self._files[name].get_tensor(name)

    def read_ends(self, name: str) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
        """Shape, first row and last row of a tensor, without reading what lies between."""
        view = self._files[name].get_slice(name)
        shape = tuple(view.get_shape())
        if not shape:
            scalar = self.read(name).reshape(1)
            return shape, scalar, scalar
        return shape, view[0:1], view[shape[0] - 1 : shape[0]]


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write tensors as `model.safetensors`, or as shards of at most 5 GB with their index."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for file_name, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fingerprint_folder(folder: Path) -> str:
    """A short identity of a model's weights: sha256 over every tensor's name, shape, dtype, first and last row.

    Tells models apart, also those of equal shapes, without reading all of 15 GB. It is no checksum: a change in the
    middle of a tensor goes unseen.
    """
    digest = hashlib.sha256()
    with TensorFolder(folder) as tensors:
        for name in tensors:
            shape, first, last = tensors.read_ends(name)
            digest.update(f"{name} {shape} {first.dtype}\n".encode())
            for row in (first, last):
                digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_overflow(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why `tensor` cannot be stored as `dtype`, or None: a non-finite value, or one that would become infinite."""
    if not torch.isfinite(tensor).all():
        return f"{name} holds non-finite values"
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    # Values a little above the largest finite number still round down to it; the cast itself decides.
    if not torch.isfinite(torch.tensor(largest, dtype=torch.float64).to(dtype)):
        return f"{name} holds {largest:.6g}, more than {dtype} can store ({torch.finfo(dtype).max:.6g})"
    return None


def check_same_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Raise UserError unless both name the same tensors."""
    expected, found = set(expected), set(found)
    if missing := sorted(expected - found):
        raise UserError(f"{source}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}")
    if unexpected := sorted(found - expected):
        raise UserError(f"{source}: {len(unexpected)} tensors are unexpected, e.g. {', '.join(unexpected[:3])}")
