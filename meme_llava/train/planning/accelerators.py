"""The accelerators a run may be planned for or run on: their bf16 peak and their memory. Nothing about models.

Peaks are the datasheets' dense bf16 figures in TFLOP/s (no sparsity, float32 sums), memory is what torch reports as a
device's total, in GiB. A CPU has no such datasheet: its ceiling is measured by multiplying matrices.
"""

import re
import time
from dataclasses import dataclass

import psutil
import torch

from meme_llava.errors import UserError

GIB = 2**30
CPU = "cpu"
MEASURING_SECONDS = 1.0
# Large enough to be limited by arithmetic: 1 TFLOP on a GPU, 2 GFLOP on a CPU.
GPU_MATRIX_SIZE, CPU_MATRIX_SIZE = 8192, 1024


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    Args:
        name: what `--accelerator` takes.
        device_name: regular expression for the whole of `torch.cuda.get_device_name()`.
        peak_tflops: dense bf16 TFLOP/s, None where the device has no bf16; of a CPU the measured fp32 TFLOP/s.
        memory_gib: device memory in GiB, as torch reports it.
    """

    name: str
    device_name: str
    peak_tflops: float | None
    memory_gib: float

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


ACCELERATORS = (
    Accelerator("a800-80gb", r"(NVIDIA )?A800(-SXM4-80GB| 80GB PCIe)", 312.0, 79.1),
    Accelerator("a100-80gb", r"(NVIDIA )?A100(-SXM4-80GB|-SXM-80GB| 80GB PCIe)", 312.0, 79.1),
    Accelerator("a100-40gb", r"(NVIDIA )?A100-(SXM4|SXM|PCIE)-40GB", 312.0, 39.4),
    Accelerator("h100-80gb", r"(NVIDIA )?H100 80GB HBM3", 989.4, 79.1),
    Accelerator("h100-pcie", r"(NVIDIA )?H100 PCIe", 756.0, 79.1),
    Accelerator("h800-80gb", r"(NVIDIA )?H800", 989.4, 79.1),
    Accelerator("h800-pcie", r"(NVIDIA )?H800 PCIe", 756.0, 79.1),
    Accelerator("h200", r"(NVIDIA )?H200", 989.4, 139.7),
    Accelerator("h20", r"(NVIDIA )?H20", 148.0, 95.0),
    Accelerator("l40s", r"(NVIDIA )?L40S", 362.1, 44.3),
    Accelerator("l20", r"(NVIDIA )?L20", 119.5, 44.3),
    Accelerator("a10", r"(NVIDIA )?A10", 125.0, 22.0),
    Accelerator("rtx-4090", r"(NVIDIA )?GeForce RTX 4090", 165.2, 23.5),
    Accelerator("rtx-3090", r"(NVIDIA )?GeForce RTX 3090", 71.0, 23.5),
    Accelerator("v100-32gb", r"(NVIDIA |Tesla )?V100-(SXM2|SXM3|PCIE)-32GB", None, 31.7),
    Accelerator("v100-16gb", r"(NVIDIA |Tesla )?V100-(SXM2|PCIE)-16GB", None, 15.7),
)


def recognise_accelerator(device_name: str) -> Accelerator | None:
    """The accelerator that calls itself `device_name`, as `torch.cuda.get_device_name()` returns it, if it is known."""
    return next(
        (accelerator for accelerator in ACCELERATORS if re.fullmatch(accelerator.device_name, device_name)), None
    )


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
