"""Build proves that records can share a row, and refuses language models whose records would learn from each other."""

import json

import pytest
from conversions import build, run_and_read_error, save_language_model_of

from meme_llava.model import offloading, packed_attention, packed_llava


def read_proof(base):
    return json.loads((base / "run_record.json").read_text())["checks"]["a packed row equals its records"]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        *((name, "") for name in ("mistral", "phi3", "qwen2", "gemma3_text", "qwen3")),
        ("lfm2", "layers of type conv"),
        ("stablelm", "attention layers that are not told how a row is packed"),
        pytest.param("falcon_h1", "layers of type hybrid", marks=pytest.mark.long),
        pytest.param("qwen3_5_text", "layers of type linear_attention", marks=pytest.mark.long),
        pytest.param("bamba", "layers of type linear_attention", marks=pytest.mark.long),
        pytest.param("granitemoehybrid", "layers of type linear_attention", marks=pytest.mark.long),
    ],
)
def test_packing_is_proved_and_what_cannot_be_packed_is_said(world, tmp_path, capsys, model_type, words):
    folder = save_language_model_of(world, tmp_path / model_type, model_type)
    proof = read_proof(build(folder, world.vision_tower, tmp_path / "base"))
    assert float(proof.removeprefix("largest difference ")) < 1e-5
    said = f"records train one by one, without shared images: the language model has {words}\n"
    assert (said in capsys.readouterr().out) == bool(words)
    build(folder, world.vision_tower, tmp_path / "again", "--no_verify")
    assert (said in capsys.readouterr().out) == bool(words)


def test_convolutions_are_compared_layer_by_layer_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "measure_available_memory", lambda: 0)
    folder = save_language_model_of(world, tmp_path / "lfm2", "lfm2")
    base = build(folder, world.vision_tower, tmp_path / "base")
    checks = json.loads((base / "run_record.json").read_text())["checks"]
    assert checks["the models ran"] == "layer by layer from the disk"


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("lfm2", "its language model (lfm2, layers: conv, full_attention) computes something else in a packed row"),
        ("stablelm", "the language model's StableLmAttention is not told how its row is packed"),
        ("gemma2", "the language model's Gemma2Attention asks for softcap"),
    ],
)
def test_a_leak_is_refused_with_its_layers(world, tmp_path, monkeypatch, capsys, model_type, message):
    """As of a language model that no list knows."""
    monkeypatch.setattr(packed_llava, "find_obstacle", lambda text_config: "")
    folder = save_language_model_of(world, tmp_path / model_type, model_type)
    error = run_and_read_error(capsys, folder, world.vision_tower, tmp_path / "base")
    assert message in error and str(folder) in error
    assert [path.name for path in tmp_path.iterdir()] == [model_type]


def test_a_model_that_does_not_run_is_refused(world, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("an odd layer\nand more")

    monkeypatch.setattr(packed_llava.PackedLlava, "run_language_model", fail)
    error = run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "base")
    assert "does not run as others do (RuntimeError: an odd layer); take a language model of plain causal" in error


def test_a_window_of_another_length_is_refused(world, tmp_path, monkeypatch, capsys):
    make_mask = packed_attention._make_mask
    longer = lambda length, keys, window, device: make_mask(length, keys, window and window + 1, device)  # noqa: E731
    monkeypatch.setattr(packed_attention, "_make_mask", longer)
    folder = save_language_model_of(world, tmp_path / "mistral", "mistral")
    error = run_and_read_error(capsys, folder, world.vision_tower, tmp_path / "base")
    assert "its language model (mistral, layers: attention) computes something else in a packed row" in error
