"""Which language models cannot train in packed rows, as far as their configuration tells."""

import pytest
from conversions import make_language_config

from meme_llava.model.packing import find_obstacle


@pytest.mark.parametrize(
    ("model_type", "obstacle"),
    [
        *[(model_type, "") for model_type in ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma3_text", "olmo2")],
        ("lfm2", "layers of type conv"),
        ("qwen3_5_text", "layers of type linear_attention"),
        ("granitemoehybrid", "layers of type linear_attention"),
        ("bamba", "layers of type linear_attention"),
        ("jamba", "layers of type linear_attention"),
        ("falcon_h1", "layers of type hybrid"),
        ("llama4_text", "layers of type chunked_attention"),
        ("gemma2", "capped attention scores"),
        ("gpt_oss", "attention sinks"),
        ("doge", "a mask of its own"),
        ("stablelm", "attention layers that are not told how a row is packed"),
        ("nemotron", "attention layers that are not told how a row is packed"),
    ],
)
def test_what_keeps_records_from_sharing_a_row(model_type, obstacle):
    assert find_obstacle(make_language_config(model_type)) == obstacle
