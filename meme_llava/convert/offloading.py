"""Models larger than memory: each module's weights are read when it is called, then dropped.

The modules and their arithmetic are transformers' own; only where their weights live differs.
"""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn

from meme_llava.model.llava import set_parameter
from meme_llava.storage.tensor_reader import TensorReader

# How a comparison says where its models ran.
IN_MEMORY, OFFLOADED = "in memory", "layer by layer from the disk"
CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
# Activations, logits over a large vocabulary, the libraries themselves.
WORKING_BYTES = 2_000_000_000


def measure_available_memory() -> int:
    """Bytes that this process may still take, a container's limit included."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in CGROUP_LIMITS:
        if limit_file.is_file() and usage_file.is_file():
            limit = limit_file.read_text().strip()
            if limit.isdigit():
                # The usage counts cached files, which give way, so this errs on the careful side.
                available = min(available, int(limit) - int(usage_file.read_text()))
    return max(available, 0)


def fits_in_memory(tensors: TensorReader, dtype: torch.dtype) -> bool:
    """Whether all of `tensors` can stand in memory in `dtype`, with room to work."""
    elements = sum(stored.nbytes // stored.dtype.itemsize for stored in tensors.stored.values())
    return elements * dtype.itemsize + WORKING_BYTES < measure_available_memory()


def offload_weights(model: nn.Module, read: Callable[[str], torch.Tensor]) -> nn.Module:
    """Let every module of an empty model read its weights when it is called.

    Args:
        model: parameters on the meta device; those that are real already (an adapter's) stay.
        read: gives a parameter by its name in `model`, in any float dtype.
    """
    for prefix, module in model.named_modules():
        # Attention of torch's own never calls its output projection; it uses the weights itself.
        is_whole = isinstance(module, nn.MultiheadAttention)
        names = [name for name, parameter in module.named_parameters(recurse=is_whole) if parameter.is_meta]
        if names:
            _Offload(module, f"{prefix}." if prefix else "", names, read)
    return model


class _Offload:
    """Fills a module's parameters before it is called and empties them after."""

    def __init__(self, module: nn.Module, prefix: str, names: list[str], read: Callable[[str], torch.Tensor]):
        self._names, self._prefix, self._read = names, prefix, read
        self._empty = {name: module.get_parameter(name) for name in names}
        module.register_forward_pre_hook(self._fill)
        module.register_forward_hook(self._drop, always_call=True)

    def _fill(self, module: nn.Module, arguments: tuple) -> tuple:
        for name in self._names:
            weight = self._read(self._prefix + name)
            expected = self._empty[name]
            if weight.shape != expected.shape:
                raise RuntimeError(f"{self._prefix + name}: {tuple(weight.shape)}, expected {tuple(expected.shape)}")
            set_parameter(module, name, nn.Parameter(weight.to(expected.dtype), requires_grad=False))
        return arguments

    def _drop(self, module: nn.Module, arguments: tuple, output) -> None:
        for name in self._names:
            set_parameter(module, name, self._empty[name])
