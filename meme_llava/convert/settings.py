"""Settings of build_base_model.py and merge_lora.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.images import Resize

DEFAULT_SHARD_SIZE = "5GB"


@dataclass
class BuildArguments:
    language_model: str = field(metadata=describe("causal language model: folder, hub id, or modelscope:ORG/MODEL"))
    vision_model: str = field(
        metadata=describe("Chinese-CLIP, CLIP or SigLIP: folder, hub id, or modelscope:ORG/MODEL")
    )
    output_dir: Path = field(metadata=describe("where the assembled LLaVA goes"))
    image_policy: Resize = field(
        default="squash",
        metadata=describe("how images become square: squash the whole, pad it, or crop it (cuts words off)"),
    )
    seed: int = field(default=0, metadata=describe("draws the fresh multi_modal_projector"))
    dtype: Literal["source", "float16", "bfloat16", "float32"] = field(
        default="source", metadata=describe("source: every part keeps the dtype of its files")
    )
    max_shard_size: str = field(default=DEFAULT_SHARD_SIZE, metadata=describe("weight files are split at this size"))
    verify: bool = field(default=True, metadata=describe("compare the written model with its sources"))
    overwrite: bool = field(default=False, metadata=describe("replace a non-empty output_dir"))

    def __post_init__(self) -> None:
        _check_shard_size(self)


@dataclass
class MergeArguments:
    adapter: Path = field(metadata=describe("output_dir or checkpoint of train.py"))
    output_dir: Path = field(metadata=describe("where the standalone model goes"))
    dtype: Literal["float16", "bfloat16", "float32"] = field(default="float16", metadata=describe("how it is stored"))
    base_model: Path | None = field(default=None, metadata=describe("the base model, only if it moved since training"))
    export: Literal["none", "clip"] = field(
        default="none",
        metadata=describe("clip: name a Chinese-CLIP tower as the CLIP tower it is, for serving engines"),
    )
    max_shard_size: str = field(default=DEFAULT_SHARD_SIZE, metadata=describe("weight files are split at this size"))
    verify: bool = field(default=True, metadata=describe("compare the merged model with base + adapter"))
    overwrite: bool = field(default=False, metadata=describe("replace a non-empty output_dir"))

    def __post_init__(self) -> None:
        _check_shard_size(self)


def _check_shard_size(arguments) -> None:
    is_size = re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)", arguments.max_shard_size) is not None
    check_setting(arguments, "max_shard_size", is_size, "a whole number and KB, MB, GB or TB, such as 5GB")
