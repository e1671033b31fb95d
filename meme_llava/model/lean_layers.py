"""Layers of language models and of LoRA that compute what transformers' and peft's do in fewer passes over memory.

Between matrix products a GPU mostly waits for memory. What is saved here is reading and writing tensors of a row's
size; results differ by rounding alone. Modules keep their parameters.
"""

import inspect
from functools import cache
from importlib.metadata import version

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional

from meme_llava.model.four_bit import read_weight
from meme_llava.model.packed_attention import find_optional

# Their forward passes are all the one of `LeanRMSNorm`; others' add one to the weight, or have none.
RMS_NORMS = {f"{name}RMSNorm" for name in ("Qwen2", "Qwen3", "Llama", "Mistral", "Granite", "SmolLM3")}
LIGER = ("liger_kernel.transformers.monkey_patch", "MODEL_TYPE_TO_APPLY_LIGER_FN")


class LeanRMSNorm(nn.Module):
    """Root mean square layer norm (https://arxiv.org/abs/1910.07467) in one kernel."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, width) to the same shape and dtype."""
        # Autocast would hand it float32 and get float32 back.
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.weight.to(hidden.dtype)
            return functional.rms_norm(hidden, weight.shape, weight, self.variance_epsilon)


class AddingLinear(nn.Linear):
    """LoRA's second matrix, whose product is scaled and added to the base layer's output as it is made."""

    def forward(self, hidden: torch.Tensor, output: torch.Tensor, scale: float) -> torch.Tensor:
        """(positions, rank) and (positions, width) to (positions, width), in the place of the latter: a linear layer
        needs its output no more. Of two dimensions, since a view written to is copied in the backward pass."""
        return output.addmm_(hidden.to(output.dtype), self.weight.t().to(output.dtype), alpha=scale)


class LeanLora(lora.Linear):
    """peft's LoRA of a linear layer, with one adapter that is always active (https://arxiv.org/abs/2106.09685).

    Not for an adapter that is disabled or merged, and not for backward hooks on the base layer, whose output is written
    to.
    """

    adapter = "default"  # peft's name for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, width in) to (…, width out)."""
        rows = x.flatten(0, -2)  # (positions, width in)
        hidden = self.lora_A[self.adapter](self.lora_dropout[self.adapter](rows))  # (positions, rank)
        # As a module of its own: engines gather a module's weights when it is called.
        output = self.lora_B[self.adapter](hidden, self.base_layer(rows), self.scaling[self.adapter])
        return output.unflatten(0, x.shape[:-1])


class LeanDora(LeanLora):
    """DoRA (https://arxiv.org/abs/2402.09353): LoRA whose every row of W + scale * B A has a length that learns.

    Dropout falls on LoRA's own product, not on the base layer's, which would be computed twice. No matrix of the base
    layer's size is made, where peft makes one of its width squared.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, width in) to (…, width out)."""
        output, bias = super().forward(x), self.base_layer.bias
        factors = self.lora_magnitude_vector[self.adapter].weight / self.measure_rows()  # (width out,)
        # Half precision is exact near 0; near 1 it would lose what is learned.
        excess = (factors - 1).to(output.dtype)
        return torch.addcmul(output, excess, output if bias is None else output - bias.to(output.dtype))

    @torch.no_grad()
    def measure_rows(self) -> torch.Tensor:
        """The lengths of the rows of W + scale * B A, float32 (width out); to the gradient they are constants."""
        weight, scale = read_weight(self.base_layer), self.scaling[self.adapter]
        first, second = (matrices[self.adapter].weight.float() for matrices in (self.lora_A, self.lora_B))
        with torch.autocast(weight.device.type, enabled=False):
            products = (weight @ first.t().to(weight.dtype)).float()  # (width out, rank)
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
            squares += (second * (2 * scale * products + scale**2 * (second @ (first @ first.t())))).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def use_lean_norms(model: nn.Module) -> None:
    """Let every norm of a language model that is of a known kind compute as `LeanRMSNorm` does."""
    for module in model.modules():
        if type(module).__name__ in RMS_NORMS and not isinstance(module, LeanRMSNorm):
            module.__class__ = _make_lean(type(module))


@cache  # one for all layers: torch.compile compiles anew for every class
def _make_lean(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (LeanRMSNorm, kind), {})


def use_lean_lora(model: nn.Module) -> None:
    """Let every linear layer with LoRA of a model that begins to train compute as `LeanLora` or `LeanDora` does."""
    for module in model.modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        is_dora = bool(module.lora_magnitude_vector)
        module.__class__ = LeanDora if is_dora else LeanLora
        module.lora_B[LeanLora.adapter].__class__ = AddingLinear
        if is_dora and not module.base_layer.weight.is_meta:
            # peft measures in the base layer's dtype; in bfloat16 rows would begin with other lengths.
            module.lora_magnitude_vector[LeanLora.adapter].weight.data = module.measure_rows()


def find_liger(model_type: str) -> tuple[bool, str]:
    """Whether liger-kernel can be used for language models of this type; its version, or what is wrong with one that is
    installed."""
    appliers, problem = find_optional(*LIGER)
    if problem:
        return False, f"liger-kernel is installed and cannot be loaded ({problem})"
    has_kernels = model_type in (appliers or ())
    return has_kernels, f"kernels of liger-kernel {version('liger-kernel')}" if has_kernels else ""


def use_liger(language_model: nn.Module) -> None:
    """Let a language model turn positions and gate its MLPs by kernels of liger-kernel, one each in place of six and
    two. Norms and loss stay as they are."""
    appliers, _ = find_optional(*LIGER)
    apply = appliers[language_model.config.model_type]
    wanted = {name: name in ("rope", "swiglu") for name in inspect.signature(apply).parameters if name != "model"}
    apply(**wanted, model=language_model)
