"""Settings of build_base_model.py and merge_lora.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meme_llava.cli import setting
from meme_llava.dataset.images import Resize

SHARD_HELP, SHARD_SIZE = "weight files are split at this size", "a whole number and KB, MB, GB or TB, such as 5GB"


@dataclass
class BuildArguments:
    language_model: str = setting("causal language model: folder, hub id, or modelscope:ORG/MODEL")
    vision_model: str = setting("Chinese-CLIP, CLIP or SigLIP: folder, hub id, or modelscope:ORG/MODEL")
    output_dir: Path = setting("where the assembled LLaVA goes")
    image_policy: Resize = setting(
        "how images become square: squash the whole, pad it, or crop it (cuts words off)", "squash"
    )
    seed: int = setting("draws the fresh multi_modal_projector", 0, expected="0 to 18446744073709551615")
    dtype: Literal["source", "float16", "bfloat16", "float32"] = setting(
        "source: every part keeps the dtype of its files", "source"
    )
    max_shard_size: str = setting(SHARD_HELP, "5GB", expected=SHARD_SIZE)
    verify: bool = setting("compare the written model with its sources", True)
    overwrite: bool = setting("replace a non-empty output_dir", False)


@dataclass
class MergeArguments:
    adapter: Path = setting("output_dir or checkpoint of train.py")
    output_dir: Path = setting("where the standalone model goes")
    dtype: Literal["float16", "bfloat16", "float32"] = setting("how it is stored", "float16")
    base_model: Path | None = setting("the base model, only if it moved since training", None)
    export: Literal["none", "clip", "vllm_lora", "gguf"] = setting(
        "clip: name a Chinese-CLIP tower as the CLIP tower it is, for vLLM; vllm_lora: the same, and keep the language "
        "model's LoRA apart for its --enable-lora; gguf: add files for llama.cpp and Ollama",
        "none",
    )
    max_shard_size: str = setting(SHARD_HELP, "5GB", expected=SHARD_SIZE)
    verify: bool = setting("compare the merged model with base + adapter", True)
    overwrite: bool = setting("replace a non-empty output_dir", False)
