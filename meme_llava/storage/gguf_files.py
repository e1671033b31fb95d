"""GGUF files, which llama.cpp reads: written tensor by tensor, and compared with what they were made of.

Nothing about models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from meme_llava.errors import UserError
from meme_llava.storage.tensor_files import StoredTensor, view_bytes
from meme_llava.storage.tensor_writer import WRITTEN_DTYPES

ARCHITECTURE = "general.architecture"


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError("--export gguf needs the package gguf: pip install -r configs/requirements/gguf.txt") from error
    return gguf


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds: settings by key, and tensors by name, each with the dtype in which it stands there."""

    path: Path
    settings: dict[str, object]
    tensors: dict[str, tuple[StoredTensor, torch.dtype]]

    @property
    def nbytes(self) -> int:
        return sum(_count_bytes(*tensor) for tensor in self.tensors.values())

    def write(self, advance: Callable[[int], None]) -> None:
        gguf = import_gguf()
        writer = gguf.GGUFWriter(self.path, self.settings[ARCHITECTURE])
        for key, value in self.settings.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif key != ARCHITECTURE:  # which the writer has added itself
                # llama.cpp refuses a count that could be negative.
                kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
                writer.add_key_value(key, value, kind)
        for name, (stored, dtype) in self.tensors.items():
            kind = gguf.GGMLQuantizationType[WRITTEN_DTYPES[dtype]]
            # numpy has no bfloat16; `kind` counts.
            writer.add_tensor_info(name, stored.shape, np.dtype("float16"), _count_bytes(stored, dtype), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored, dtype in self.tensors.values():
            values = np.asarray(view_bytes(stored.map().to(dtype)))
            writer.write_tensor_data(values)
            advance(values.nbytes)
        writer.close()

    def list_differences(self) -> list[str]:
        """Keys and names of what the file on the disk lacks, has in addition, or has with another bit."""
        reader = import_gguf().GGUFReader(self.path)
        settings = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        wrong = [*(settings.keys() ^ self.settings.keys()), *(tensors.keys() ^ self.tensors.keys())]
        wrong += [key for key in settings.keys() & self.settings.keys() if settings[key] != _round(self.settings[key])]
        for name in tensors.keys() & self.tensors.keys():
            found, (stored, dtype) = tensors[name], self.tensors[name]
            kind, shape = WRITTEN_DTYPES[dtype], stored.shape[::-1]  # GGUF names the innermost dimension first
            if (found.tensor_type.name, tuple(found.shape)) != (kind, shape) or not _holds(found.data, stored, dtype):
                wrong.append(name)
        return sorted(wrong)


def _count_bytes(stored: StoredTensor, dtype: torch.dtype) -> int:
    return math.prod(stored.shape) * dtype.itemsize


def _round(value: object) -> object:
    """As a file holds it: numbers with a point are float32."""
    if isinstance(value, list):
        return [_round(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _holds(found: np.ndarray, stored: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether bytes read from a file are those of a tensor in `dtype`."""
    found, start = found.reshape(-1).view(np.uint8), 0
    for piece in stored.make_pieces():
        expected = np.asarray(view_bytes(piece.to(dtype)))
        if not np.array_equal(found[start : start + len(expected)], expected):
            return False
        start += len(expected)
    return start == len(found)
