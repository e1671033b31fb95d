"""The chain on the real Qwen tokenizer: a thin Qwen2 with the vocabulary of the 7B model."""

import json
import shutil

import pytest
import torch
from conftest import LANGUAGE_DIMENSIONS, SHARED_DATA, read_losses, train_flags
from transformers import Qwen2Config, Qwen2ForCausalLM

import build_base_model
import infer
import merge_lora
import train


@pytest.mark.long
def test_build_two_steps_merge_and_infer(world, tmp_path, capsys):
    source = SHARED_DATA / "qwen_tokenizer"
    if not source.is_dir():
        pytest.skip("the real Qwen tokenizer is not at hand")
    language_model, base, trained, merged = (tmp_path / name for name in ("qwen", "base", "trained", "merged"))
    torch.manual_seed(0)
    dimensions = {**LANGUAGE_DIMENSIONS, "hidden_size": 64}
    config = Qwen2Config(vocab_size=152_064, tie_word_embeddings=False, **dimensions)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(language_model)
    for file in source.iterdir():
        shutil.copy(file, language_model)
    sources = ["--language_model", str(language_model), "--vision_model", str(world.vision_tower)]
    build_base_model.main([*sources, "--output_dir", str(base)])
    train.main(train_flags(world, trained, model=base, max_steps=2, device_batch_size=1))
    assert read_losses(trained)[0] == pytest.approx(11.93, abs=0.1)  # ln 152,064: it knows nothing yet
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(merged)])
    capsys.readouterr()
    image = str(world.image_folder / "p0.png")
    infer.main(["--model", str(merged), "--image", image, "--max_new_tokens", "3", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] <= 3
    record = json.loads((merged / "run_record.json").read_text())
    assert record["training"]["settings"]["low_lr"] == 5e-3
    assert json.loads((merged / "config.json").read_text())["image_token_index"] == 151_665
