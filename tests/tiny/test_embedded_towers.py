"""The embedded towers of data/tiny are whole and small, know their alphabet, and build a model."""

import json

import torch
from conftest import ROOT
from meme_lines import list_alphabet  # noqa: E402
from transformers import AutoTokenizer

import build_base_model
from meme_llava.model.llava import load_llava

TINY = ROOT / "data" / "tiny"
TOWERS = TINY / "language_model", TINY / "vision_tower"


def test_they_are_the_files_a_hub_has_and_stay_small():
    files = {f"{tower.name}/{path.name}" for tower in TOWERS for path in tower.iterdir()}
    assert files == {
        "language_model/config.json",
        "language_model/generation_config.json",
        "language_model/model.safetensors",
        "language_model/tokenizer.json",
        "language_model/tokenizer_config.json",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    }
    assert sum(path.stat().st_size for tower in TOWERS for path in tower.iterdir()) < 30e6


def test_every_character_of_the_alphabet_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(TOWERS[0])
    alphabet = list_alphabet()
    assert len(alphabet) == 169
    assert [character for character in alphabet if len(tokenizer.encode(character)) != 1] == []
    assert tokenizer.decode(tokenizer.encode(alphabet)) == alphabet


def test_a_model_is_built_from_them(tmp_path):
    language_model, vision_tower = map(str, TOWERS)
    flags = ["--language_model", language_model, "--vision_model", vision_tower, "--output_dir", str(tmp_path / "base")]
    build_base_model.main(flags)
    model = load_llava(tmp_path / "base", torch.float32).model
    towers = model.language_model, model.vision_tower
    assert sum(weight.numel() for tower in towers for weight in tower.parameters()) < 15e6


def test_how_they_were_made_names_no_place_on_a_machine():
    settings = json.loads((TINY / "run_record.json").read_text(encoding="utf-8"))["settings"]
    assert settings["model"] == "output/pretrain/fluent/merged"
    assert settings["towers"] == "output/pretrain/copies/random"
