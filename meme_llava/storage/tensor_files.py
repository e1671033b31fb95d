"""Tensors in safetensors or `.bin` files, read where they are used and piece by piece.

Nothing here holds more than a few pieces in memory, whatever the size of the files. Nothing about models.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from meme_llava.errors import UserError
from meme_llava.storage.json_files import DAMAGED, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PIECE_BYTES = 16_000_000


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    name: str  # under which it is known here
    dtype: torch.dtype
    shape: tuple[int, ...]
    pickled: torch.Tensor | None = None  # of a `.bin` file: mapped
    name_in_file: str | None = None  # where it is another

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> torch.Tensor:
        """The tensor as it stands in the file: each part is read when it is used, and given back with the tensor."""
        if self.pickled is not None:
            return self.pickled
        with _open(self.path) as file:
            return file.get_tensor(self.name_in_file or self.name)

    def load(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy in memory, in `dtype` or the file's own."""
        return self.map().to(dtype or self.dtype, copy=True)

    def make_pieces(self) -> Iterator[torch.Tensor]:
        """Groups of rows of up to 16 MB, in order; a mapping of its own for each keeps only that much in memory."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, PIECE_BYTES * rows // max(1, self.nbytes))
        for start in range(0, rows, step):
            yield torch.atleast_1d(self.map())[start : start + step]


def read_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of the files by name, in the order in which the files hold them; only descriptions are read.

    Raises:
        UserError: a file is missing, short, no tensor file, or two files hold a tensor of the same name.
    """
    tensors = {}
    for path in paths:
        for tensor in (_list_pickled if path.suffix == ".bin" else _list_safetensors)(path):
            if tensor.name in tensors:
                raise UserError(
                    f"{path}: holds tensor {tensor.name}, and so does {tensors[tensor.name].path}; keep only one"
                )
            tensors[tensor.name] = tensor
    return tensors


def open_model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a model folder, in the forms that hubs hold: safetensors or `.bin`, one file or shards.

    Raises:
        UserError: there are none, the index names a missing shard, or a file is damaged.
    """
    for name in (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, PICKLED_INDEX):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there. {DAMAGED}")
        if path.is_file():
            return _open_indexed(path) if path.suffix == ".json" else read_tensors([path])
    raise UserError(
        f"{folder}: has no weights; expected {WEIGHTS}, {WEIGHTS_INDEX}, {PICKLED_WEIGHTS} or {PICKLED_INDEX}"
    )


def _open_indexed(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: is not an index of weights; expected {{name: file}} under weight_map. {DAMAGED}")
    shards = sorted({index.parent / shard for shard in weight_map.values()})
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise UserError(f"{index}: names shard {shard.name}, which is not in the folder; download it again")
    tensors = read_tensors(shards)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise UserError(f"{index.parent / shard}: does not hold {name}, which {index.name} places there. {DAMAGED}")
    return tensors


@contextlib.contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        found = f"{path.stat().st_size:,} bytes; {error}"
        raise UserError(f"{path}: is not a safetensors file, or an incomplete one ({found}). {DAMAGED}") from error


def _list_safetensors(path: Path) -> list[StoredTensor]:
    with _open(path) as file:
        tensors = [(name, file.get_tensor(name)) for name in file.offset_keys()]
    return [StoredTensor(path, name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


def _list_pickled(path: Path) -> list[StoredTensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, tensor in content.items():
            if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{name} is no tensor with a name")
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # pickle, zip and torch raise a dozen kinds for damaged, old and hostile files
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{path}: is not a plain file of tensors as torch.save has written it since PyTorch 1.6 "
            f"({type(error).__name__}: {reason}). {DAMAGED}"
        ) from error
    # Where they are mapped is where they lie in the file.
    in_order = sorted(content.items(), key=lambda item: item[1].data_ptr())
    return [StoredTensor(path, name, tensor.dtype, tuple(tensor.shape), tensor.detach()) for name, tensor in in_order]


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in order, shared with it if it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
