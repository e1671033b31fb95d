"""Tensors in safetensors or `.bin` files: read where they are used, hashed, made and written piece by piece.

Nothing here holds more than a few pieces in memory, whatever the size of the files. Nothing about models.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from meme_llava import count_cores
from meme_llava.errors import CheckpointError, DiskFullError, UserError, is_disk_full
from meme_llava.storage.files import hash_file, write_whole
from meme_llava.storage.json_files import DAMAGED, read_json
from meme_llava.storage.run_record import (
    MANIFEST,
    RUN_RECORD,
    holds_trained_weights,
    read_run_record,
    read_trained_record,
)
from meme_llava.terminal import format_bytes

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PIECE_BYTES = 16_000_000
HASHING_THREADS = 4
WRITTEN_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # by their names in a header


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


def fingerprint_folder(folder: Path) -> str:
    """The fingerprint of a model folder's weights, whatever files they are divided into: 64 hexadecimal digits.

    It is a sha256 over every tensor's name, shape, dtype and bytes. 15 GB take seconds to hash, so what was found is
    remembered together with the state of the files it was found in.

    Raises:
        UserError: the folder holds no weights, or a file of them is damaged.
    """
    tensors = dict(sorted(open_model_tensors(folder).items()))
    paths = sorted({stored.path for stored in tensors.values()})
    # Files whose contents change get another state, as git takes it; nobody can set the time of a change back. It goes
    # without their names, so that a folder that is renamed when it is whole is found again.
    states = [
        (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for state in (path.stat() for path in paths)
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meme_llava" / "fingerprints"
    remembered = cache / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return remembered.read_text(encoding="ascii")
    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(HASHING_THREADS, count_cores())) as pool:
        for name, digest in zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True):
            whole.update(f"{name} {digest}\n".encode())
    fingerprint = whole.hexdigest()
    with contextlib.suppress(OSError):  # a home that cannot be written costs time alone
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(remembered, fingerprint)
    return fingerprint


def _hash_tensor(stored: StoredTensor) -> str:
    digest = hashlib.sha256(f"{stored.shape} {stored.dtype}\n".encode())
    for piece in stored.make_pieces():
        digest.update(view_bytes(piece))
    return digest.hexdigest()


def check_weights(folder: Path) -> str:
    """The fingerprint of a model folder, which is that of its run record if it has one with a fingerprint.

    Raises:
        CheckpointError: the weights are not those that the folder was written with.
        UserError: the folder holds no weights, or a file of them is damaged.
    """
    fingerprint = fingerprint_folder(folder)
    record = read_run_record(folder) if (folder / RUN_RECORD).is_file() else {}
    if record.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"{folder}: its weights are not those that it was written with (the fingerprint of {RUN_RECORD} differs). "
            f"Copy or make it again; if they were changed on purpose, delete its {RUN_RECORD}"
        )
    return fingerprint


def identify_weights(folder: Path) -> str:
    """64 hexadecimal digits that are others whenever the weights are: of a whole model, or of trained weights and base.

    Raises:
        UserError: the folder holds neither, or damaged ones.
    """
    # The manifest of trained weights lists their hash and that of their run record, which names the base.
    return hash_file(folder / MANIFEST) if holds_trained_weights(folder) else check_weights(folder)


def find_base(adapter: Path, base_model: Path | None) -> Path:
    """The base model that trained weights belong to.

    Args:
        adapter: output or checkpoint of train.py.
        base_model: where the base is now, if it moved since training.

    Raises:
        UserError: `adapter` holds no trained weights, is damaged, or its base is missing or another one.
    """
    record = read_trained_record(adapter)
    folder = base_model or Path(record["base"]["folder"])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the base model of {adapter} is not there; say where it is with --base_model")
    if check_weights(folder) != record["base"]["fingerprint"]:
        raise CheckpointError(
            f"{folder}: is not the base model that {adapter} was trained on (their weights differ); give the right "
            "one with --base_model"
        )
    return folder


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in order, shared with it if it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


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


def check_free_space(folder: Path, needed: int) -> None:
    """Raise DiskFullError unless the disk of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{folder.parent}: needs {format_bytes(needed)}, the disk has {format_bytes(free)} free. Free some, or "
            "choose another --output_dir."
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
