"""The folders a LLaVA is assembled from: which models they may hold, and that every tensor is there and fits."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ChineseCLIPVisionModel,
    CLIPVisionModel,
    SiglipVisionModel,
)

from meme_llava.errors import UserError
from meme_llava.model.llava import check_same_names, check_same_shapes, check_vocabulary, check_words, make_empty_model
from meme_llava.model.loading import LOCALLY, explain_unloadable
from meme_llava.storage.tensor_files import StoredTensor, open_model_tensors

# By model type; that of a vision-only checkpoint ends with VISION_ONLY.
VISION_MODEL_CLASSES = {"chinese_clip": ChineseCLIPVisionModel, "clip": CLIPVisionModel, "siglip": SiglipVisionModel}
VISION_ONLY = "_vision_model"
# In a two-tower checkpoint the vision tower's names begin so, and these are the others'.
VISION_PREFIX = "vision_model."
OTHER_TOWER_PREFIXES = ("text_model.", "logit_scale", "logit_bias", "text_projection", "visual_projection")
# Buffers that older checkpoints store and transformers computes.
COMPUTED_BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Source:
    """A model folder: its configuration, and its tensors by the names that transformers gives them in memory."""

    folder: Path
    model_class: type
    config: object
    tensors: dict[str, StoredTensor]  # in the order of the files

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings, which is the folder's dtype unless its parts differ."""
        return next(stored.dtype for _, stored in sorted(self.tensors.items()) if len(stored.shape) > 1)

    @property
    def has_tied_head(self) -> bool:
        """Whether the head is the embedding, and has no tensor of its own."""
        return bool(getattr(self.config, "tie_word_embeddings", False))


def open_vision_tower(folder: Path) -> Source:
    """The vision tower of a Chinese-CLIP, CLIP or SigLIP folder, two-tower or vision-only."""
    config = _load_config(folder)
    model_class = VISION_MODEL_CLASSES.get(config.model_type.removesuffix(VISION_ONLY))
    if model_class is None:
        raise UserError(
            f"{folder}: is a {config.model_type!r} model, expected a vision tower of type "
            f"{', '.join(sorted(VISION_MODEL_CLASSES))}"
        )
    tensors = open_model_tensors(folder)
    # A vision-only checkpoint may or may not begin its names so, depending on the release that wrote it.
    prefix = VISION_PREFIX if any(name.startswith(VISION_PREFIX) for name in tensors) else ""
    own = {n.removeprefix(prefix): stored for n, stored in tensors.items() if not n.startswith(OTHER_TOWER_PREFIXES)}
    return _check_source(Source(folder, model_class, getattr(config, "vision_config", config), own))


def open_language_model(folder: Path) -> tuple[Source, object]:
    """A causal language model and its tokenizer."""
    config = _load_config(folder)
    if config.model_type.removesuffix(VISION_ONLY) in VISION_MODEL_CLASSES or hasattr(config, "vision_config"):
        raise UserError(f"{folder}: is a {config.model_type!r} model, expected a causal language model")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{folder}: is quantised; give the model it was made from, in bfloat16 or float16")
    # Without it transformers falls back to a Llama tokenizer and a wrong prompt, without an error.
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: has no tokenizer_config.json; download the complete model folder")
    check_vocabulary(folder)
    with explain_unloadable(folder, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCALLY)
    check_words(tokenizer, folder)
    # A tokenizer may have been saved in the middle of somebody's work. Programs that read its file would cut prompts.
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return _check_source(Source(folder, AutoModelForCausalLM, config, open_model_tensors(folder))), tokenizer


def _check_source(source: Source) -> Source:
    """Hold names, shapes and dtypes against the model that transformers makes of the configuration."""
    with explain_unloadable(source.folder, "config.json makes no model"):
        expected = make_empty_model(source.model_class, source.config).state_dict()
    if source.model_class is AutoModelForCausalLM:
        _check_supported(source, expected)
    if source.has_tied_head:
        expected.pop(HEAD, None)
        _drop_tied_head(source)
    for name in [name for name in source.tensors if name.endswith(COMPUTED_BUFFERS) and name not in expected]:
        del source.tensors[name]
    check_same_names(expected, source.tensors, str(source.folder))
    check_same_shapes(expected, source.tensors)
    for name, stored in source.tensors.items():
        if stored.dtype not in FLOAT_DTYPES:
            raise UserError(f"{stored.path}: {name} is {stored.dtype}, expected float32, float16 or bfloat16")
    return source


def _check_supported(source: Source, expected: Iterable[str]) -> None:
    """Raise UserError for a language model whose tensors have other names and meanings than the rest of us takes."""
    if EMBEDDING not in expected:
        reason = f"without {EMBEDDING}"
    elif not any(".self_attn." in name for name in expected):
        reason = "without attention"
    elif any(".experts." in name for name in expected):
        reason = "with experts"
    else:
        return
    raise UserError(
        f"{source.folder}: a {source.config.model_type!r} language model is not supported ({reason}); expected one "
        "with the layers of Llama and Qwen2, such as llama, qwen2, qwen3 or mistral"
    )


def _drop_tied_head(source: Source) -> None:
    """Leave out a head that repeats the embedding to which it is tied. Raises UserError where it is another one."""
    head, embedding = source.tensors.pop(HEAD, None), source.tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not all(map(torch.equal, head.make_pieces(), embedding.make_pieces())):
        raise UserError(
            f"{head.path}: holds a {HEAD} other than the embedding, to which config.json ties the head. Set "
            "tie_word_embeddings to false in config.json, or take the tensor out"
        )


def _load_config(folder: Path):
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it is not a model folder")
    with explain_unloadable(folder, "config.json cannot be used"):
        return AutoConfig.from_pretrained(folder, **LOCALLY)
