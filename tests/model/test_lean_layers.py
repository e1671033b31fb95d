"""Layers that compute in fewer passes give what transformers' and peft's own give."""

import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from meme_llava.model.lean_layers import AddingLinear, find_liger, use_lean_lora, use_lean_norms, use_liger
from meme_llava.model.packed_attention import find_optional


def run_twice(model, change, x):
    """Output and gradients, of input and of what learns, as they are and after the change."""
    found = []
    for prepare in (lambda model: None, change):
        prepare(model)
        model.zero_grad()
        own = x.clone().requires_grad_()
        torch.manual_seed(0)
        output = model(own)
        output.float().square().sum().backward()
        learning = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        found.append({"": output.detach(), "x": own.grad, **learning})
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_adds_as_it_multiplies(dropout, bias):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20, bias=bias)), config)
    stock, lean = run_twice(model, use_lean_lora, torch.randn(2, 5, 12))
    assert stock.keys() == lean.keys() and len(stock) == 4
    for name, value in stock.items():
        assert torch.allclose(lean[name], value, atol=1e-5, rtol=1e-5), name
    assert lean[""].abs().max() > 0.1


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_lora_in_float32_on_a_half_precision_base(wants_gradient):
    """As on one GPU, under autocast; the first layer's input has no gradient."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20).bfloat16()), config)
    x, outputs, gradients = torch.randn(2, 5, 12, dtype=torch.bfloat16, requires_grad=wants_gradient), [], []
    for prepare in (lambda model: None, use_lean_lora):
        prepare(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert outputs[1].dtype == torch.bfloat16 and torch.allclose(*outputs, atol=3e-2, rtol=2e-2)
    for stock, lean in zip(*gradients, strict=True):
        assert lean.dtype == torch.float32 and torch.allclose(stock, lean, atol=0.2, rtol=3e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_computes_what_pefts_does(bias):
    """Without dropout, which peft also lets fall on the base layer's input."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, use_rslora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20, bias=bias)), config)
    use_lean_lora(model)
    layer = model.base_model.model[0]
    lean, stock = type(layer), type(layer).__mro__[2]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter).mul_(0.3))

    def set_kind(kind):
        layer.__class__ = kind
        layer.lora_B["default"].__class__ = AddingLinear if kind is lean else nn.Linear

    set_kind(stock)
    found, expected = run_twice(model, lambda model: set_kind(lean), torch.randn(2, 5, 12))[::-1]
    assert stock.__module__.startswith("peft.") and expected.keys() == found.keys() and len(found) == 5
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-4, rtol=1e-4), name
    assert any("magnitude" in name and value.abs().max() > 0.1 for name, value in found.items())


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_agree(kind, dtype):
    norm = kind(64, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    stock, lean = run_twice(nn.Sequential(norm), use_lean_norms, 3 * torch.randn(2, 7, 64, dtype=dtype))
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in stock.items():
        assert lean[name].dtype == dtype
        assert torch.allclose(lean[name], value, atol=near, rtol=near), name


def test_under_autocast_norms_stay_in_half_precision():
    model = nn.Sequential(Qwen2RMSNorm(64).bfloat16())
    use_lean_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_norms_of_all_layers_are_of_one_class():
    """torch.compile compiles a layer anew for every class, and gives up after eight."""
    model = nn.Sequential(Qwen2RMSNorm(8), Qwen2RMSNorm(8))
    use_lean_norms(model)
    assert type(model[0]) is type(model[1]) is not Qwen2RMSNorm


def test_norms_of_another_formula_stay():
    model = nn.Sequential(GemmaRMSNorm(8))
    use_lean_norms(model)
    assert type(model[0]) is GemmaRMSNorm


@pytest.fixture
def liger(monkeypatch):
    """Installs a stand-in for liger-kernel that knows qwen2, and returns how it was called."""
    calls = []

    def apply_to_qwen2(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True,
                       model=None):  # fmt: skip
        calls.append((rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model))

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": apply_to_qwen2}
    monkeypatch.setattr("meme_llava.model.lean_layers.version", lambda name: "0.8.5")
    find_optional.cache_clear()
    yield calls
    find_optional.cache_clear()


def test_liger_kernels_are_used_for_positions_and_gates_alone(liger):
    assert find_liger("qwen2") == (True, "kernels of liger-kernel 0.8.5")
    assert find_liger("unheard_of") == (False, "")
    model = nn.Module()
    model.config = types.SimpleNamespace(model_type="qwen2")
    use_liger(model)
    assert liger == [(True, False, False, False, True, model)]


def test_without_liger_nothing_is_said_and_a_broken_one_is_named(tmp_path, monkeypatch):
    find_optional.cache_clear()
    assert find_liger("qwen2") == (False, "")
    (tmp_path / "liger_kernel").mkdir()
    Path(tmp_path / "liger_kernel" / "__init__.py").write_text("import triton_of_another_torch")
    monkeypatch.syspath_prepend(tmp_path)
    find_optional.cache_clear()
    words = "cannot be loaded (ModuleNotFoundError: No module named 'triton_of_another_torch')"
    assert find_liger("qwen2") == (False, f"liger-kernel is installed and {words}")
    find_optional.cache_clear()
