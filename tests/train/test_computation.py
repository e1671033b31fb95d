"""A run computes as few layers twice as memory asks for, and says so."""

import json

import pytest
import torch
from conftest import train_flags
from transformers import LlavaConfig

import train
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.dataset import TrainingOrder, load_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.sampling import BatchShape
from meme_llava.errors import UserError
from meme_llava.model import packed_attention
from meme_llava.model.llava import load_processing
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train import prepared_run
from meme_llava.train.planning.memory import StepEstimator
from meme_llava.train.prepared_run import bound_memory, plan_computation
from meme_llava.train.settings import parse_train_arguments


@pytest.fixture(scope="module")
def processing(world):
    return load_processing(world.base)


@pytest.fixture(scope="module")
def largest_batch(world, processing):
    files = world.annotations, world.image_folder
    data = load_records(*files, RecordPolicy(), processing.encoder, 200, processing.image_policy)
    collate = PackingCollator(
        processing.encoder.image_token_id, processing.tokens_per_image, processing.image_policy.size
    )
    order = TrainingOrder(data.dataset, 2, BatchShape(4, 4, 1), seed=0, shared_images=True)
    return collate(order.fetch_largest_batch())


def plan(world, processing, largest_batch, folder, memory=2**40, **changes):
    arguments = parse_train_arguments(train_flags(world, folder, **changes), "")
    return plan_computation(arguments, processing, largest_batch, torch.device("cpu"), False, 1, memory)


@pytest.mark.parametrize("train_type", [pytest.param("lora", marks=pytest.mark.long), "full"])
def test_the_rough_bound_is_never_below_the_estimate(world, processing, largest_batch, tmp_path, train_type):
    arguments = parse_train_arguments(train_flags(world, tmp_path, train_type=train_type), "")
    config = LlavaConfig.from_pretrained(world.base)
    estimator = StepEstimator(config, processing.image_policy, arguments, largest_batch, 1, on_gpu=False)
    estimate = estimator.estimate(CheckpointedLayers()).total
    assert estimate < bound_memory(arguments, config, largest_batch)


def test_a_small_run_on_a_cpu_needs_no_estimate(world, processing, largest_batch, tmp_path, monkeypatch):
    monkeypatch.setattr(StepEstimator, "choose_recomputed", lambda *_: pytest.fail("the step was traced"))
    chosen = plan(world, processing, largest_batch, tmp_path)
    assert chosen.recomputed == CheckpointedLayers(0, 0) and chosen.step_bytes is None
    assert chosen.line == "computes in fp32; attention sdpa; no layer computed twice"


@pytest.mark.parametrize(("setting", "language", "vision"), [("none", 0, 0), ("full", 2, 2)])
def test_none_and_full_mean_what_they_say(world, processing, largest_batch, tmp_path, setting, language, vision):
    chosen = plan(world, processing, largest_batch, tmp_path, gradient_checkpointing=setting)
    assert chosen.recomputed == CheckpointedLayers(language, vision)


def test_auto_on_a_small_machine_computes_layers_twice(world, processing, largest_batch, tmp_path, monkeypatch):
    """The machine's memory is set below what the step takes, and then far below."""
    arguments = parse_train_arguments(train_flags(world, tmp_path, train_type="projector"), "")
    config = LlavaConfig.from_pretrained(world.base)
    estimator = StepEstimator(config, processing.image_policy, arguments, largest_batch, 1, on_gpu=False)
    kept = estimator.estimate(CheckpointedLayers()).total
    monkeypatch.setattr("meme_llava.train.planning.memory.find_usable", lambda memory: memory)
    chosen = plan(world, processing, largest_batch, tmp_path, kept - 1, train_type="projector")
    assert chosen.recomputed == CheckpointedLayers(1, 0) and chosen.step_bytes <= kept - 1
    assert "1 language and 0 vision layers computed twice; the largest batch, " in chosen.line
    assert chosen.to_record()["recomputed_layers"] == {"language": 1, "vision": 0}

    chosen = plan(world, processing, largest_batch, tmp_path, 1, train_type="projector")
    assert chosen.recomputed == CheckpointedLayers(2, 0)
    assert "warning: only 0.0 GiB can be used, so the run may stop for lack of memory" in chosen.line


def test_a_broken_flash_attention_is_named_and_left_alone(world, processing, largest_batch, tmp_path, monkeypatch):
    """A wheel for another torch: the package is there, and its import fails."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text('raise ImportError("undefined symbol: _ZN3c105ErrorC2E")')
    monkeypatch.syspath_prepend(tmp_path)
    packed_attention.find_optional.cache_clear()
    arguments = parse_train_arguments(train_flags(world, tmp_path, gradient_checkpointing="full"), "")
    chosen = plan_computation(arguments, processing, largest_batch, torch.device("cuda"), True, 1, 2**40)
    assert chosen.attention == "varlen"
    assert "cannot be loaded (ImportError: undefined symbol: _ZN3c105ErrorC2E)" in chosen.line
    with pytest.raises(
        UserError, match=r"flash-attn, which cannot be loaded here \(ImportError: undefined symbol.*varlen"
    ):
        packed_attention.choose_attention("flash_attention_2", torch.device("cuda"), True)
    packed_attention.find_optional.cache_clear()


@pytest.mark.parametrize(("setting", "times"), [("none", 1), ("full", 2)])
def test_layers_run_as_often_as_was_asked(world, tmp_path, monkeypatch, setting, times):
    calls = []
    load = prepared_run.load_packed_llava

    def watch(*arguments, **options):
        model = load(*arguments, **options)
        for layer in (model.model.language_model.layers[1], model.model.vision_tower.encoder.layers[0]):
            # Inside the layer: its own hooks are outside of what runs again.
            layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        return model

    monkeypatch.setattr(prepared_run, "load_packed_llava", watch)
    train.main(train_flags(world, tmp_path / "out", max_steps=1, gradient_checkpointing=setting))
    assert sorted(calls) == ["ChineseCLIPVisionMLP"] * times + ["Qwen2MLP"] * times
    record = json.loads((tmp_path / "out" / "run_record.json").read_text())["computation"]
    layers = {"language": 2, "vision": 2} if times == 2 else {"language": 0, "vision": 0}
    assert record == {"precision": "fp32", "attention": "sdpa", "liger": False, "recomputed_layers": layers}


def test_a_plan_is_printed_and_nothing_is_trained(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared_run, "load_packed_llava", lambda *_: pytest.fail("the model was loaded"))
    flags = train_flags(world, tmp_path / "out", global_batch_size=8, device_batch_size=1)
    train.main([*flags, "--plan", "--accelerator", "a800-80gb", "--gpus", "4"])
    printed = capsys.readouterr().out
    assert "8 = 4 devices x 1 x 2 in turn" in printed and "a800-80gb" in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan", "--engine", "zero7"])
    assert "--engine zero7: no such engine; there are auto, single, ddp, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan", "--gpus", "3"])
    assert "--global_batch_size 8 is not a multiple of --device_batch_size 1 x 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan", "--accelerator", "a900"])
    assert "--accelerator a900: no known accelerator; there are a800-80gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "multiplies"),
    [("avx512f amx_bf16", True), ("avx512f avx512_bf16", True), ("avx512f avx512bw", False), (None, False)],
)
def test_linux_tells_whether_a_cpu_multiplies_bf16(monkeypatch, flags, multiplies):
    text = "processor\t: 0\n" + ("" if flags is None else f"flags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(packed_attention.Path, "read_text", lambda path: text)
    assert packed_attention.multiplies_bf16() is multiplies
