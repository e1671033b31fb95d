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
from torch.nn import functional  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402

from meme_llava.model.packed_llava import compile_layers  # noqa: E402
from meme_llava.train.session import check_compiler  # noqa: E402

NEEDED_SECONDS = 12  # for one more variant
CAPTIONS = 8


def run_variants(bench: StepBench, batch: dict, end: float) -> None:
    """Report every variant, as far as the time until `end` goes."""
    variants = {
        "as train.py has it": (keep,),
        "LoRA lean: no cast, scaled at its rank, added by its product": (lean_lora,),
        "RMSNorm fused": (fused_norm,),
        "peft's cast left out": (without_cast,),
        "LoRA without dropout": (without_dropout,),
        "LoRA lean, RMSNorm fused": (lean_lora, fused_norm),
        "LoRA lean, RMSNorm fused, no dropout": (lean_lora, fused_norm, without_dropout),
        "LoRA in bf16, no autocast": (half_lora,),
        "LoRA in bf16, no autocast, lean, RMSNorm fused": (half_lora, lean_lora, fused_norm),
        "as train.py has it, again": (keep,),
    }
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
def without_cast(bench: StepBench) -> Iterator[None]:
    """LoRA's input stays in bf16; autocast would cast it back anyway."""
    layers = [module for module in bench.models.packed.modules() if isinstance(module, LoraLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    yield
    for layer, value in zip(layers, before, strict=True):
        layer.cast_input_dtype_enabled = value


@contextlib.contextmanager
def lean_lora(bench: StepBench) -> Iterator[None]:
    """LoRA in as few kernels as torch's own operations allow."""

    def forward(self, x: torch.Tensor, *unused, **options) -> torch.Tensor:
        result = self.base_layer(x)
        down, up = self.lora_A["default"], self.lora_B["default"].weight
        scaled = down(self.lora_dropout["default"](x)) * self.scaling["default"]
        if torch.is_autocast_enabled(x.device.type):
            up = up.to(torch.get_autocast_dtype(x.device.type))
            scaled, result = scaled.to(up.dtype), result.to(up.dtype)
        return torch.addmm(result.flatten(0, -2), scaled.flatten(0, -2), up.T).view_as(result)

    before, lora.Linear.forward = lora.Linear.forward, forward
    yield
    lora.Linear.forward = before


@contextlib.contextmanager
def fused_norm(bench: StepBench) -> Iterator[None]:
    """Qwen2's norms in one kernel, outside of autocast, which would have it in float32."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.rms_norm(hidden, (hidden.shape[-1],), self.weight.to(hidden.dtype), self.variance_epsilon)

    norm = modeling_qwen2.Qwen2RMSNorm
    before, norm.forward = norm.forward, forward
    yield
    norm.forward = before


@contextlib.contextmanager
def without_dropout(bench: StepBench) -> Iterator[None]:
    """LoRA's dropout left out altogether, as peft does for a rate of 0."""
    layers = [module for module in bench.models.packed.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.lora_dropout.items()) for layer in layers]
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = torch.nn.Identity()
    yield
    for layer, dropouts in zip(layers, before, strict=True):
        for name, module in dropouts.items():
            layer.lora_dropout[name] = module


@contextlib.contextmanager
def half_lora(bench: StepBench) -> Iterator[None]:
    """What learns in bf16, as under DeepSpeed, which keeps float32 masters of its own."""
    masters = [parameter.data for parameter in bench.learning]
    for parameter in bench.learning:
        parameter.grad = None
        parameter.data = parameter.data.to(bench.platform.dtype)
    yield
    for parameter, master in zip(bench.learning, masters, strict=True):
        parameter.grad = None
        parameter.data = master


@contextlib.contextmanager
def compiling(bench: StepBench) -> Iterator[None]:
    """The layers that repeat compiled, as --torch_compile does."""
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
