"""A GPU without contents: tensors with shape, dtype and device on which the step of a GPU runs and is counted.

torch's hook for backends written in Python gives autograd a device to stand on, FakeTensorMode the shapes and dtypes of
every operation's result. Importing this takes the device for the machine's accelerator, so it needs a process of its
own. Operations choose what they do by the kind of their device, and this one is no CUDA device: those that have kernels
of their own on CUDA alone, and are taken apart elsewhere, are counted as CUDA has them (`like_cuda`).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

GPU = "fakegpu"
THIN = 64  # a matrix product with a side of at most this is limited by memory
GEMM, THIN_GEMM, ATTENTION, ELEMENTWISE = KINDS = ("gemm", "thin gemm", "attention", "elementwise")
# Operations that only look at the same memory in another way, or take some without writing it.
_VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "detach", "expand", "slice", "select", "unsqueeze", "squeeze", "split"),
    *(
        "split_with_sizes",
        "alias",
        "permute",
        "as_strided",
        "lift_fresh",
        "unbind",
        "_reshape_alias",
        "narrow",
        "empty",
    ),
    *("empty_like", "new_empty", "new_empty_strided", "empty_strided", "unfold", "chunk", "view_as"),
}


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device=0) -> torch.Tensor:  # recomputed layers ask for it
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device=0) -> None:
        pass

    def device(self, index):
        return contextlib.nullcontext()


_setup_privateuseone_for_python_backend(GPU, backend_module=_Backend())


def put(value, mode: FakeTensorMode):
    """A tensor of the same shape and dtype on the GPU; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device=GPU)


def move_to_gpu(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a model parameters and buffers on the GPU; the parameters in `dtype`, if it is given."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in known:
                outline = put(torch.empty_like(parameter, device="meta", dtype=dtype or parameter.dtype), mode)
                known[id(parameter)] = nn.Parameter(outline, requires_grad=parameter.requires_grad)
            module._parameters[name] = known[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = put(buffer, mode)
    return model


@torch.library.custom_op("fake_gpu::silu_backward", mutates_args={})
def _differentiate_silu(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@_differentiate_silu.register_fake
def _(grad, x):
    return torch.empty_like(x)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return _differentiate_silu(grad, *ctx.saved_tensors)


@contextlib.contextmanager
def like_cuda() -> Iterator[None]:
    """Operations that CUDA has whole and this device would take apart."""
    replaced = {name: getattr(functional, name) for name in ("rms_norm", "scaled_dot_product_attention", "silu")}

    def rms_norm(hidden, shape, weight=None, eps=None):
        return torch.ops.aten._fused_rms_norm(hidden, list(shape), weight, eps)[0]

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled(GPU):
            query, key, value = (tensor.to(torch.get_autocast_dtype(GPU)) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]

    functional.rms_norm, functional.scaled_dot_product_attention = rms_norm, attend
    functional.silu = lambda x, inplace=False: _Silu.apply(x)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(functional, name, function)


class CopiedConstants(TorchFunctionMode):
    """Counts numbers of the program that become tensors on the GPU: the process waits for every such copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == GPU:
            self.count += 1
            device = kwargs.pop("device")
            return torch.empty_like(func(*args, **kwargs), device=device)
        return func(*args, **kwargs)


class Traffic(TorchDispatchMode):
    """Counts kernels by kind, the bytes that they read and write, and the FLOPs of matrix products; notes operations
    whose result is in main memory: a tensor made without a device, or a value that is read back."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes, self.flops = Counter(), Counter(), Counter()
        self.bytes_of, self.kernels_of = Counter(), Counter()  # of elementwise operations, by name
        self.in_main_memory: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in made) and name != "lift_fresh":
            self.in_main_memory.add(str(func))
        if name in _VIEWS or func.namespace == "prim":
            return result
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if "attention" in name or "attn" in name:
            kind = ATTENTION
        elif packet in flop_registry:
            sides = [side for tensor in tensors if tensor.dim() == 2 for side in tensor.shape]
            kind = THIN_GEMM if min(sides, default=math.inf) <= THIN else GEMM
            self.flops[kind] += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        else:
            kind = ELEMENTWISE
            self.bytes_of[name] += size
            self.kernels_of[name] += 1
        self.kernels[kind] += 1
        self.bytes[kind] += size
        return result


def run_step(model: nn.Module, batch: Mapping, mode: FakeTensorMode, autocast: bool) -> tuple[Traffic, int]:
    """A device batch forward and backward: its traffic, and how many constants were copied."""
    traffic, constants = Traffic(), CopiedConstants()
    batch = {name: put(value, mode) for name, value in batch.items()}
    with mode, constants, traffic, like_cuda():
        with torch.autocast(GPU, torch.bfloat16, enabled=autocast):
            loss = model(**batch)["loss"]
        loss.backward()
    assert loss.device.type == GPU and loss.dtype == torch.float32, loss
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.device.type == GPU, name
    return traffic, constants.count
