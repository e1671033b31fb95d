"""Row of gpu_day.py: the same device batch with single parts of the step changed, to see which changes would pay."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_day_batches import make_batch  # noqa: E402
from gpu_day_model import StepBench  # noqa: E402
from gpu_day_results import NOT_RUN, Result, parse_row_arguments, reporting  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from throughput_models import SHAPES  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Qwen2Model  # noqa: E402

from meme_llava.model.lean_layers import (  # noqa: E402
    LeanLora,
    LeanRMSNorm,
    find_liger,
    use_lean_lora,
    use_lean_norms,
    use_liger,
)
from meme_llava.model.packed_llava import compile_layers  # noqa: E402
from meme_llava.train.session import check_compiler  # noqa: E402

NEEDED_SECONDS = 12  # for one more variant
CAPTIONS = 8


def run_variants(bench: StepBench, batch: dict, end: float) -> None:
    """Report every variant that can be undone, as far as the time until `end` goes."""
    variants = {
        "as train.py has it": (keep,),
        "peft's LoRA": (stock_lora,),
        "transformers' RMSNorm": (stock_norms,),
        "peft's LoRA, transformers' RMSNorm": (stock_lora, stock_norms),
        "LoRA without dropout": (without_dropout,),
        "LoRA in bf16, no autocast": (half_lora,),
        "as train.py has it, again": (keep,),
    }
    _run_in_time(variants, bench, batch, end)


def run_liger(bench: StepBench, batch: dict, end: float) -> None:
    """Report the batch with liger-kernel, where it is installed. The last of a process: it cannot be undone."""
    if find_liger("qwen2")[0]:
        _run_in_time({"with liger-kernel": (liger,)}, bench, batch, end)


def _run_in_time(variants: dict[str, tuple[Callable, ...]], bench: StepBench, batch: dict, end: float) -> None:
    for name, changes in variants.items():
        if end - time.monotonic() < NEEDED_SECONDS:
            Result(f"variant: {name}", NOT_RUN, note="no time was left").print()
            continue
        run_variant(name, bench, batch, *changes)


def run_variant(name: str, bench: StepBench, batch: dict, *changes: Callable) -> None:
    """Report a batch's figures and GPU time by kind while the changes are in force."""
    with reporting(f"variant: {name}") as result, contextlib.ExitStack() as stack:
        start = time.perf_counter()
        for change in changes:
            stack.enter_context(change(bench))
        autocast = half_lora not in changes
        figures = bench.measure(batch, autocast)
        figures["captions_per_second"] = 1000 * CAPTIONS / figures["ms"]
        by_kind = bench.profile(batch, autocast)
        figures["gpu_ms"] = by_kind.pop("total_ms")
        result.figures = {**figures, **by_kind, "seconds": time.perf_counter() - start}


@contextlib.contextmanager
def keep(bench: StepBench) -> Iterator[None]:
    """No change."""
    yield


@contextlib.contextmanager
def stock_lora(bench: StepBench) -> Iterator[None]:
    """LoRA by peft's own forward pass, without its cast to float32, which autocast would undo."""
    for module in bench.models.packed.modules():
        if isinstance(module, LeanLora):
            module.__class__, module.cast_input_dtype_enabled = lora.Linear, False
            module.lora_B["default"].__class__ = nn.Linear
    try:
        yield
    finally:
        use_lean_lora(bench.models.packed)


@contextlib.contextmanager
def stock_norms(bench: StepBench) -> Iterator[None]:
    """Norms by transformers' own forward pass."""
    for module in bench.models.packed.modules():
        if isinstance(module, LeanRMSNorm):
            module.__class__ = type(module).__bases__[1]
    try:
        yield
    finally:
        use_lean_norms(bench.models.packed)


@contextlib.contextmanager
def liger(bench: StepBench) -> Iterator[None]:
    """Rotary positions and gated MLPs by liger-kernel, for the rest of the process."""
    use_liger(next(module for module in bench.models.packed.modules() if isinstance(module, Qwen2Model)))
    yield


@contextlib.contextmanager
def without_dropout(bench: StepBench) -> Iterator[None]:
    """LoRA's dropout left out altogether, as peft does for a rate of 0."""
    layers = [module for module in bench.models.packed.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.lora_dropout.items()) for layer in layers]
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = torch.nn.Identity()
    try:
        yield
    finally:
        for layer, dropouts in zip(layers, before, strict=True):
            for name, module in dropouts.items():
                layer.lora_dropout[name] = module


@contextlib.contextmanager
def half_lora(bench: StepBench) -> Iterator[None]:
    """What learns in bf16, as under DeepSpeed, which keeps float32 masters of its own."""
    masters = [parameter.data for parameter in bench.learning]
    try:
        for parameter in bench.learning:
            parameter.grad = None
            parameter.data = parameter.data.to(bench.platform.dtype)
        yield
    finally:
        for parameter, master in zip(bench.learning, masters, strict=True):
            parameter.grad = None
            parameter.data = master


@contextlib.contextmanager
def compiling(bench: StepBench) -> Iterator[None]:
    """The layers that repeat compiled, as --torch_compile does, for the rest of the process."""
    check_compiler(bench.platform.device)
    compile_layers(bench.models.packed)
    yield


def main() -> None:
    """The compiled step, which takes a minute or more to compile, as a row of its own."""
    arguments = parse_row_arguments(__doc__)
    bench = StepBench.make(arguments.scale, arguments.device)
    run_variant("layers compiled (--torch_compile)", bench, make_batch(SHAPES[arguments.scale]), compiling)


if __name__ == "__main__":
    main()
