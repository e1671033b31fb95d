"""Builds and merges of the tiny world, what they write, and towers of other kinds to build from."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LANGUAGE_DIMENSIONS, VISION_DIMENSIONS, reseal
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

import build_base_model
import merge_lora
from meme_llava.convert import merge as merging
from meme_llava.storage.run_record import holds_trained_weights
from meme_llava.terminal import format_bytes

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
# What a tiny language model of a kind needs beside the sizes of all.
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
LANGUAGE_MODELS = {
    # Every layer attends in a window, and there are no layer types.
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    # The second of two layers does.
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    "qwen3": {"head_dim": 16},
    # Without caps of logits, which LLaVA has not.
    "gemma2": {"head_dim": 16, "final_logit_softcapping": None},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], **LINEAR},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        **MAMBA,
    },
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 6,
    },
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


def make_language_config(model_type, **changes):
    """A language model's configuration of the tiny size, whatever its kind."""
    known = {**LANGUAGE_DIMENSIONS, "vocab_size": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return CONFIG_MAPPING[model_type](**known | LANGUAGE_MODELS.get(model_type, {}) | changes)


def save_language_model_of(world, folder, model_type, **changes):
    """A tiny language model of another kind, its matrices large enough that everything it does weighs something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_language_config(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.08)
    return save_language_model(model, world, folder)


def make_clip(folder, size=28):
    vision = {**VISION_DIMENSIONS, "image_size": size, "patch_size": 14}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT_TOWER, projection_dim=8))
    model.save_pretrained(folder)
    return model


def make_siglip(folder, size=28):
    vision = {**VISION_DIMENSIONS, "image_size": size, "patch_size": 14}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT_TOWER)).save_pretrained(folder)


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


def check_room_for_all(monkeypatch, capsys, output_dir, needed, *flags):
    """A merge asks for `needed` bytes before it writes the first one."""

    def write_nothing(*arguments):
        raise AssertionError("the merged model was begun")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_tensors", write_nothing)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
        error = fail(capsys, *flags, "--output_dir", output_dir, code=7)
        assert f"error: {output_dir}: needs {format_bytes(needed)}, the disk has " in error
        assert list(output_dir.parent.iterdir()) == []
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
        with pytest.raises(AssertionError, match="begun"):
            merge([str(flag) for flag in (*flags, "--output_dir", output_dir)])
