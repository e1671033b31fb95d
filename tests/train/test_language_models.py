"""Language models whose records cannot share a row: planned, trained, merged, and said."""

import json

import pytest
from conftest import train_flags
from conversions import build, save_language_model_of

import merge_lora
import train


@pytest.mark.parametrize(
    ("model_type", "train_type", "words"),
    [
        ("stablelm", "lora", "attention layers that are not told how a row is packed"),
        # The types of its layers are computed from their number, which a plan changes.
        pytest.param("bamba", "full", "layers of type linear_attention", marks=pytest.mark.long),
        pytest.param("falcon_h1", "lora", "layers of type hybrid", marks=pytest.mark.long),
    ],
)
def test_records_train_one_by_one_and_it_is_said(world, tmp_path, capsys, model_type, train_type, words):
    folder = save_language_model_of(world, tmp_path / model_type, model_type)
    base, out = build(folder, world.vision_tower, tmp_path / "base"), tmp_path / "out"
    flags = train_flags(world, out, model=base, train_type=train_type, max_steps=2, device_batch_size=4)
    said = f"records train one by one, without shared images: the language model has {words}"
    capsys.readouterr()
    train.main([*flags, "--plan", "--accelerator", "a800-80gb", "--gpus", "1"])
    assert said in " ".join(capsys.readouterr().out.split())
    train.main([*flags, "--show_batch"])
    assert capsys.readouterr().out.startswith(f"{said}\na device batch of ")
    train.main(flags)
    assert said in " ".join(capsys.readouterr().out.split())
    # No image was shared: as many were encoded as records have.
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0]["images_per_caption"] == pytest.approx(1, abs=0.5)
    # The shorter ones of a device batch were filled up to the longest.
    assert 0.3 < log[0]["useful_token_share"] < 1
    merge_lora.main(["--adapter", str(out), "--output_dir", str(tmp_path / "merged")])
