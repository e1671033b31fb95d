"""Whether a model fits into this process's memory, and how it runs layer by layer from the disk where it does not."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate.hooks import attach_align_device_hook
from torch import nn

from meme_llava.model.llava import VISION_TOWER
from meme_llava.storage.tensor_files import StoredTensor

CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
# How a comparison says where its models ran.
IN_MEMORY, OFFLOADED = "in memory", "layer by layer from the disk"
# Activations, logits over a large vocabulary, the libraries themselves.
WORKING_BYTES = 2_000_000_000


def offload_weights(
    model: nn.Module, read: Callable[[str], torch.Tensor], layers: Iterable[nn.Module] = ()
) -> nn.Module:
    """Let every module of an empty model read its weights when it is called, and drop them after; modules of the kinds
    of `layers` read those of all their parts at once."""

    class Weights:
        def __getitem__(self, name: str) -> torch.Tensor:
            return read(name)

    # Attention of torch's own never calls its output projection, and mixers of state spaces not their convolution; they
    # use the weights themselves.
    whole = {nn.MultiheadAttention.__name__, *(type(layer).__name__ for layer in layers)}
    whole |= {type(one).__name__ for one in model.modules() if any(isinstance(c, nn.Conv1d) for c in one.children())}
    attach_align_device_hook(model, "cpu", offload=True, weights_map=Weights(), preload_module_classes=[*whole])
    return model


def report_layers(model: nn.Module, advance: Callable[[int], None]) -> None:
    """Call `advance(1)` whenever a layer of the language model has run."""
    # Not every language model tells its decoder.
    for name, module in model.named_modules():
        if re.search(r"\blayers\.\d+$", name) and VISION_TOWER not in name:
            module.register_forward_hook(lambda *_: advance(1))


def fits_in_memory(tensors: dict[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Whether all of `tensors` can stand in memory in `dtype`, with room to work."""
    elements = sum(stored.nbytes // stored.dtype.itemsize for stored in tensors.values())
    return elements * dtype.itemsize + WORKING_BYTES < measure_available_memory()


def measure_available_memory() -> int:
    """Bytes that this process may still take, a container's limit included."""
    # The usage counts cached files, which give way, so this errs on the careful side.
    left = [limit - usage for limit, usage in _read_limits()]
    return max(min([psutil.virtual_memory().available, *left]), 0)


def measure_machine_memory() -> int:
    """Bytes that all processes here may take together: the machine's memory, or a container's limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _read_limits())])


def _read_limits() -> Iterator[tuple[int, int]]:
    """Limit and usage, in bytes, of the container in which this process runs, if it runs in one."""
    for limit_file, usage_file in CGROUP_LIMITS:
        if limit_file.is_file() and usage_file.is_file():
            limit = limit_file.read_text().strip()
            if limit.isdigit():
                yield int(limit), int(usage_file.read_text())
