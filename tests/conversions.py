"""Builds and merges of the tiny world, what they write, and towers of other kinds to build from."""

import contextlib
from pathlib import Path

import pytest
from conftest import VISION_DIMENSIONS, reseal
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import build_base_model
import merge_lora
from meme_llava.storage.run_record import holds_trained_weights

BASE_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "run_record.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXT_TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 16,
}


def build(language_model, vision_model, output_dir, *more):
    flags = ["--language_model", language_model, "--vision_model", vision_model, "--output_dir", output_dir, *more]
    build_base_model.main([str(flag) for flag in flags])
    return output_dir


def save_language_model(model, world, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.language_model).save_pretrained(folder)
    return folder


def make_clip(folder, size=28):
    vision = {**VISION_DIMENSIONS, "image_size": size, "patch_size": 14}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT_TOWER, projection_dim=8))
    model.save_pretrained(folder)
    return model


def run_and_read_error(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        build(*arguments)
    assert stop.value.code == code
    return capsys.readouterr().err


class Bars:
    """Stands in for `show_bytes` and `show_count` of `terminal`: {title: [total, what was shown in all]}."""

    def __init__(self):
        self.shown = {}

    @contextlib.contextmanager
    def __call__(self, title, total):
        shown = self.shown[title] = [total, 0]

        def advance(count):
            shown[1] += count

        yield advance


def merge(flags):
    """merge_lora.py, on an adapter whose manifest knows of what a test did to it."""
    adapter = Path(flags[flags.index("--adapter") + 1])
    if holds_trained_weights(adapter):
        reseal(adapter)
    merge_lora.main(flags)


def fail(capsys, *flags, code=2):
    with pytest.raises(SystemExit) as stop:
        merge([str(flag) for flag in flags])
    assert stop.value.code == code
    return capsys.readouterr().err
