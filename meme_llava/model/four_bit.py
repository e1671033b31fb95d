"""Frozen linear layers in four bits, as QLoRA keeps them (https://arxiv.org/abs/2305.14314).

NF4 with double quantisation: each value is one of sixteen, times a scale that 64 of them share; 256 scales share one of
their own and take a byte each. bitsandbytes quantises and multiplies; that package is optional.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from meme_llava.errors import UserError, first_line
from meme_llava.model.packed_attention import find_optional

BITSANDBYTES, ABSENT = ("bitsandbytes", "nn"), "it is not installed"
OPTIONS = {"compress_statistics": True, "quant_type": "nf4"}
BLOCK, SCALES_BLOCK = 64, 256  # values of a scale, and scales of a scale of theirs
# Of a matrix besides, in float32: its sixteen values, the 256 values of scales, and their mean.
TABLE_BYTES = 4 * (16 + 256 + 1)


def find_problem(device: torch.device) -> str:
    """What keeps bitsandbytes from quantising on this device; empty where nothing does."""
    library, problem = find_optional(*BITSANDBYTES)
    if library is None:
        return problem or ABSENT
    try:
        round_to_four_bit(torch.ones(BLOCK, BLOCK, device=device))
    except Exception as error:  # a library of another CUDA raises what it likes, at its first call
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def check_four_bit(device: torch.device) -> None:
    """Raise UserError unless bitsandbytes is installed and quantises on this device."""
    problem = find_problem(device)
    if problem == ABSENT:
        raise UserError(
            "--load_in_4bit needs the package bitsandbytes: pip install -r configs/requirements/four_bit.txt"
        )
    if problem:
        raise UserError(
            f"--load_in_4bit: bitsandbytes is installed and cannot be used on {device.type} here ({problem}); install "
            "one for this torch and CUDA, or leave --load_in_4bit out"
        )


def use_four_bit(model: nn.Module, linears: Mapping[str, nn.Linear], dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in the places of these linear layers of an empty model, by name. They are quantised when
    they get their weights, and compute in `dtype`."""
    library, _ = find_optional(*BITSANDBYTES)
    for name, linear in linears.items():
        shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        four_bit = library.Linear4bit(*shape, has_bias, compute_dtype=dtype, device="meta", **OPTIONS).to(dtype)
        # In an evaluation it would pack weights for a CPU with AVX512_BF16 in a form that has no gradient after it.
        four_bit.support_avx512bf16_for_cpu = False
        model.set_submodule(name, four_bit.requires_grad_(False))
    model.is_loaded_in_4bit = True  # by which peft knows them


def round_to_four_bit(weight: torch.Tensor) -> torch.Tensor:
    """What a weight (out, in) is after it was quantised, in its own dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, **OPTIONS))


def read_weight(linear: nn.Linear) -> torch.Tensor:
    """The weight (out, in) that a linear layer multiplies by, whether in four bits or not."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, state)


def count_four_bit_bytes(sizes: Iterable[int]) -> int:
    """What matrices of so many elements take in four bits."""
    total = 0
    for size in sizes:
        scales = math.ceil(size / BLOCK)
        total += math.ceil(size / 2) + scales + 4 * math.ceil(scales / SCALES_BLOCK) + TABLE_BYTES
    return total
