"""The known accelerators: what each computes per second, and its memory. Without torch.

Peaks are the datasheets' dense bf16 figures in TFLOP/s (no sparsity, float32 sums), memory is what torch reports as a
device's total, in GiB.
"""

import re
from dataclasses import dataclass

from meme_llava.errors import UserError

CPU = "cpu"


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Args:
        name: what `--accelerator` takes.
        device_name: regular expression for the whole of `torch.cuda.get_device_name()`.
        peak_tflops: dense bf16 TFLOP/s, None where the device has no bf16; of a CPU the measured fp32 TFLOP/s.
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
    Accelerator("a800-40gb", r"(NVIDIA )?A800(-SXM4-40GB| 40GB Active|-PCIE-40GB)", 312.0, 39.4),
    Accelerator("a100-80gb", r"(NVIDIA )?A100(-SXM4-80GB|-SXM-80GB| 80GB PCIe)", 312.0, 79.1),
    Accelerator("a100-40gb", r"(NVIDIA )?A100-(SXM4|SXM|PCIE)-40GB", 312.0, 39.4),
    Accelerator("h100-80gb", r"(NVIDIA )?H100 80GB HBM3", 989.4, 79.1),
    Accelerator("h100-pcie", r"(NVIDIA )?H100 PCIe", 756.0, 79.1),
    Accelerator("h100-nvl", r"(NVIDIA )?H100 NVL", 835.5, 93.0),
    Accelerator("h800-80gb", r"(NVIDIA )?H800", 989.4, 79.1),
    Accelerator("h800-pcie", r"(NVIDIA )?H800 PCIe", 756.0, 79.1),
    Accelerator("h200", r"(NVIDIA )?H200", 989.4, 139.7),
    Accelerator("h20", r"(NVIDIA )?H20", 148.0, 95.0),
    Accelerator("l40s", r"(NVIDIA )?L40S", 362.1, 44.3),
    Accelerator("l20", r"(NVIDIA )?L20", 119.5, 44.3),
    Accelerator("a10", r"(NVIDIA )?A10", 125.0, 22.0),
    Accelerator("rtx-5090", r"(NVIDIA )?GeForce RTX 5090", 209.5, 31.3),
    Accelerator("rtx-4090", r"(NVIDIA )?GeForce RTX 4090", 165.2, 23.5),
    Accelerator("rtx-4090-d", r"(NVIDIA )?GeForce RTX 4090 D", 147.1, 23.5),
    Accelerator("rtx-3090", r"(NVIDIA )?GeForce RTX 3090", 71.0, 23.5),
    Accelerator("v100-32gb", r"(NVIDIA |Tesla )?V100-(SXM2|SXM3|PCIE)-32GB", None, 31.7),
    Accelerator("v100-16gb", r"(NVIDIA |Tesla )?V100-(SXM2|PCIE)-16GB", None, 15.7),
)


def name_accelerator(name: str) -> Accelerator:
    """The accelerator of a short name such as a800-80gb, or of a device's own. Raises UserError where there is none."""
    known = {accelerator.name.replace("-", ""): accelerator for accelerator in ACCELERATORS}
    accelerator = known.get(name.lower().replace("-", "")) or recognise_accelerator(name)
    if accelerator is None:
        names = ", ".join([*(one.name for one in ACCELERATORS), CPU])
        raise UserError(f"--accelerator {name}: no known accelerator; there are {names}. Take the nearest one.")
    return accelerator


def recognise_accelerator(device_name: str) -> Accelerator | None:
    """The accelerator that calls itself `device_name`, as `torch.cuda.get_device_name()` returns it, if it is known."""
    return next((one for one in ACCELERATORS if re.fullmatch(one.device_name, device_name)), None)
