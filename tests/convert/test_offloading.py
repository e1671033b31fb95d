"""Running a model layer by layer: the same bits as a loaded model, and no more weights in memory than one module's."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import LANGUAGE_DIMENSIONS, VISION_DIMENSIONS
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from meme_llava.convert.merge import TrainedWeights
from meme_llava.convert.merge_check import _offload_models
from meme_llava.model import offloading
from meme_llava.model.llava import load_llava, make_empty_model
from meme_llava.model.offloading import (
    fits_in_memory,
    measure_available_memory,
    measure_machine_memory,
    offload_weights,
)
from meme_llava.model.trainable import apply_trained_weights
from meme_llava.storage.tensor_files import open_model_tensors

VISION = {**VISION_DIMENSIONS, "image_size": 28, "patch_size": 14}
IDS = torch.tensor([[5, 3, 8, 1, 0, 63]])
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def make_qwen2(tied):
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, tie_word_embeddings=tied, **LANGUAGE_DIMENSIONS))


def make_clip():
    return CLIPVisionModel(CLIPVisionConfig(**VISION))


def make_siglip():
    return SiglipVisionModel(SiglipVisionConfig(**VISION))


# Bytes of float32 of the largest module: 64 tokens x 32; 16 x 3 x 14 x 14 and a class token or biases of 16.
MODELS = {
    "qwen2": (lambda: make_qwen2(False), {"input_ids": IDS}, "logits", 8_192),
    "qwen2_tied": (lambda: make_qwen2(True), {"input_ids": IDS}, "logits", 8_192),
    "clip": (make_clip, {"pixel_values": PIXELS}, "pooler_output", 37_696),
    "siglip": (make_siglip, {"pixel_values": PIXELS}, "pooler_output", 37_696),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model with no two parameters alike, its inputs and the name of what comes last out of it."""
    make, inputs, output, _ = MODELS[request.param]
    # Torch multiplies by weights that want a gradient in another order, also where none is computed.
    model = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model, inputs, output


def offload(model, read=None):
    """An empty copy of `model` that reads what `read` gives, by default the model's own tensors."""
    state = model.state_dict()
    model_class = AutoModelForCausalLM if isinstance(model, Qwen2ForCausalLM) else type(model)
    return offload_weights(make_empty_model(model_class, model.config), read or (lambda name: state[name].clone()))


def list_real(model):
    return [name for name, parameter in model.named_parameters() if not parameter.is_meta]


@torch.inference_mode()
def test_outputs_are_bit_equal_to_the_loaded_model(case):
    model, inputs, output = case
    empty = offload(model)
    expected = model(**inputs, output_hidden_states=True)
    for _ in range(2):
        found = empty(**inputs, output_hidden_states=True)
        assert torch.equal(found[output], expected[output])
        assert len(found.hidden_states) == len(expected.hidden_states) > 2
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        assert list_real(empty) == []


@torch.inference_mode()
def test_every_weight_counts(case):
    """Were one not read, the comparison above could pass without it; adding 0.5 to any one changes the output."""
    model, inputs, output = case
    state = model.state_dict()
    expected = model(**inputs)[output]
    # Keys' biases move all attention scores of a query alike, and softmax does not see it.
    names = [name for name in state if not name.endswith("k_proj.bias")]
    assert len(names) > 20
    for changed in names:
        empty = offload(model, lambda name, changed=changed: state[name] + 0.5 * (name == changed))
        assert not torch.equal(empty(**inputs)[output], expected), changed


@pytest.mark.parametrize("case", ["qwen2", "qwen2_tied"], indirect=True)
@torch.inference_mode()
def test_generation_with_a_cache_is_the_same(case):
    model, inputs, _ = case
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = offload(model).generate(**inputs, **options)
    assert found.shape == (1, 12)
    assert torch.equal(found, model.generate(**inputs, **options))


@torch.inference_mode()
def test_weights_of_other_dtypes_are_converted(case):
    """The model's dtype decides; float16 files make the outputs of float16 weights in float32."""
    model, inputs, output = case
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    empty = offload(model, state.__getitem__)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    assert torch.equal(empty(**inputs)[output], model(**inputs)[output])


@torch.inference_mode()
def test_a_weight_of_another_shape_is_an_error(case):
    """Broadcasting or a linear layer of another width must not hide it."""
    model, inputs, _ = case
    state = model.state_dict()
    name = next(iter(state))
    empty = offload(model, lambda asked: state[asked][:1] if asked == name else state[asked])
    with pytest.raises(ValueError, match=f'"{name.rpartition(".")[2]}" .*this looks incorrect'):
        empty(**inputs)


def find_owner(name):
    """The module that uses a parameter; SigLIP's attention is one module with its output projection."""
    owner = name.rpartition(".")[0]
    return owner.removesuffix(".out_proj") if "head.attention" in name else owner


@torch.inference_mode()
def test_no_two_layers_are_in_memory_at_once(case, request):
    """Of all that was read, only the module that runs and those that call it may still be alive.

    CLIP's embeddings and SigLIP's head hold parameters of their own while they call a part of themselves.
    """
    model, inputs, _ = case
    state = model.state_dict()
    references = {}
    most = 0

    def read(name):
        nonlocal most
        alive = [other for other, reference in references.items() if reference() is not None]
        callers = f"{find_owner(name)}."
        strangers = [other for other in alive if not callers.startswith(f"{find_owner(other)}.")]
        assert strangers == [], f"{name} was read while {strangers} were still in memory"
        tensor = state[name].clone()
        references[name] = weakref.ref(tensor.untyped_storage())
        most = max(most, tensor.nbytes + sum(state[other].nbytes for other in alive))
        return tensor

    offload(model, read)(**inputs)
    assert not any(reference() is not None for reference in references.values())
    assert set(references) == set(state)
    assert most == MODELS[request.node.callspec.params["case"]][3]


@pytest.fixture(scope="module")
def llava_inputs(world):
    config = LlavaConfig.from_pretrained(world.base)
    image = [config.image_token_id] * config.image_seq_length
    return {"input_ids": torch.tensor([[7, *image, 9, 11]]), "pixel_values": PIXELS[:1]}


@torch.inference_mode()
def test_a_llava_with_an_adapter_is_the_same(world, trained, llava_inputs):
    """LoRA matrices and the copied projector are read under the names that peft gives them."""
    expected = apply_trained_weights(load_llava(world.base, torch.float32), trained).eval()
    base = load_llava(world.base, torch.float32).eval()
    passed = []
    model = next(_offload_models(world.base, TrainedWeights.read(trained), world.base, passed.append))
    for _ in range(2):
        logits = model(**llava_inputs).logits
        assert torch.equal(logits, expected(**llava_inputs).logits)
    assert not torch.equal(logits, base(**llava_inputs).logits), "the adapter must make a difference"
    assert list_real(model) == [] and passed == [1] * 2 * LANGUAGE_DIMENSIONS["num_hidden_layers"]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**llava_inputs, **options), expected.generate(**llava_inputs, **options))


def test_empty_models_hold_no_weights_but_real_buffers(case):
    """Rotary frequencies and position ids are computed, not stored; on the meta device they would be lost."""
    model, _, _ = case
    empty = make_empty_model(type(model), model.config, torch.bfloat16)
    assert list_real(empty) == []
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}
    buffers, expected = dict(empty.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == expected.keys() and len(buffers) > 0
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    assert not empty.training


def set_limits(monkeypatch, folder, *pairs, **memory):
    """Fake files of one control group version after the other, (limit, usage), None for a file that is not there."""
    files = []
    for number, pair in enumerate(pairs):
        paths = tuple(folder / f"{kind}{number}" for kind in ("limit", "usage"))
        for path, content in zip(paths, pair, strict=True):
            if content is not None:
                path.write_text(f"{content}\n")
        files.append(paths)
    monkeypatch.setattr(offloading, "CGROUP_LIMITS", tuple(files))
    monkeypatch.setattr(offloading.psutil, "virtual_memory", lambda: SimpleNamespace(**memory))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], 1000),
        ([("max", 400)], 1000),
        ([(900, 400)], 500),
        ([(9000, 400)], 1000),
        ([(900, 1000)], 0),
        ([(900, None)], 1000),
        ([(None, 400)], 1000),
        # Version 2 has no limit, version 1 has one; version 1 writes "no limit" as a huge number.
        ([("max", 400), (700, 400)], 300),
        ([(None, None), (9223372036854771712, 400)], 1000),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, pairs, expected):
    set_limits(monkeypatch, tmp_path, *pairs, available=1000)
    assert measure_available_memory() == expected


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([], 1000), ([("max", 400)], 1000), ([(700, 600)], 700), ([(9223372036854771712, 400)], 1000)],
)
def test_a_containers_limit_is_all_the_memory_there_is(tmp_path, monkeypatch, pairs, expected):
    set_limits(monkeypatch, tmp_path, *pairs, total=1000)
    assert measure_machine_memory() == expected


def test_available_memory_of_this_machine_is_plausible():
    assert 100_000_000 < measure_available_memory() < 100_000_000_000_000


@pytest.mark.parametrize(
    ("dtype", "available", "fits"),
    [
        (torch.float32, 2_000_004_001, True),
        (torch.float32, 2_000_004_000, False),
        (torch.bfloat16, 2_000_002_001, True),
        (torch.bfloat16, 2_000_002_000, False),
        (torch.float32, 0, False),
    ],
)
def test_a_model_fits_where_its_weights_and_working_room_do(tmp_path, monkeypatch, dtype, available, fits):
    """1,000 values, some stored as float16, some as float32: what counts is the dtype they are loaded in."""
    save_file({"a": torch.zeros(300), "b": torch.zeros(70, 10).half()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(offloading, "measure_available_memory", lambda: available)
    assert fits_in_memory(open_model_tensors(tmp_path), dtype) is fits
