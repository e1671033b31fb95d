"""Tensors in safetensors or `.bin` files, read whole, by rows or in pieces.

Nothing stays in memory, whatever the size of the files. Nothing about models.

The safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, little
endian; the header, JSON that maps each name to `dtype`, `shape` and `data_offsets` [begin, end) counted from the end of
the header; then the tensors' bytes, little endian, without gaps.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from meme_llava.errors import UserError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit; a longer one is not a header but chance bytes.
MAX_HEADER_BYTES = 100_000_000
PIECE_BYTES = 16_000_000
DAMAGED = "Delete it and download or make it again."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: contiguous from byte `offset` of `path` on, unless `stride` (in elements) says otherwise."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """The tensors of several files by name, read whole or in pieces; nothing stays in memory.

    Raises:
        UserError: a file is missing, short, no tensor file, or two files hold a tensor of the same name.
    """

    def __init__(self, paths: Iterable[Path]):
        self.stored: dict[str, StoredTensor] = {}
        for path in paths:
            list_tensors = _list_pickled if path.suffix == ".bin" else _list_safetensors
            for name, tensor in list_tensors(path).items():
                if name in self.stored:
                    raise UserError(f"{path}: holds tensor {name}, and so does {self.stored[name].path}; keep only one")
                self.stored[name] = tensor
        self._descriptors: dict[Path, int] = {}
        self._buffers: list[torch.Tensor] = []

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *error) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.stored))

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def list_in_file_order(self) -> list[str]:
        """All names as the files hold them, so that reading in this order never goes back."""
        return sorted(self.stored, key=lambda name: (self.stored[name].path, self.stored[name].offset, name))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the shape and dtype of the file."""
        stored = self.stored[name]
        if stored.stride is not None:
            span = 1 + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
            return self._read_span(stored, 0, span).as_strided(stored.shape, stored.stride).contiguous()
        return self._read_span(stored, 0, math.prod(stored.shape)).reshape(stored.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) along the first dimension, of shape (stop - start, ...)."""
        stored = self.stored[name]
        if stored.stride is not None:
            return self.read(name)[start:stop]
        row = math.prod(stored.shape[1:])
        return self._read_span(stored, start * row, (stop - start) * row).reshape(stop - start, *stored.shape[1:])

    def read_pieces(self, name: str, reuse: bool = False) -> Iterator[torch.Tensor]:
        """The tensor as flat pieces of at most 16 MB, in order.

        Args:
            reuse: pieces take turns in two buffers; asking for a piece overwrites the last but one. Fresh memory for
                every piece takes longer to get than to fill.
        """
        stored = self.stored[name]
        if stored.stride is not None:
            yield self.read(name).flatten()
            return
        count, step = math.prod(stored.shape), PIECE_BYTES // stored.dtype.itemsize
        for start in range(0, count, step):
            yield self._read_span(stored, start, min(step, count - start), self._next_buffer() if reuse else None)

    def read_as(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor converted to `dtype`, piece by piece, so that it never stands in memory twice."""
        converted = torch.empty(self.stored[name].shape, dtype=dtype)
        flat, start = converted.view(-1), 0
        for piece in self.read_pieces(name, reuse=True):
            flat[start : start + len(piece)] = piece
            start += len(piece)
        return converted

    def _next_buffer(self) -> torch.Tensor:
        if not self._buffers:
            self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(2)]
        self._buffers.reverse()
        return self._buffers[0]

    def _read_span(
        self, stored: StoredTensor, start: int, count: int, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        if buffer is None:
            tensor = torch.empty(count, dtype=stored.dtype)
        else:
            tensor = buffer[: count * stored.dtype.itemsize].view(stored.dtype)
        buffer = view_bytes(tensor)
        if stored.path not in self._descriptors:
            descriptor = self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        position = stored.offset + start * stored.dtype.itemsize
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptors[stored.path], [buffer[done:]], position + done)
            except OSError as error:  # said here, or the file that is being written would get the blame
                raise UserError(f"{stored.path}: cannot be read ({error.strerror})") from error
            if not got:
                raise UserError(
                    f"{stored.path}: ended at byte {position + done} while it was read; is it being written?"
                )
            done += got
        return tensor


def open_model_tensors(folder: Path) -> TensorReader:
    """The weights of a model folder, in the forms that hubs hold: safetensors or `.bin`, one file or shards.

    Raises:
        UserError: there are none, the index names a missing shard, or a file is damaged.
    """
    for name in (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, PICKLED_INDEX):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there. {DAMAGED}")
        if path.is_file():
            return _open_indexed(path) if path.suffix == ".json" else TensorReader([path])
    raise UserError(
        f"{folder}: has no weights; expected {WEIGHTS}, {WEIGHTS_INDEX}, {PICKLED_WEIGHTS} or {PICKLED_INDEX}"
    )


def _open_indexed(index: Path) -> TensorReader:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: is not an index of weights ({type(error).__name__}: {error}). {DAMAGED}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or len(os.fsencode(shard)) > 255:
            raise UserError(f"{index}: names shard {repr(shard)[:80]}, expected a file name without folders")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index}: names shard {shard}, which is not in the folder; download it again")
    reader = TensorReader(index.parent / shard for shard in shards)
    for name, shard in weight_map.items():
        if name not in reader or reader.stored[name].path.name != shard:
            raise UserError(f"{index.parent / shard}: does not hold {name}, which {index.name} places there. {DAMAGED}")
    return reader


def _list_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: is not a safetensors file or an interrupted one ({size:,} bytes). {DAMAGED}")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            numbers = [*entry["shape"], *entry["data_offsets"]]
            # type(), as True is an int to isinstance.
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise UserError(
                    f"{path}: {name} has shape {entry['shape']} and bytes {entry['data_offsets']}, expected whole "
                    f"numbers. {DAMAGED}"
                )
        spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
        tensors = {
            name: StoredTensor(
                path, 8 + length + begin, _find_dtype(path, name, entries[name]), tuple(entries[name]["shape"])
            )
            for begin, _, name in spans
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: its safetensors header is damaged ({type(error).__name__}: {error}). {DAMAGED}"
        ) from error
    end = 0
    for begin, stop, name in spans:
        if begin != end or stop - begin != tensors[name].nbytes:
            raise UserError(
                f"{path}: {name} takes bytes {begin:,} to {stop:,}, expected {tensors[name].nbytes:,} bytes from "
                f"{end:,} on. {DAMAGED}"
            )
        end = stop
    if 8 + length + end != size:
        raise UserError(f"{path}: is {size:,} bytes long, its header promises {8 + length + end:,}. {DAMAGED}")
    return tensors


def _find_dtype(path: Path, name: str, entry: dict) -> torch.dtype:
    if entry["dtype"] not in DTYPE_NAMES:
        raise UserError(
            f"{path}: {name} has dtype {entry['dtype']}, which cannot be read; there are {', '.join(DTYPE_NAMES)}"
        )
    return DTYPE_NAMES[entry["dtype"]]


def _list_pickled(path: Path) -> dict[str, StoredTensor]:
    # Fake tensors know where their bytes lie in the file, so none is read or mapped until it is its turn.
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
        offsets = {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in content.items()}
        for name, offset in offsets.items():
            if not isinstance(name, str) or offset is None or content[name].is_neg() or content[name].is_conj():
                raise ValueError(f"{name} has no bytes of its own")
    except Exception as error:  # pickle, zip and torch raise a dozen kinds for damaged, old and hostile files
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{path}: is not a plain file of tensors as torch.save has written it since PyTorch 1.6 "
            f"({type(error).__name__}: {reason}). {DAMAGED}"
        ) from error
    tensors = {}
    for name, tensor in content.items():
        offset = offsets[name] + tensor.storage_offset() * tensor.dtype.itemsize
        stride = None if tensor.is_contiguous() else tuple(tensor.stride())
        tensors[name] = StoredTensor(path, offset, tensor.dtype, tuple(tensor.shape), stride)
    return tensors


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
