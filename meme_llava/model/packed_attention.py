"""Attention kernels for packed rows: each record attends to its own path and to nothing else; which one a device runs.

A packed row needs no mask over all its positions. Each segment attends, causally, to its path, whose last positions are
the segment itself; that is what kernels for sequences of varying length compute when they align queries and keys at
their ends. A path is its record without gaps, so a sliding window reaches as far back on it as in the record alone.
Neither models nor transformers are loaded here: the choice is made before.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, wraps
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from meme_llava.errors import UserError

# What --attention calls them. transformers has its own under some of these names, so ours get a prefix there.
SDPA, MATMUL, VARLEN, FLASH_ATTENTION_2 = "sdpa", "matmul", "varlen", "flash_attention_2"
PACKED = "packed_"
ADVICE = "take a language model of plain causal attention, such as Qwen2, Qwen3, Llama or Mistral"
# What models hand their attention beside what ours computes: caps and biases of scores, sinks, a choice of keys.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


def choose_attention(setting: str, device: torch.device, uses_bf16: bool) -> str:
    """The attention that --attention stands for on this device.

    auto: flash-attn where it is installed, else torch's own kernel for varying lengths; both compute in bf16 on a GPU.
    In bf16 on a CPU it is plain matrix products, whose backward pass was measured to be three times as fast there as
    that of scaled_dot_product_attention; everywhere else it is the latter. Both go segment by segment.
    Raises UserError where the one asked for cannot run here.
    """
    on_gpu = device.type == "cuda" and uses_bf16
    possible = {
        FLASH_ATTENTION_2: on_gpu and find_flash_attention()[0] is not None,
        VARLEN: on_gpu,
        SDPA: True,
    }
    if setting == "auto":
        on_cpu_in_bf16 = device.type == "cpu" and uses_bf16
        return MATMUL if on_cpu_in_bf16 else next(name for name, can_run in possible.items() if can_run)
    if not possible[setting]:
        needed = " and the package flash-attn" if setting == FLASH_ATTENTION_2 else ""
        if on_gpu and (why := find_flash_attention()[1]):
            needed += f", which cannot be loaded here ({why})"
        usable = ", ".join(name for name, can_run in possible.items() if can_run)
        raise UserError(f"--attention {setting} needs a GPU in bf16{needed}; what can run here: {usable}")
    return setting


@cache
def find_optional(module: str, name: str) -> tuple[Any, str]:
    """What a package that need not be there calls `name`, None without it; and what is wrong with one that is installed
    but cannot be loaded: most often it was made for another torch."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # whatever a library of another ABI raises
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        return None, "" if is_absent else f"{type(error).__name__}: {error}".splitlines()[0][:200]


def find_flash_attention() -> tuple[Callable | None, str]:
    """flash-attn's attention for sequences of varying length, as `find_optional` finds it."""
    return find_optional("flash_attn", "flash_attn_varlen_func")


@cache
def find_varlen_attention() -> tuple[Callable, bool]:
    """torch's attention for sequences of varying length, and whether it takes several query heads to a key head."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def gpu_multiplies_bf16() -> bool:
    """Whether this machine's GPU has bf16 of its own. torch also counts those that only emulate it, from before compute
    capability 8.0, which are slower than in float32 and lack the attention kernels."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 (Intel's AMX, or AVX-512's), as Linux tells it."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags.group(1).split())


@dataclass(frozen=True)
class _Segment:
    tree: int  # which tree of the row it belongs to
    length: int
    keys: int  # positions of its path
    path: torch.Tensor | None  # int64 (keys,), positions within the tree; None for a tree's first segment: itself


@dataclass(frozen=True, eq=False)
class Packing:
    """Which positions of a packed row attend to which, as `PackingCollator` returns it.

    Args:
        cu_seqlens_q: int32 (segments + 1,).
        kv_index: int64 (keys,).
        cu_seqlens_k: int32 (segments + 1,).
    """

    cu_seqlens_q: torch.Tensor
    kv_index: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    _masks: dict[int | None, list[torch.Tensor | None]] = field(default_factory=dict, init=False, repr=False)

    @property
    def kernel_bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where queries and keys of each segment begin, and how many it has at most, as kernels take them."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k

    @cached_property
    def segments(self) -> list[_Segment]:
        """The segments one by one, for attention without a kernel for varying lengths. Reads the tensors back once."""
        segments, tree, tree_start = [], -1, 0
        bounds = zip(pairwise(self.cu_seqlens_q.tolist()), pairwise(self.cu_seqlens_k.tolist()), strict=True)
        for (start, end), (path_start, path_end) in bounds:
            length, keys = end - start, path_end - path_start
            if length == keys:  # a tree's first: its path is the segment itself
                tree, tree_start = tree + 1, start
                segments.append(_Segment(tree, length, keys, None))
                continue
            segments.append(_Segment(tree, length, keys, self.kv_index[path_start:path_end] - tree_start))
        return segments

    def list_masks(self, window: int | None) -> list[torch.Tensor | None]:
        """What every segment sees of its path, as `_make_mask` gives it; None where no more than causality hides any.
        Layers share them."""
        if window not in self._masks:
            self._masks[window] = [
                None
                if segment.path is None and (window is None or segment.keys <= window)
                else _make_mask(segment.length, segment.keys, window, self.kv_index.device)
                for segment in self.segments
            ]
        return self._masks[window]

    @cached_property
    def tree_lengths(self) -> list[int]:
        """Positions of each tree: a record and all that share its beginning."""
        trees = groupby(self.segments, key=lambda segment: segment.tree)
        return [sum(segment.length for segment in tree) for _, tree in trees]


def _make_mask(length: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool (length, keys): the last `length` positions of a path see themselves and what stands before them, with a
    window that many positions at most, themselves counted."""
    mask = torch.ones((length, keys), dtype=torch.bool, device=device).tril(keys - length)
    return mask if window is None else mask.triu(keys - length - window + 1)


@lru_cache(maxsize=64)
def _make_causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """bool (length, length): a position sees itself and what stands before it."""
    return _make_mask(length, length, None, device)


def _as_transformers_calls_it(attend: Callable) -> Callable:
    """`attend` of a packed row with the interface of transformers' attention. Raises UserError where a model asks for
    more than causal attention in a window, or does not hand on how its row is packed.

    Args of what is returned, beside those of `attend`:
        sliding_window: how many positions each one sees at most, itself counted; None for all.
    """

    @wraps(attend)
    def call(
        module, query, key, value, attention_mask, scaling, dropout=0.0, *, packing=None, sliding_window=None, **others
    ):
        lacks = [name for name in UNSUPPORTED if others.get(name) is not None]
        lacks += ["a mask of its own"] * (attention_mask is not None)
        if packing is None or lacks:
            what = f"asks for {', '.join(lacks)}" if lacks else "is not told how its row is packed"
            raise UserError(
                f"the language model's {type(module).__name__} {what}, so its records cannot share a row; {ADVICE}"
            )
        window = sliding_window if sliding_window is not None and sliding_window < packing.max_seqlen_k else None
        return attend(query, key, value, packing, window, scaling, dropout), None

    return call


@_as_transformers_calls_it
def attend_with_sdpa(query, key, value, packing: Packing, window: int | None, scaling: float, dropout: float):
    """Attention over a packed row, segment by segment.

    Args:
        query: (1, heads, positions, head_dim).
        key, value: (1, key_value_heads, positions, head_dim).

    Returns:
        (1, positions, heads, head_dim).
    """

    def attend(own_query, own_key, own_value, mask):
        return functional.scaled_dot_product_attention(
            own_query, own_key, own_value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )

    return _attend_by_segment(query, key, value, packing, window, attend)


@_as_transformers_calls_it
def attend_with_matmul(query, key, value, packing: Packing, window: int | None, scaling: float, dropout: float):
    """Like `attend_with_sdpa`, in plain matrix products."""

    def attend(own_query, own_key, own_value, mask):
        scores = own_query @ own_key.transpose(2, 3) * scaling  # (1, heads, length, keys)
        if mask is None:
            mask = _make_causal_mask(scores.shape[-1], scores.device)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return functional.dropout(weights, dropout) @ own_value

    return _attend_by_segment(query, key, value, packing, window, attend)


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, once for each query head that shares them; heads are the second dimension."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _attend_by_segment(query, key, value, packing: Packing, window: int | None, attend: Callable):
    """Call `attend` for every segment with its queries, the keys and values of its path, and its mask, if any."""
    key, value = _repeat_heads(query, key, value)  # (1, heads, positions, head_dim)
    # Splitting costs one concatenation in the backward pass; slicing would fill a whole row with zeros per segment.
    queries = query.split([segment.length for segment in packing.segments], dim=2)
    keys = key.split(packing.tree_lengths, dim=2)
    values = value.split(packing.tree_lengths, dim=2)
    outputs = []
    for segment, own_query, mask in zip(packing.segments, queries, packing.list_masks(window), strict=True):
        own_key, own_value = keys[segment.tree], values[segment.tree]
        if segment.path is None:
            own_key, own_value = own_key[:, :, : segment.length], own_value[:, :, : segment.length]
        else:
            own_key, own_value = own_key.index_select(2, segment.path), own_value.index_select(2, segment.path)
        # (1, length, heads, head_dim); models go on with the positions in order, so they are joined that way.
        outputs.append(attend(own_query, own_key, own_value, mask).transpose(1, 2))
    return torch.cat(outputs, dim=1)


@_as_transformers_calls_it
def attend_with_varlen(query, key, value, packing: Packing, window: int | None, scaling: float, dropout: float):
    """Like `attend_with_sdpa`, in one call of torch.nn.attention.varlen.varlen_attn, which has no dropout."""
    attend, takes_groups = find_varlen_attention()
    query, key, value = _lay_out_for_kernel(query, key, value, packing)
    options = {"enable_gqa": True} if takes_groups else {}
    if not takes_groups:
        key, value = _repeat_heads(query, key, value)
    # Causal, aligned at the ends; the kernel counts what is seen on the left of a position, -1 is all.
    sees = (-1 if window is None else window - 1, 0)
    return attend(query, key, value, *packing.kernel_bounds, scale=scaling, window_size=sees, **options)[None]


@_as_transformers_calls_it
def attend_with_flash_attention_2(
    query, key, value, packing: Packing, window: int | None, scaling: float, dropout: float
):
    """Like `attend_with_sdpa`, in one call of the flash-attn package, version 2.1 or newer."""
    attend, _ = find_flash_attention()
    laid_out = _lay_out_for_kernel(query, key, value, packing)
    # Causal means aligned at the ends; a window is given as to `attend_with_varlen`'s kernel.
    options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    return attend(*laid_out, *packing.kernel_bounds, **options)[None]


def _lay_out_for_kernel(query, key, value, packing: Packing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1, heads, positions, head_dim) each → queries (positions, heads, head_dim), keys and values along all paths."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings are float32 where the weights are; the kernels take half precision only.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if len(packing.kv_index) != len(query):
        key = key.index_select(0, packing.kv_index)  # (keys, key_value_heads, head_dim)
        value = value.index_select(0, packing.kv_index)
    return query, key, value


KERNELS = {
    SDPA: attend_with_sdpa,
    MATMUL: attend_with_matmul,
    VARLEN: attend_with_varlen,
    FLASH_ATTENTION_2: attend_with_flash_attention_2,
}
