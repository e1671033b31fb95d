"""Which attention kernel a device can run, chosen before any model is loaded."""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache

import torch

from meme_llava.errors import UserError

SDPA = "packed_sdpa"
MATMUL = "packed_matmul"
VARLEN = "packed_varlen"
FLASH_ATTENTION_2 = "packed_flash_attention_2"
NAMES = {"sdpa": SDPA, "matmul": MATMUL, "varlen": VARLEN, "flash_attention_2": FLASH_ATTENTION_2}


def choose_attention(setting: str, device: torch.device, uses_bf16: bool) -> str:
    """The attention that --attention stands for on this device.

    auto: flash-attn where it is installed, else torch's own kernel for varying lengths; both compute in bf16 on a GPU.
    In bf16 on a CPU it is plain matrix products, whose backward pass was measured to be three times as fast there as
    that of scaled_dot_product_attention; everywhere else it is the latter. Both go segment by segment.

    Raises:
        UserError: the one asked for cannot run here.
    """
    on_gpu = device.type == "cuda" and uses_bf16
    possible = {
        "flash_attention_2": on_gpu and importlib.util.find_spec("flash_attn") is not None,
        "varlen": on_gpu and find_varlen_attention() is not None,
        "sdpa": True,
        "matmul": True,
    }
    if setting == "auto":
        if device.type == "cpu" and uses_bf16:
            return MATMUL
        return NAMES[next(name for name, can_run in possible.items() if can_run)]
    if not possible[setting]:
        needed = "the package flash-attn" if setting == "flash_attention_2" else "torch 2.11 or newer"
        usable = ", ".join(name for name, can_run in possible.items() if can_run)
        raise UserError(f"--attention {setting} needs a GPU, bf16 and {needed}; what can run here: {usable}")
    return NAMES[setting]


@cache
def find_varlen_attention() -> tuple[Callable, set[str]] | None:
    """torch's attention for sequences of varying length and its options, where it has the ones needed here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = set(inspect.signature(varlen_attn).parameters)
    return (varlen_attn, options) if {"scale", "window_size"} <= options else None
