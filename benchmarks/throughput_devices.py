"""What differs between the devices of throughput.py: precision, waiting, and how memory is measured."""

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meme_llava.errors import UserError
from meme_llava.model.packed_attention import gpu_multiplies_bf16


@dataclass(frozen=True)
class Platform:
    """A device, and the dtype of frozen weights and matrix products on it; what learns is float32 everywhere."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, name: str) -> "Platform":
        """bf16 on "cuda", float32 on "cpu". Raises UserError if this machine has no such GPU."""
        if name == "cpu":
            return cls(torch.device("cpu"), torch.float32)
        if not gpu_multiplies_bf16():
            raise UserError("--device cuda: this machine has no GPU that computes in bf16; leave the flag out")
        return cls(torch.device("cuda"), torch.bfloat16)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def wait(self) -> None:
        """Return when the device has done all that it was asked to."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Forget what earlier turns took."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def read_peak_memory(self) -> int | None:
        """Bytes of tensors at the peak since the last reset; None where no allocator counts."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else None

    def describe(self) -> str:
        """What computes."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else f"CPU, {torch.get_num_threads()} threads"


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside it until they are freed, where no allocator does.

    The process's own memory would tell less: it holds what the C library and earlier turns keep. Buffers inside a
    kernel are not seen.

    Args:
        known: tensors that are not counted, such as weights.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size
