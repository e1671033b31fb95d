"""Tensors made piece by piece and written to safetensors files: disk space, shards, index.

Nothing here holds more than a few pieces at a time. Nothing about models. The format stands in `tensor_reader`.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from meme_llava.errors import DiskFullError, UserError, is_disk_full
from meme_llava.storage.tensor_reader import DTYPE_NAMES, WEIGHTS_INDEX, view_bytes

_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `make_pieces` gives contiguous tensors of `dtype` whose bytes make it up in order.

    A piece must keep its bytes until the next but one is asked for.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make_pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def count_bytes(planned: dict[str, PlannedTensor]) -> int:
    """What the tensors take on disk, headers aside."""
    return sum(tensor.nbytes for tensor in planned.values())


def write_tensors(
    planned: dict[str, PlannedTensor],
    folder: Path,
    max_shard_size: str = "5GB",
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_size` with their index, and bring them to the disk.

    Args:
        max_shard_size: such as 5GB or 500MB, in powers of 1000; a larger tensor gets a shard of its own.
        advance: called with the number of bytes after each piece.

    Raises:
        UserError: the disk has too little room (before the first byte), or a file cannot be written.
    """
    outlines = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in planned.items()}
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=max_shard_size)
    headers = {
        file_name: _make_header({name: planned[name] for name in names})
        for file_name, names in split.filename_to_tensors.items()
    }
    check_free_space(folder, count_bytes(planned) + sum(map(len, headers.values())))
    for file_name, names in split.filename_to_tensors.items():
        path = folder / file_name
        try:
            _write_file(path, headers[file_name], [planned[name] for name in _order_in_file(names, planned)], advance)
        except OSError as error:
            kind = DiskFullError if is_disk_full(error) else UserError
            raise kind(f"{path}: cannot be written ({error.strerror or error})") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_free_space(folder: Path, needed: int) -> None:
    """Raise DiskFullError unless the disk of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{folder.parent}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free. Free some, or "
            "choose another --output_dir."
        )


def write_file(path: Path, planned: dict[str, PlannedTensor]) -> None:
    """Write one safetensors file of float32 tensors, made in the given order, and bring it to the disk.

    Raises:
        OSError: it cannot be written.
    """
    _write_file(path, _make_header(planned), list(planned.values()), lambda count: None)


def _order_in_file(names: Iterable[str], planned: dict[str, PlannedTensor]) -> list[str]:
    # Wide dtypes first, so that every tensor starts at a multiple of its element's size, as readers that map need.
    return sorted(names, key=lambda name: -planned[name].dtype.itemsize)


def _make_header(planned: dict[str, PlannedTensor]) -> bytes:
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name in _order_in_file(planned, planned):
        tensor = planned[name]
        end = begin + tensor.nbytes
        header[name] = {"dtype": _NAMES_OF_DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_file(path: Path, header: bytes, planned: list[PlannedTensor], advance: Callable[[int], None]) -> None:
    # One thread writes a piece while this one reads or computes the next.
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as writer:
        pending = writer.submit(_write_bytes, file, memoryview(header))
        for tensor in planned:
            written = 0
            for piece in tensor.make_pieces():
                pending = _queue(writer, pending, file, piece)
                written += piece.nbytes
                advance(piece.nbytes)
            if written != tensor.nbytes:
                raise RuntimeError(f"{path}: {written} bytes were made of a tensor of {tensor.nbytes}")
        pending.result()
        os.fsync(file.fileno())


def _queue(writer: ThreadPoolExecutor, pending: Future, file, piece: torch.Tensor) -> Future:
    pending.result()
    return writer.submit(_write_bytes, file, view_bytes(piece))


def _write_bytes(file, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
