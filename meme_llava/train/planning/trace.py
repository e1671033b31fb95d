"""What is alive while a training step runs: the model's own code, run on tensors without storage.

So the figures follow the code when it changes, and neither a GPU nor the memory of the model is needed.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlavaConfig

from meme_llava.dataset.images import ImagePolicy
from meme_llava.model import cross_entropy_head
from meme_llava.model.llava import count_used_vision_layers, make_empty_model
from meme_llava.model.packed_attention import FLASH_ATTENTION_2, VARLEN, choose_attention
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava
from meme_llava.model.trainable import prepare_trainable
from meme_llava.train.settings import TrainArguments


@dataclass(frozen=True)
class Precision:
    """What a step computes with.

    Args:
        on_gpu: whether GPU kernels run.
        uses_bf16: whether matrices are multiplied in bfloat16.
        keeps_float32: whether what learns stays in float32 and is cast where it is used; DeepSpeed's model is in
            bfloat16 throughout.
    """

    on_gpu: bool
    uses_bf16: bool
    keeps_float32: bool


def set_depths(config: LlavaConfig, language: int, vision: int) -> LlavaConfig:
    """The same LLaVA with the given numbers of language layers and used vision layers."""
    config = copy.deepcopy(config)
    text, unused = config.text_config, config.vision_config.num_hidden_layers - count_used_vision_layers(config)
    config.vision_config.num_hidden_layers = vision + unused
    if config.vision_feature_layer >= 0:
        config.vision_feature_layer = vision
    text.num_hidden_layers = language
    types = getattr(text, "layer_types", None) or ()
    if types and len(types) != language:  # some configurations compute them
        text.layer_types = (types * language)[:language]
    return config


def outline_model(
    config: LlavaConfig, image_policy: ImagePolicy, arguments: TrainArguments, precision: Precision
) -> nn.Module:
    """The model as train.py prepares it for training, with parameters that have shape and dtype but no storage."""
    dtype = torch.bfloat16 if precision.uses_bf16 else torch.float32
    device = torch.device("cuda" if precision.on_gpu else "cpu")
    attention = choose_attention(arguments.attention, device, precision.uses_bf16)
    if attention == FLASH_ATTENTION_2:
        attention = VARLEN  # keeps the same tensors, and runs without storage
    model = make_empty_model(PackedLlava, config, dtype)
    prepare_packed_llava(model, image_policy, attention, str(arguments.model))
    model = prepare_trainable(model, arguments, arguments.seed).train()
    mode, outlines = FakeTensorMode(allow_non_fake_inputs=True), {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in outlines:  # another name's, where weights are tied
            data = parameter.data if precision.keeps_float32 else parameter.data.to(dtype)
            fake = FakeTensor(mode, data, torch.device("cpu"))  # a GPU's would need a torch with CUDA
            outlines[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, outlines[parameter])
    return model


def trace_step(model: nn.Module, batch: Mapping, precision: Precision) -> tuple[int, int, int]:
    """Run a step forward and backward on a model of `outline_model`. Returns how many bytes would be alive: after the
    forward pass, more in the loss, and more at the peak."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Those of the batches before it, when several make an optimizer step.
            parameter.grad = torch.zeros_like(parameter)
    mode = next(model.parameters()).fake_mode
    batch = {name: mode.from_tensor(value) if name == "pixel_values" else value for name, value in batch.items()}
    head = next(module for name, module in model.named_modules() if name.split(".")[-1] == "lm_head")
    live = _LiveBytes(model)
    peaks: list[int] = []  # before the loss, and in it
    handles = [
        head.register_forward_pre_hook(lambda *_: peaks.append(live.restart_peak())),
        head.register_forward_hook(lambda *_: peaks.append(live.peak)),
    ]
    casts = precision.uses_bf16 and precision.keeps_float32
    with live, _like_a_gpu() if precision.on_gpu else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            loss = model(**batch)["loss"]
        activations = live.bytes
        loss.backward()
    for handle in handles:
        handle.remove()
    logits = max(0, peaks[1] - activations)
    return activations, logits, max(0, max(peaks[0], live.peak) - activations - logits)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it while they are alive; `known` ones were there before."""

    def __init__(self, known: nn.Module):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in (*known.parameters(), *known.buffers()):
            for one in (tensor, tensor.grad):
                if one is not None:
                    self._seen[one.untyped_storage()] = True

    def restart_peak(self) -> int:
        """The peak so far; from now on a new one is measured."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._seen:
                storage = leaf.untyped_storage()
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class _KernelOfNorm(torch.autograd.Function):
    """Keeps what a GPU's kernel for RMS norm keeps: its input, and a number of each row."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight, hidden[..., 0].float())
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, gradient):
        _, weight, _ = ctx.saved_tensors
        return torch.empty_like(gradient), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextlib.contextmanager
def _like_a_gpu() -> Iterator[None]:
    """Lets operations keep for the backward pass what their GPU kernels keep, where that differs from the CPU's."""
    dropout, layer_norm, rms_norm = functional.dropout, functional.layer_norm, functional.rms_norm

    def keep_mask(input, p=0.5, training=True, inplace=False):
        # A GPU keeps which elements were dropped, a byte each; a CPU what each was multiplied by.
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def normalise_in_float32(*tensors, **options):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(*tensors, **options)
        tensors = [tensor.float() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        with torch.autocast("cpu", enabled=False):
            return layer_norm(*tensors, **options)

    functional.dropout, functional.layer_norm = keep_mask, normalise_in_float32
    functional.rms_norm = lambda hidden, shape, weight, eps: _KernelOfNorm.apply(hidden, weight)
    logits_on_cpu, cross_entropy_head.LOGITS_ON_CPU = cross_entropy_head.LOGITS_ON_CPU, cross_entropy_head.LOGITS
    try:
        yield
    finally:
        functional.dropout, functional.layer_norm, functional.rms_norm = dropout, layer_norm, rms_norm
        cross_entropy_head.LOGITS_ON_CPU = logits_on_cpu
