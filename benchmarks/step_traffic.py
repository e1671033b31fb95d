"""Kernels and memory traffic of one device batch on a GPU, counted from the code without a GPU: what a step's time is
made of, and what a change to it would save.

    python benchmarks/step_traffic.py                       # Qwen2-7B with ViT-L/14-336, 8 captions on 4 images
    python benchmarks/step_traffic.py --dropout 0 --stock   # without dropout; layers as transformers and peft have them

Counted at few layers and extrapolated: all layers of a tower are alike. The planned time is the sum of matrix products
at 72 % of an A800's peak, and of everything else at the memory's bandwidth; it is a plan, not a measurement.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fake_gpu  # noqa: E402
import torch  # noqa: E402
from fake_gpu import GEMM, KINDS, Traffic  # noqa: E402
from gpu_day_batches import CAPTION_LENGTHS, IMAGES, make_batch  # noqa: E402
from throughput_models import SHAPES, Shapes, make_arguments  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from meme_llava.model import packed_llava, trainable  # noqa: E402
from meme_llava.model.accelerators import recognise_accelerator  # noqa: E402
from meme_llava.model.flops import TrainingCosts, count_batch  # noqa: E402
from meme_llava.model.llava import make_empty_model  # noqa: E402
from meme_llava.model.packed_attention import VARLEN  # noqa: E402
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava  # noqa: E402
from meme_llava.model.trainable import CheckpointedLayers, prepare_trainable, recompute_layers  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402
from meme_llava.train.planning.trace import set_depths  # noqa: E402

# Of an A800: the share of its peak that large matrix products reach, and bytes a second.
DEVICE, GEMM_SHARE, BANDWIDTH = "A800-SXM4-80GB", 0.72, 1.7e12
FEW = 2


def make_model(
    shapes: Shapes,
    language: int,
    vision: int,
    dropout: float,
    recomputes: bool,
    dtype: torch.dtype | None = torch.bfloat16,
) -> tuple[PackedLlava, FakeTensorMode]:
    """The model as train.py prepares it, on the GPU, with few layers; all of it in bf16, as under DeepSpeed, or with
    None what learns in float32."""
    arguments = make_arguments(shapes, 0)
    arguments.lora_dropout = dropout
    model = make_empty_model(PackedLlava, set_depths(shapes.config, language, vision), torch.bfloat16)
    prepare_packed_llava(model, shapes.image_policy, VARLEN, "the benchmark's model")
    model = prepare_trainable(model, arguments, 0).train()
    recompute_layers(model, CheckpointedLayers(language, vision) if recomputes else CheckpointedLayers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return fake_gpu.move_to_gpu(model, mode, dtype), mode


def count_traffic(
    shapes: Shapes, dropout: float, recomputes: bool, autocast: bool = False, with_liger: bool = False
) -> Traffic:
    """The traffic of the whole model, from that of few layers."""
    dtype = None if autocast else torch.bfloat16
    batch = make_batch(shapes)
    text, vision = shapes.config.text_config.num_hidden_layers, shapes.config.vision_config.num_hidden_layers - 1
    depths = ((FEW, FEW), (FEW + 1, FEW), (FEW, FEW + 1))
    counted = []
    for depth in depths:
        model, mode = make_model(shapes, *depth, dropout, recomputes, dtype)
        counted.append(fake_gpu.run_step(model, batch, mode, autocast, with_liger)[0])
    whole = Traffic()
    for name in ("kernels", "bytes", "flops", "kernels_of", "bytes_of"):
        base, *deeper = (getattr(one, name) for one in counted)
        total = Counter()
        for key in set(base) | set(deeper[0]) | set(deeper[1]):
            grown = [
                (other[key] - base[key]) * (count - FEW) for other, count in zip(deeper, (text, vision), strict=True)
            ]
            total[key] = base[key] + sum(grown)
        setattr(whole, name, total)
    return whole


def plan_milliseconds(traffic: Traffic) -> dict[str, float]:
    """Planned GPU time by kind, in ms."""
    peak = recognise_accelerator(DEVICE).peak_tflops * 1e12
    planned = {kind: 1000 * traffic.bytes[kind] / BANDWIDTH for kind in KINDS}
    planned[GEMM] = 1000 * traffic.flops[GEMM] / (GEMM_SHARE * peak)
    return planned


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SHAPES), default="full")
    parser.add_argument("--dropout", type=float, default=None, help="LoRA's; else the recipe's")
    parser.add_argument("--stock", action="store_true", help="layers as transformers and peft have them")
    parser.add_argument("--autocast", action="store_true", help="as on one GPU or under DDP: what learns is float32")
    parser.add_argument("--liger", action="store_true", help="with the kernels of liger-kernel")
    parser.add_argument("--recompute", action="store_true", help="every layer computes its activations again")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(argv)
    shapes = SHAPES[arguments.scale]
    dropout = shapes.lora_dropout if arguments.dropout is None else arguments.dropout
    if arguments.stock:
        packed_llava.use_lean_norms = trainable.use_lean_lora = lambda model: None
    traffic = count_traffic(shapes, dropout, arguments.recompute, arguments.autocast, arguments.liger)
    planned = plan_milliseconds(traffic)
    model = make_empty_model(PackedLlava, shapes.config, torch.bfloat16)
    prepare_packed_llava(model, shapes.image_policy, VARLEN, "the benchmark's model")
    costs = TrainingCosts.of_model(prepare_trainable(model, make_arguments(shapes, 0), 0))
    flops = costs.flops(count_batch(make_batch(shapes)))
    total = sum(planned.values())
    mfu = flops / (total / 1000) / (recognise_accelerator(DEVICE).peak_tflops * 1e12)
    rows = [
        (kind, f"{traffic.kernels[kind]:,}", f"{traffic.bytes[kind] / 1e9:.1f}", f"{planned[kind]:.1f}")
        for kind in KINDS
    ]
    rows.append(
        ("all", f"{sum(traffic.kernels.values()):,}", f"{sum(traffic.bytes.values()) / 1e9:.1f}", f"{total:.1f}")
    )
    print_table(
        f"{len(CAPTION_LENGTHS)} captions on {IMAGES} images, planned for {DEVICE}",
        ("kind", "kernels", "GB", "ms"),
        rows,
    )
    most = [
        (name, f"{traffic.kernels_of[name]:,}", f"{size / 1e9:.1f}") for name, size in traffic.bytes_of.most_common(15)
    ]
    print_table("Elementwise", ("operation", "kernels", "GB"), most)
    print(f"{flops / 1e12:.1f} TFLOP; planned MFU {mfu:.1%}")
    if arguments.output:
        figures = {"kernels": traffic.kernels, "bytes": traffic.bytes, "ms": planned, "mfu": mfu, "flops": flops}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
