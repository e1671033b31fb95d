"""Knows how to prove that an assembled model computes what its sources compute, also where memory is short."""

import gc
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from meme_llava.assembly import VISION_FEATURE_LAYER, Parts
from meme_llava.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.errors import UserError
from meme_llava.images import ImagePolicy
from meme_llava.model import Processing, load_processing, load_strictly, make_empty_model
from meme_llava.offloading import IN_MEMORY, OFFLOADED, fits_in_memory, offload_weights
from meme_llava.source_models import EMBEDDING, HEAD, OTHER_TOWER_PREFIXES, Source
from meme_llava.tensor_reader import open_model_tensors
from meme_llava.weights import check_same_names, find_stored, to_disk_name

PROOF_CHAT = [
    Turn("user", "你好！“加班使我快乐”是什么意思？"),
    Turn("assistant", "这是反话：其实一点也不快乐。😂"),
    Turn("user", "谢谢"),
    Turn("assistant", "不客气"),
]


@torch.inference_mode()
def verify_assembled(parts: Parts, folder: Path, dtype: torch.dtype | None) -> list[tuple[str, str]]:
    """Load `folder` as a user would and compare it with its sources.

    Args:
        dtype: the dtype that was asked for, which the sources are then rounded to; None if every part kept its own.

    Returns:
        (check, finding) rows.

    Raises:
        UserError: a check failed.
    """
    stored_dtype = dtype or parts.language_model.dtype
    # Half precision runs everywhere on the GPU, but not every CPU kernel takes float16; float32 holds it exactly.
    compute_dtype = torch.float32 if stored_dtype == torch.float16 else stored_dtype
    processing = load_processing(folder)
    # Plain text: a source without ChatML has no rows for its tokens.
    text_ids = torch.tensor([processing.encoder.encode_text("".join(turn.text for turn in PROOF_CHAT))])  # (1, length)
    pixel_values = _draw_test_pixels(parts.config.vision_config.image_size).to(compute_dtype)
    expected_logits = _open_source(parts.language_model, dtype, compute_dtype)(input_ids=text_ids).logits
    gc.collect()
    expected_features = _vision_features(_open_source(parts.vision_tower, dtype, compute_dtype), pixel_values)

    with open_model_tensors(folder) as tensors:
        empty = make_empty_model(LlavaForConditionalGeneration, parts.config, compute_dtype)
        tied = parts.config.tie_word_embeddings
        expected_names = {to_disk_name(name) for name in empty.state_dict() if not (tied and name == HEAD)}
        check_same_names(expected_names, tensors, str(folder))
        if fits_in_memory(tensors, compute_dtype):
            model, way = load_strictly(LlavaForConditionalGeneration, folder, dtype=compute_dtype), IN_MEMORY
        else:
            model = offload_weights(empty, lambda name: tensors.read(find_stored(tensors, name)))
            way = OFFLOADED
        logits = model(input_ids=text_ids).logits
        features = _vision_features(model.model.vision_tower, pixel_values)
        projected = model.get_image_features(pixel_values=pixel_values).pooler_output[0]
        question = Turn("user", f"{IMAGE_PLACEHOLDER}\n图里写了什么？")
        prompt_ids = torch.tensor([processing.encoder.encode_prompt([question])])
        image_tokens = int((prompt_ids == processing.encoder.image_token_id).sum())
        answer_logits = model(input_ids=prompt_ids, pixel_values=pixel_values, logits_to_keep=1).logits
    # Rows that new tokens took, and rows behind the source's own, have nothing to be compared with.
    compared = [row for row in range(expected_logits.shape[-1]) if row not in parts.copied_rows]
    logits, expected_logits = logits[..., compared], expected_logits[..., compared]
    checks = [
        ("the models ran", True, way),
        ("no tensor missing or unexpected", True, f"{len(expected_names)} tensors"),
        ("text-only logits equal the language model's", *_compare_bits(logits, expected_logits)),
        ("vision features equal the vision tower's", *_compare_bits(features, expected_features)),
        ("one <image> token per feature", len(projected) == image_tokens, f"{len(projected)} = {image_tokens}"),
        (
            "logits about a picture are finite",
            bool(torch.isfinite(answer_logits).all()),
            str(tuple(answer_logits.shape)),
        ),
        ("config, tokenizer, processor agree on <image>", True, f"id {processing.encoder.image_token_id}"),
        _check_chat(processing),
        ("pictures", True, _describe_pictures(processing.image_policy)),
    ]
    failed = [f"{name} ({finding})" for name, passed, finding in checks if not passed]
    if failed:
        raise UserError(f"the assembled model differs from its sources: {'; '.join(failed)}")
    return [(name, finding) for name, _, finding in checks]


def _open_source(source: Source, dtype: torch.dtype | None, compute_dtype: torch.dtype) -> nn.Module:
    """A source as transformers runs it, its weights rounded to `dtype` where one was asked for."""
    dtype = dtype or source.dtype
    if fits_in_memory(source.tensors, compute_dtype):
        model = load_strictly(source.model_class, source.folder, OTHER_TOWER_PREFIXES, dtype=dtype).eval()
        # Only parameters: module.to() would also round the rotary frequencies, which stay float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(compute_dtype)
        return model

    def read(name: str) -> torch.Tensor:
        # A tied head has no tensor of its own.
        return source.tensors.read_as(source.stored_names[name if name in source.stored_names else EMBEDDING], dtype)

    return offload_weights(make_empty_model(source.model_class, source.config, compute_dtype), read)


def _check_chat(processing: Processing) -> tuple[str, bool, str]:
    roles = {"user": "user", "assistant": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in PROOF_CHAT]
    templated = processing.processor.apply_chat_template(messages, tokenize=False)
    ids = processing.encoder.encode_example(PROOF_CHAT).input_ids
    decoded = processing.tokenizer.decode(ids, skip_special_tokens=False)
    survives = all(turn.text in decoded for turn in PROOF_CHAT) and templated.rstrip("\n") == decoded
    return "a Chinese chat round-trips through the template", survives, f"{len(ids)} tokens"


def _describe_pictures(policy: ImagePolicy) -> str:
    mean, std = (" ".join(f"{value:.2f}" for value in values) for values in (policy.mean, policy.std))
    return f"whole, {policy.size} x {policy.size}\nmean {mean}\nstd {std}"


def _vision_features(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return tower(pixel_values, output_hidden_states=True).hidden_states[VISION_FEATURE_LAYER]


def _compare_bits(found: torch.Tensor, expected: torch.Tensor) -> tuple[bool, str]:
    return torch.equal(found, expected), f"largest difference {(found - expected).abs().max().item():g}"


def _draw_test_pixels(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
