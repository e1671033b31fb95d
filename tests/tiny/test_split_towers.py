"""Taking a LLaVA apart: the towers carry its weights, build again, and see and speak as they did in it."""

import shutil

import pytest
import split_towers
import torch
from conftest import IMAGE_SIZE, LANGUAGE_DIMENSIONS, train_flags
from make_towers import make_language_model
from transformers import AutoTokenizer, ChineseCLIPModel, Qwen2ForCausalLM

import build_base_model
import merge_lora
import train
from meme_llava.model.llava import load_llava
from meme_llava.model.loading import load_strictly


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    """A LLaVA that was trained in full for two steps, in float32."""
    folder = tmp_path_factory.mktemp("split")
    train.main(train_flags(world, folder / "train", train_type="full", max_steps=2))
    flags = ["--adapter", str(folder / "train"), "--output_dir", str(folder / "merged"), "--dtype", "float32"]
    merge_lora.main(flags)
    return folder / "merged"


def split(model, towers, output_dir, *flags):
    split_towers.main(["--model", str(model), "--towers", str(towers), "--output_dir", str(output_dir), *flags])


def test_towers_carry_the_trained_weights_and_build_again(world, model, tmp_path):
    split(model, world.folder, tmp_path / "towers", "--dtype", "float32")
    folders = {name: tmp_path / "towers" / name for name in ("language_model", "vision_tower")}
    assert {path.name for path in folders["language_model"].iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in folders["vision_tower"].iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    build_base_model.main(
        [
            *("--language_model", str(folders["language_model"]), "--vision_model", str(folders["vision_tower"])),
            *("--output_dir", str(tmp_path / "again"), "--seed", "5"),
        ]
    )
    trained, again = (load_llava(folder, torch.float32).state_dict() for folder in (model, tmp_path / "again"))
    base = load_llava(world.base, torch.float32).state_dict()
    fresh = {name for name in trained if not torch.equal(trained[name], again[name])}
    assert fresh == {name for name in trained if "multi_modal_projector" in name and "weight" in name} | {
        name for name in trained if "multi_modal_projector" in name and "bias" in name
    }
    # What was trained is not what it was before.
    assert not torch.equal(base["lm_head.weight"], again["lm_head.weight"])


def test_the_language_model_speaks_alone(world, model, tmp_path):
    split(model, world.folder, tmp_path / "towers")
    folder = tmp_path / "towers" / "language_model"
    language_model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llava = load_llava(model, torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("我太难了")["input_ids"]])
    with torch.inference_mode():
        # Stored in half precision.
        assert torch.allclose(language_model(ids).logits, llava(input_ids=ids).logits, atol=2e-2)


def test_a_feature_scale_makes_the_features_smaller_and_nothing_else(world, model, tmp_path):
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    outputs = []
    for scale in ("1", "0.25"):
        split(model, world.folder, tmp_path / scale, "--dtype", "float32", "--feature_scale", scale)
        tower = load_strictly(ChineseCLIPModel, tmp_path / scale / "vision_tower", dtype=torch.float32).vision_model
        with torch.inference_mode():
            outputs.append(tower(pixels, output_hidden_states=True))
    whole, scaled = outputs
    for hidden, hidden_scaled in zip(whole.hidden_states, scaled.hidden_states, strict=True):
        assert torch.allclose(hidden_scaled, hidden * 0.25, atol=1e-3)
    assert torch.allclose(scaled.pooler_output, whole.pooler_output, atol=1e-3)


def test_a_feature_scale_of_nothing_is_refused(world, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        split(model, world.folder, tmp_path / "towers", "--feature_scale", "0")
    assert "--feature_scale is 0.0, expected greater than 0" in capsys.readouterr().err


def test_other_towers_are_refused(world, model, tmp_path, capsys):
    make_language_model(
        tmp_path / "other" / "language_model", ["我太难了"], seed=0, **{**LANGUAGE_DIMENSIONS, "hidden_size": 64}
    )
    shutil.copytree(world.vision_tower, tmp_path / "other" / "vision_tower")
    with pytest.raises(SystemExit) as stop:
        split(model, tmp_path / "other", tmp_path / "towers")
    assert stop.value.code == 2
    assert "the language model of --model is not the one of --towers" in capsys.readouterr().err
    assert not (tmp_path / "towers").exists()


def test_a_weight_that_half_precision_cannot_hold_is_refused(world, model, tmp_path, capsys, monkeypatch):
    def load_with_a_large_weight(folder, dtype):
        llava = load_llava(folder, dtype)
        llava.lm_head.weight.data[0, 0] = 1e6
        return llava

    monkeypatch.setattr(split_towers, "load_llava", load_with_a_large_weight)
    with pytest.raises(SystemExit):
        split(model, world.folder, tmp_path / "towers")
    assert "language_model: lm_head.weight has 1, such as " in capsys.readouterr().err
