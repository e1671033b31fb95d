"""What the devices of this machine can multiply."""

import re
from pathlib import Path

import torch


def gpu_multiplies_bf16() -> bool:
    """Whether this machine's GPU has bf16 of its own.

    torch also counts those that only emulate it, from before compute capability 8.0, which are slower than in float32
    and lack the attention kernels.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 (Intel's AMX, or AVX-512's), as Linux tells it."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags.group(1).split())
