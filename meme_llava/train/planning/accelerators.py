"""The device that a run is planned for. A CPU has no datasheet: its ceiling is measured by multiplying matrices."""

import time

import psutil
import torch

from meme_llava.errors import UserError
from meme_llava.model.flops import ACCELERATORS, CPU, Accelerator, recognise_accelerator

GIB = 2**30
MEASURING_SECONDS = 1.0
# Large enough to be limited by arithmetic: 1 TFLOP on a GPU, 2 GFLOP on a CPU.
GPU_MATRIX_SIZE, CPU_MATRIX_SIZE = 8192, 1024


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of a short name such as a800-80gb, of a device's own name, or "cpu" (this one; takes a second).

    Raises:
        UserError: no accelerator of that name is known.
    """
    if name.lower() == CPU:
        return describe_cpu()
    accelerator = next(
        (accelerator for accelerator in ACCELERATORS if accelerator.name == name.lower()), None
    ) or recognise_accelerator(name)
    if accelerator is None:
        known = ", ".join([*(accelerator.name for accelerator in ACCELERATORS), CPU])
        raise UserError(f"--accelerator {name}: no known accelerator; there are {known}. Take the nearest one.")
    return accelerator


def find_own_device() -> str:
    """The name of the device that a process computes on here, for `find_accelerator`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def describe_cpu() -> Accelerator:
    """This machine's CPU: all of its memory, and its fp32 ceiling as measured now with the threads torch uses."""
    memory = psutil.virtual_memory().total
    return Accelerator(CPU, CPU, measure_ceiling(torch.device(CPU), torch.float32) / 1e12, memory / GIB)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of many large matrix multiplications: what a training step could reach at most.

    The fastest, because whatever else happens on the machine can only slow one down.
    """
    size = CPU_MATRIX_SIZE if device.type == CPU else GPU_MATRIX_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty(size, size, device=device, dtype=dtype)
    fastest, end = float("inf"), time.perf_counter() + MEASURING_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        if device.type != CPU:
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
