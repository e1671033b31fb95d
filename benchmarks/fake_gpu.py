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
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry
from transformers.models.qwen2 import modeling_qwen2

GPU = "fakegpu"
THIN = 64  # a matrix product with a side of at most this is limited by memory
GEMM, THIN_GEMM, ATTENTION, ELEMENTWISE = KINDS = ("gemm", "thin gemm", "attention", "elementwise")
# Operations that only look at the same memory in another way, or take some without writing it.
_VIEWS = set(
    "_reshape_alias _unsafe_view alias as_strided chunk detach empty empty_like empty_strided expand lift_fresh narrow "
    "new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose unbind unfold "
    "unsqueeze view view_as".split()
)
# They touch no more of their first tensor than what is picked from it.
_PICKS = {"embedding", "gather", "index", "index_select", "scatter_"}
# They take shape, dtype or device of their first tensor, and read nothing of it.
_BLANKS = {"full_like", "new_zeros", "ones_like", "zeros_like"}


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
_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


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


def _define_kernel(name: str, reads: int, writes: int):
    """A kernel that reads tensors of one shape and writes as many of the shapes of its first ones."""
    arguments = ", ".join(f"Tensor read{number}" for number in range(reads))
    _KERNELS.define(f"{name}({arguments}) -> {'Tensor' if writes == 1 else '(' + ', '.join(['Tensor'] * writes) + ')'}")

    @torch.library.register_fake(f"fake_gpu::{name}", lib=_KERNELS)
    def make_outlines(*tensors):
        outlines = tuple(torch.empty_like(tensor) for tensor in tensors[:writes])
        return outlines[0] if writes == 1 else outlines

    return getattr(torch.ops.fake_gpu, name)


def _define_operation(name: str, inputs: int, outputs: int, keeps_inputs: bool = True):
    """What autograd takes for an operation of one kernel forward and one backward, which reads the gradients, and the
    inputs if they are kept."""
    forward_kernel = _define_kernel(name, inputs, outputs)
    backward_kernel = _define_kernel(f"{name}_backward", inputs * keeps_inputs + outputs, inputs)

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors * keeps_inputs)
            return forward_kernel(*tensors)

        @staticmethod
        def backward(ctx, *gradients):
            return backward_kernel(*ctx.saved_tensors, *gradients)

    return Operation.apply


_KERNELS = torch.library.Library("fake_gpu", "DEF")
_silu, _norm, _swiglu = (_define_operation(*kind, 1) for kind in (("silu", 1), ("rms_norm", 1), ("swiglu", 2)))
_rope = _define_operation("rope", 2, 2, keeps_inputs=False)


@contextlib.contextmanager
def like_cuda(with_liger: bool = False) -> Iterator[None]:
    """Operations that CUDA has whole and this device would take apart; and those of liger-kernel for Qwen2."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled(GPU):
            query, key, value = (tensor.to(torch.get_autocast_dtype(GPU)) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]

    changes = [
        (functional, "rms_norm", lambda hidden, shape, weight=None, eps=None: _norm(hidden)),
        (functional, "scaled_dot_product_attention", attend),
        (functional, "silu", lambda x, inplace=False: _silu(x)),
    ]
    if with_liger:
        mlp = modeling_qwen2.Qwen2MLP
        changes += [
            (mlp, "forward", lambda own, x: own.down_proj(_swiglu(own.gate_proj(x), own.up_proj(x)))),
            (modeling_qwen2, "apply_rotary_pos_emb", lambda query, key, *tables, **options: _rope(query, key)),
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in changes:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


class Autocast(TorchFunctionMode):
    """The casts of CUDA's autocast to bf16 that this model's operations meet; torch has none for this device."""

    HALF = {functional.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.conv2d}
    WHOLE = {functional.layer_norm, functional.rms_norm}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if func in self.HALF else torch.float32 if func in self.WHOLE else None
        if dtype is not None and torch.is_autocast_enabled(GPU):
            args = [
                value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for value in args
            ]
        return func(*args, **(kwargs or {}))


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
        name = func._overloadpacket.__name__
        packet = torch.ops.aten.addmm if name == "addmm_" else func._overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in made) and name != "lift_fresh":
            self.in_main_memory.add(str(func))
        if name in _VIEWS or func.namespace == "prim":
            return result
        sizes = [tensor.nbytes for tensor in tensors if name not in _PICKS | _BLANKS or tensor is not args[0]]
        size = sum(sizes) + (max(sizes) if name in _PICKS else 0)
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


def run_step(
    model: nn.Module, batch: Mapping, mode: FakeTensorMode, autocast: bool, with_liger: bool = False
) -> tuple[Traffic, int]:
    """A device batch forward and backward: its traffic, and how many constants were copied."""
    traffic, constants = Traffic(), CopiedConstants()
    batch = {name: put(value, mode) for name, value in batch.items()}
    with mode, constants, traffic, like_cuda(with_liger):
        with torch.autocast(GPU, torch.bfloat16, enabled=autocast), Autocast():
            loss = model(**batch)["loss"]
        loss.backward()
    assert loss.device.type == GPU and loss.dtype == torch.float32, loss
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.device.type == GPU, name
    return traffic, constants.count


def evaluate_step(model: nn.Module, batch: Mapping, mode: FakeTensorMode, autocast: bool) -> Traffic:
    """The same batch while the run evaluates: forward alone, without dropout."""
    traffic = Traffic()
    batch = {name: put(value, mode) for name, value in batch.items()}
    model.eval()
    with mode, traffic, like_cuda(), torch.no_grad(), torch.autocast(GPU, torch.bfloat16, enabled=autocast), Autocast():
        loss = model(**batch)["loss"]
    model.train()
    assert loss.device.type == GPU and loss.dtype == torch.float32, loss
    return traffic
