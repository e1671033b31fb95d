"""Tensors made piece by piece on their way into safetensors files, so that only a few pieces are in memory."""

import json
import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from meme_llava.errors import DiskFullError, UserError, is_disk_full
from meme_llava.storage.tensor_files import WEIGHTS_INDEX, StoredTensor, view_bytes
from meme_llava.terminal import format_bytes

WRITTEN_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # by their names in a header


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written; a `StoredTensor` can stand in its place. The bytes of its pieces make it up in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make_pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Rounding:
    """Rounds values once to the dtype of a file, and counts those that it cannot hold."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        # Tensor name: values that are not finite in `dtype`, and those that it makes 0.
        self.overflow, self.underflow = Counter(), Counter()
        self._examples = {}

    def apply(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` in the file's dtype."""
        if values.dtype == self.dtype:
            # Nothing is rounded, and a sum that is finite has finite terms.
            if not values.sum().isfinite():
                self._count_overflow(name, values, values)
            return values
        values = values.float()
        rounded = values.to(self.dtype)
        # The extremes alone tell, and NaN is passed on; a mask over all values takes many times as long.
        if values.numel() and not torch.stack(torch.aminmax(values)).to(self.dtype).isfinite().all():
            self._count_overflow(name, values, rounded)
        # Most tensors hold no 0 at all, and then nothing vanished.
        kept = int(rounded.count_nonzero())
        if kept < rounded.numel() and (vanished := int(values.count_nonzero()) - kept):
            self.underflow[name] += vanished
        return rounded

    def _count_overflow(self, name: str, values: torch.Tensor, rounded: torch.Tensor) -> None:
        unstorable = ~rounded.isfinite()
        if count := int(unstorable.sum()):
            self.overflow[name] += count
            self._examples.setdefault(name, values[unstorable][0].item())

    def plan(self, name: str, tensor: PlannedTensor | StoredTensor) -> PlannedTensor:
        """A tensor whose pieces are rounded on their way into the file."""
        make = tensor.make_pieces
        return PlannedTensor(self.dtype, tensor.shape, lambda: (self.apply(name, piece) for piece in make()))

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


def count_bytes(tensors: dict[str, PlannedTensor | StoredTensor]) -> int:
    """What the tensors take on disk, headers aside."""
    return sum(tensor.nbytes for tensor in tensors.values())


def check_free_space(folder: Path, needed: int, output_dir: Path | None = None) -> None:
    """Raise DiskFullError unless the disk of `folder` has room for `needed` bytes.

    Args:
        output_dir: what the error names in place of the folder's parent.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{output_dir or folder.parent}: needs {format_bytes(needed)}, the disk has {format_bytes(free)} free. "
            "Free some, or choose another --output_dir."
        )


def write_tensors(
    planned: dict[str, PlannedTensor | StoredTensor],
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
    check_free_space(folder, count_bytes(planned))
    outlines = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in planned.items()}
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=max_shard_size)
    for file_name, names in split.filename_to_tensors.items():
        try:
            write_file(folder / file_name, {name: planned[name] for name in names}, advance)
        except OSError as error:
            kind = DiskFullError if is_disk_full(error) else UserError
            raise kind(f"{folder / file_name}: cannot be written ({error.strerror or error})") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(
    path: Path,
    planned: dict[str, PlannedTensor | StoredTensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file (https://github.com/huggingface/safetensors#format) and bring it to the disk.

    Raises:
        OSError: it cannot be written.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # Wide dtypes first, so that every tensor starts at a multiple of its element's size, as readers that map need.
    planned = dict(sorted(planned.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in planned.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": WRITTEN_DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # One thread writes a piece while this one reads or computes the next.
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as writer:
        pending = writer.submit(_write_bytes, file, memoryview(struct.pack("<Q", len(text)) + text))
        for tensor in planned.values():
            written = 0
            for piece in tensor.make_pieces():
                pending.result()
                pending = writer.submit(_write_bytes, file, view_bytes(piece))
                written += piece.nbytes
                advance(piece.nbytes)
            if written != tensor.nbytes:
                raise RuntimeError(f"{path}: {written} bytes were made of a tensor of {tensor.nbytes}")
        pending.result()
        os.fsync(file.fileno())


def _write_bytes(file, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
