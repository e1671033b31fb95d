"""Measures one device batch of the model: time, memory, and which kinds of kernels the time goes to."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_day_batches import to_device
from throughput_devices import Platform
from throughput_models import SHAPES, Models, make_models
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from meme_llava.model.accelerators import recognise_accelerator
from meme_llava.model.flops import TrainingCosts, count_batch
from meme_llava.model.trainable import CheckpointedLayers, count_layers, recompute_layers
from meme_llava.train.planning.plan import GIB, measure_ceiling

WARM_UPS, REPEATS = 2, 4
THIN = 64  # a side of LoRA's matrices is no larger
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::convolution",
    "aten::cudnn_convolution",
)
LISTED_OPERATIONS = 25


@dataclass
class StepBench:
    """The model with its optimizer on a device."""

    models: Models
    platform: Platform
    costs: TrainingCosts
    ceiling: float  # FLOP/s of large matrix products, measured
    peak: float | None  # the same by the datasheet, where it is known
    optimizer: torch.optim.Optimizer = field(init=False)

    @classmethod
    def make(cls, scale: str, device: str) -> "StepBench":
        """The model of throughput.py's exact shapes, random weights made on the device."""
        platform = Platform.choose(device)
        models = make_models(SHAPES[scale], platform, seed=0)
        accelerator = recognise_accelerator(torch.cuda.get_device_name()) if platform.is_gpu else None
        peak = accelerator.peak_tflops * 1e12 if accelerator is not None and accelerator.peak_tflops else None
        ceiling = measure_ceiling(platform.device, platform.dtype)
        return cls(models, platform, TrainingCosts.of_model(models.packed), ceiling, peak)

    def __post_init__(self) -> None:
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """AdamW with its moments, as they are after the first step, for what learns now."""
        self.optimizer = torch.optim.AdamW(self.learning, lr=0.0, fused=True)
        for parameter in self.learning:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    @property
    def learning(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.models.packed.parameters() if parameter.requires_grad]

    def recompute(self, everything: bool) -> None:
        """Let all layers, or none, compute their activations again."""
        layers = count_layers(self.models.packed.config, vision_trainable=True) if everything else CheckpointedLayers()
        recompute_layers(self.models.packed, layers)

    def measure(self, batch: dict, autocast: bool = True) -> dict:
        """Figures of the forward and backward pass over a batch, the gradients of earlier ones beside it."""
        counts = count_batch(batch)
        compute = self.make_step(batch, autocast)
        for _ in range(WARM_UPS):
            compute()
        self.platform.wait()
        self.platform.reset_peak_memory()
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            compute()
            self.platform.wait()
            seconds.append(time.perf_counter() - start)
        median, flops = statistics.median(seconds), self.costs.flops(counts)
        figures = {
            "ms": 1000 * median,
            "spread_ms": 1000 * (max(seconds) - min(seconds)),
            "positions": counts.positions,
            "model_tflop": flops / 1e12,
            "tflop_per_second": flops / median / 1e12,
            "share_of_measured_ceiling": flops / median / self.ceiling,
        }
        if self.peak is not None:
            figures["mfu"] = flops / median / self.peak
        if (peak := self.platform.read_peak_memory()) is not None:
            figures["peak_gib"] = peak / GIB
        return figures

    def make_step(self, batch: dict, autocast: bool = True) -> Callable[[], None]:
        """What computes a batch forward and backward."""
        moved = to_device(batch, self.platform.device)
        tokens = len(batch["loss_positions"])

        def compute() -> None:
            with torch.autocast(self.platform.device.type, torch.bfloat16, enabled=autocast and self.platform.is_gpu):
                loss = self.models.packed(**moved)["loss"] / tokens
            loss.backward()

        return compute

    def measure_update(self) -> float:
        """Milliseconds of clipping the gradients and of the optimizer."""
        times = []
        for _ in range(REPEATS):
            self.platform.wait()
            start = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.platform.wait()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    def profile(self, batch: dict, autocast: bool = True) -> dict:
        """Milliseconds of a batch by kind of kernel and by operation; on a CPU those of the operations themselves."""
        compute = self.make_step(batch, autocast)
        compute()
        self.platform.wait()
        on_gpu = self.platform.is_gpu
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities, record_shapes=True) as profiled:
            compute()
            self.platform.wait()
        kinds, calls, operations, kernels, kernel_times = Counter(), Counter(), Counter(), 0, Counter()
        for event in profiled.key_averages(group_by_input_shape=True):
            if event.device_type != DeviceType.CPU:
                kernels += event.count
                kernel_times[event.key[:90]] += event.self_device_time_total / 1000
                continue
            milliseconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
            if not milliseconds:
                continue
            kind = name_kind(event.key, event.input_shapes)
            kinds[kind] += milliseconds
            calls[kind] += event.count
            operations[event.key] += milliseconds
        return {
            "total_ms": sum(kinds.values()),
            **{f"{kind}_ms": kinds[kind] for kind in ("gemm", "thin_gemm", "attention", "elementwise")},
            "kernels": kernels,
            "calls": dict(calls),
            "operations_ms": dict(operations.most_common(LISTED_OPERATIONS)),
            "kernels_ms": dict(kernel_times.most_common(LISTED_OPERATIONS)),
        }


def name_kind(operation: str, shapes: list) -> str:
    """gemm, thin gemm (LoRA's), attention, or all that is moved through memory element by element."""
    if operation in PRODUCTS:
        sides = [side for shape in shapes if isinstance(shape, list) and len(shape) == 2 for side in shape]
        return "thin_gemm" if sides and min(sides) <= THIN else "gemm"
    lowered = operation.lower()
    if "attention" in lowered or "varlen" in lowered or "flash" in lowered:
        return "attention"
    return "elementwise"
