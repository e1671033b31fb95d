"""`merge_lora.py --export vllm_lora`: a base to serve, and an adapter of the language model's LoRA alone."""

import json
import shutil

import pytest
import torch
from conftest import train_flags
from conversions import BASE_FILES, build, check_room_for_all, fail, make_siglip, merge
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

import train
from meme_llava.convert import export_vllm_lora, merge_check
from meme_llava.errors import CheckpointError, UserError
from meme_llava.inference.generation import load_answerer, load_transformers_model
from meme_llava.model.llava import load_llava
from meme_llava.model.trainable import apply_trained_weights
from meme_llava.storage.fingerprint import check_weights, identify_weights
from meme_llava.storage.run_record import LANGUAGE_LORA, read_trained_record


def export(trained, output_dir, *flags):
    merge(["--adapter", str(trained), "--output_dir", str(output_dir), "--export", "vllm_lora", *flags])
    return output_dir


@pytest.fixture(scope="module")
def exported(world, trained):
    return export(trained, world.folder / "vllm_lora", "--dtype", "float32")


def test_the_base_has_the_language_model_that_it_had_and_all_else_merged(world, trained, exported, tmp_path):
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32", "--no_verify"])
    before, merged, found = (
        load_file(folder / "model.safetensors") for folder in (world.base, tmp_path / "merged", exported)
    )
    for name, tensor in found.items():
        expected = before if name.startswith("language_model.") else merged
        assert torch.equal(tensor, expected[name].float()), name
    assert {path.name for path in exported.iterdir()} == BASE_FILES | {LANGUAGE_LORA}


def test_the_adapter_is_one_that_vllm_takes(trained, exported):
    """No module in full, and modules by their names: a regular expression would have to be compiled by the server."""
    config = json.loads((exported / LANGUAGE_LORA / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["r"] == 4
    assert len(config["target_modules"]) == 14
    assert "model.language_model.layers.0.self_attn.q_proj" in config["target_modules"]
    learned = load_file(trained / "adapter_model.safetensors")
    found = load_file(exported / LANGUAGE_LORA / "adapter_model.safetensors")
    assert found.keys() == {name for name in learned if ".language_model." in name}
    assert all(torch.equal(tensor, learned[name]) for name, tensor in found.items())


def test_it_asks_for_the_room_of_base_and_adapter_before_the_first_byte(
    trained, exported, tmp_path, monkeypatch, capsys
):
    paths = (exported / "model.safetensors", exported / LANGUAGE_LORA / "adapter_model.safetensors")
    needed = sum(tensor.nbytes for path in paths for tensor in load_file(path).values())
    flags = ("--adapter", trained, "--export", "vllm_lora", "--dtype", "float32")
    check_room_for_all(monkeypatch, capsys, tmp_path / "out", needed, *flags)


@torch.inference_mode()
def test_peft_puts_both_together_to_the_model_that_learned(world, trained, exported):
    """By the stock classes alone."""
    theirs = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs.model.vision_tower) is CLIPVisionModel
    theirs = PeftModel.from_pretrained(theirs, exported / LANGUAGE_LORA).eval()
    ours = apply_trained_weights(load_llava(world.base, torch.float32), trained).eval()
    image_token = ours.config.image_token_id
    inputs = {
        "input_ids": torch.tensor([[5, *[image_token] * 4, 7, 11, 13]]),
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
    }
    expected = ours(**inputs).logits
    assert torch.allclose(theirs(**inputs).logits, expected, atol=1e-4)
    with theirs.disable_adapter():
        assert not torch.allclose(theirs(**inputs).logits, expected, atol=1e-2)


@pytest.mark.parametrize("fits", [True, False], ids=["in memory", "offloaded"])
def test_the_proof_covers_base_and_adapter_together(trained, tmp_path, monkeypatch, capsys, fits):
    monkeypatch.setattr(merge_check, "fits_in_memory", lambda *arguments: fits)
    folder = export(trained, tmp_path / "out", "--dtype", "float32")
    checks = json.loads((folder / "run_record.json").read_text())["checks"]
    assert checks["export: language model's LoRA"] == "28 tensors of 14 modules read back, same bits"
    assert checks["export: --max-lora-rank for vLLM"] == "8"  # of rank 4
    assert checks["export: vision features"] == "same bits after each of 3 layers"
    assert float(checks["as stored: largest logit difference"].split()[0]) < 1e-4
    shown = " ".join(capsys.readouterr().out.split())
    assert f"for vllm serve --enable-lora: model {folder}, adapter {folder / LANGUAGE_LORA}" in shown


@pytest.mark.parametrize("damage", ["another value", "no tensor"])
def test_another_adapter_than_the_one_that_learned_is_an_error(trained, tmp_path, monkeypatch, capsys, damage):
    write = export_vllm_lora.write_adapter

    def write_wrongly(folder, weights):
        write(folder, weights)
        path = folder / LANGUAGE_LORA / "adapter_model.safetensors"
        tensors = load_file(path)
        name = min(tensors)
        tensors[name] = tensors[name].nextafter(torch.tensor(9.0))
        save_file(dict(sorted(tensors.items())[damage == "no tensor" :]), path)

    monkeypatch.setattr(export_vllm_lora, "write_adapter", write_wrongly)
    flags = ["--adapter", trained, "--output_dir", tmp_path / "out", "--export", "vllm_lora"]
    error = fail(capsys, *flags)
    assert "adapter_model.safetensors" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["another value", "another factor", "no weights"])
def test_an_adapter_that_changed_since_is_noticed(exported, tmp_path, damage):
    """The factor of the LoRA is lora_alpha / r, so the configuration counts as the weights do."""
    assert check_weights(exported) == json.loads((exported / "run_record.json").read_text())["fingerprint"]
    folder = shutil.copytree(exported, tmp_path / "copied")
    assert check_weights(folder) == check_weights(exported)
    weights, config = (folder / LANGUAGE_LORA / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
    if damage == "another value":
        tensors = load_file(weights)
        tensors[min(tensors)].view(-1)[0] += 1e-3
        save_file(tensors, weights)
    elif damage == "another factor":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    else:
        weights.unlink()
    with pytest.raises(CheckpointError, match="copied: its weights are not those that it was written with"):
        check_weights(folder)


def test_a_siglip_tower_keeps_its_name(world, tmp_path):
    make_siglip(tmp_path / "tower")
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base")
    train.main(train_flags(world, tmp_path / "trained", model=base, max_steps=1))
    folder = export(tmp_path / "trained", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["vision_config"]["model_type"] == "siglip_vision_model"
    assert (folder / LANGUAGE_LORA).is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_variant": "dora"}, "holds DoRA (--lora_variant dora), expected lora or rslora"),
        ({"train_type": "projector"}, "holds no LoRA of the language model; merge it into the model"),
    ],
)
def test_what_cannot_be_served_so_is_refused_before_anything_is_written(world, tmp_path, capsys, changes, message):
    train.main(train_flags(world, tmp_path / "trained", max_steps=1, **changes))
    flags = ["--adapter", tmp_path / "trained", "--output_dir", tmp_path / "out", "--export", "vllm_lora"]
    error = fail(capsys, *flags)
    assert f"error: --export vllm_lora: {tmp_path / 'trained'} {message}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_a_rank_above_vllms_largest_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_vllm_lora, "RANKS", (1, 3))
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--export", "vllm_lora")
    assert "has rank 4, vLLM takes up to 3" in error


@pytest.mark.parametrize("load", [load_answerer, load_transformers_model])
def test_nobody_here_takes_the_base_without_its_adapter_for_the_model(exported, trained, load):
    with pytest.raises(UserError, match="what its language model learned is apart, in language_lora") as error:
        load(exported, device="cpu", dtype="float32")
    assert str(error.value).endswith(f"give what learned it (--adapter {trained})")


@pytest.mark.parametrize("read", [read_trained_record, identify_weights])
def test_the_adapter_for_vllm_is_none_of_ours(exported, trained, read):
    with pytest.raises(UserError) as error:
        read(exported / "language_lora")
    assert str(error.value).endswith(f"is for vLLM alone; give what learned it (--adapter {trained})")


def test_a_merged_model_is_told_from_what_it_was_merged_from(exported, trained):
    with pytest.raises(UserError, match="is a merged model, expected what learned it") as error:
        read_trained_record(exported)
    assert str(trained) in str(error.value)
