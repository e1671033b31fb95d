"""Row of gpu_day.py: every attention kernel, and a small model around it, against float32 on the CPU."""

import copy
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_day_batches import make_batch, to_device  # noqa: E402
from gpu_day_results import FAIL, NOT_RUN, Result, parse_row_arguments, reporting  # noqa: E402
from throughput_devices import Platform  # noqa: E402
from throughput_models import SHAPES, Shapes, make_models  # noqa: E402

from meme_llava.errors import UserError  # noqa: E402
from meme_llava.model.packed_attention import (  # noqa: E402
    KERNELS,
    MATMUL,
    SDPA,
    Packing,
    attend_with_sdpa,
    choose_attention,
)
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava  # noqa: E402

# Largest ‖own − reference‖ / ‖reference‖, the reference being float32 from the same rounded inputs.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-3}
WINDOW = 48  # positions; of no power of two, shorter than an image
MODEL_LOSS_TOLERANCE, MODEL_GRADIENT_TOLERANCE = 2e-2, 5e-2


def main() -> None:
    arguments = parse_row_arguments(__doc__)
    device, shapes = torch.device(arguments.device), SHAPES[arguments.scale]
    for shared, window in itertools.product((True, False), (None, WINDOW)):
        batch = make_batch(shapes, shared_images=shared)
        inputs = draw_inputs(shapes, batch["input_ids"].shape[1])
        for dtype in (torch.bfloat16, torch.float32):
            rounded = [value.to(dtype) for value in inputs]
            reference = attend(attend_with_sdpa, [value.float() for value in rounded], batch, shapes, window)
            for name in KERNELS if dtype == torch.bfloat16 else (SDPA, MATMUL):
                check_kernel(name, shared, rounded, reference, batch, shapes, window, device)
    for name in KERNELS:
        check_model(name, device)


def draw_inputs(shapes: Shapes, positions: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, as float32."""
    text, generator = shapes.config.text_config, torch.Generator().manual_seed(0)
    width = text.hidden_size // text.num_attention_heads
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    inputs = [torch.randn(1, count, positions, width, generator=generator) for count in heads]
    return [*inputs, torch.randn(1, positions, text.num_attention_heads, width, generator=generator)]


def attend(
    kernel, inputs: list[torch.Tensor], batch: dict, shapes: Shapes, window: int | None = None
) -> list[torch.Tensor]:
    """Output and the three gradients of a kernel, as float32 on the CPU."""
    *sources, gradient = inputs
    device = gradient.device
    query, key, value = (source.clone().requires_grad_() for source in sources)
    text = shapes.config.text_config
    module = SimpleNamespace(num_key_value_groups=text.num_attention_heads // text.num_key_value_heads)
    names = ("cu_seqlens_q", "kv_index", "cu_seqlens_k")
    bounds = [batch[name].to(device) for name in names]
    packing = Packing(*bounds, batch["max_seqlen_q"], batch["max_seqlen_k"])
    scaling = query.shape[-1] ** -0.5
    output, _ = kernel(module, query, key, value, None, scaling, packing=packing, sliding_window=window)
    output.backward(gradient)
    return [tensor.detach().float().cpu() for tensor in (output, query.grad, key.grad, value.grad)]


def measure_error(own: torch.Tensor, reference: torch.Tensor) -> float:
    """‖own − reference‖ / ‖reference‖; not a number stays one."""
    return ((own - reference).norm() / reference.norm()).item()


def check_kernel(
    name: str,
    shared: bool,
    inputs: list[torch.Tensor],
    reference: list[torch.Tensor],
    batch: dict,
    shapes: Shapes,
    window: int | None,
    device: torch.device,
) -> None:
    """Report how far a kernel's output and gradients are from the reference."""
    dtype = inputs[0].dtype
    short = str(dtype).removeprefix("torch.")
    row = f"attention {name}, {short}, {'captions share images' if shared else 'nothing is shared'}"
    row += f", in a window of {window}" * bool(window)
    if not can_run(name, device, dtype):
        Result(row, NOT_RUN, note="needs a GPU, bf16 and its package").print()
        return
    with reporting(row) as result:
        own = attend(KERNELS[name], [value.to(device) for value in inputs], batch, shapes, window)
        names = ("output", "query_gradient", "key_gradient", "value_gradient")
        errors = {
            name: measure_error(*pair) for name, pair in zip(names, zip(own, reference, strict=True), strict=True)
        }
        result.figures = errors
        if not all(error <= TOLERANCES[dtype] for error in errors.values()):
            result.status, result.note = FAIL, f"an error is above {TOLERANCES[dtype]}"


def can_run(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether train.py could take this kernel here; plain matrix products run everywhere."""
    try:
        return name == MATMUL or choose_attention(name, device, dtype == torch.bfloat16) == name
    except UserError:
        return False


def check_model(name: str, device: torch.device) -> None:
    """Report how far loss and gradients of a small LLaVA in bf16 are from those in float32 on the CPU."""
    row = f"a small LLaVA with attention {name} in bf16"
    if not can_run(name, device, torch.bfloat16):
        Result(row, NOT_RUN, note="needs a GPU, bf16 and its package").print()
        return
    with reporting(row) as result:
        shapes = SHAPES["tiny"]
        models = make_models(shapes, Platform(torch.device("cpu"), torch.float32), seed=0)
        batch, exact = make_batch(shapes), models.packed
        with torch.no_grad():
            for parameter in exact.parameters():
                if not parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())
        rounded = copy.deepcopy(exact).to(device)
        for parameter in rounded.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        packed = next(module for module in rounded.modules() if isinstance(module, PackedLlava))
        prepare_packed_llava(packed, shapes.image_policy, name, "a small LLaVA")
        losses, gradients = [], []
        for model, where in ((exact, torch.device("cpu")), (rounded, device)):
            with torch.autocast(where.type, torch.bfloat16, enabled=model is rounded):
                loss = model(**to_device(batch, where))["loss"] / len(batch["loss_positions"])
            loss.backward()
            losses.append(loss.item())
            learned = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            gradients.append(torch.cat([gradient.flatten().float().cpu() for gradient in learned]))
        loss_error = abs(losses[1] - losses[0]) / losses[0]
        gradient_error = measure_error(gradients[1], gradients[0])
        result.figures = {"loss_error": loss_error, "gradient_error": gradient_error}
        if not (loss_error <= MODEL_LOSS_TOLERANCE and gradient_error <= MODEL_GRADIENT_TOLERANCE):
            result.status, result.note = FAIL, f"loss {losses[1]:.4f}, expected {losses[0]:.4f}"


if __name__ == "__main__":
    main()
