"""The proof that an assembled model computes what its sources compute, also where memory is short."""

import contextlib
import gc
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from meme_llava.convert.build import VISION_FEATURE_LAYER, Parts
from meme_llava.convert.packing_check import prove_packing
from meme_llava.convert.towers import EMBEDDING, OTHER_TOWER_PREFIXES, Source
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.errors import UserError
from meme_llava.model.llava import Processing, check_same_names, find_stored, load_processing, make_empty_model
from meme_llava.model.loading import load_strictly
from meme_llava.model.offloading import IN_MEMORY, OFFLOADED, fits_in_memory, offload_weights, report_layers
from meme_llava.storage.tensor_files import open_model_tensors
from meme_llava.terminal import show_count

# Of a norm. Rounding to float16 and bfloat16 stays well below, a tensor in another's place does not.
MAX_ROUNDING_DIFFERENCE = 0.1
PROOF_CHAT = [
    Turn("user", "你好！“加班使我快乐”是什么意思？"),
    Turn("assistant", "这是反话：其实一点也不快乐。😂"),
    Turn("user", "谢谢"),
    Turn("assistant", "不客气"),
]


@torch.inference_mode()
def verify_assembled(parts: Parts, folder: Path, dtype: torch.dtype | None) -> list[tuple[str, str]]:
    """Load `folder` as a user would and compare it with its sources. Raises UserError where a check failed.

    What was not rounded must be the same to the bit; what was may differ by MAX_ROUNDING_DIFFERENCE.

    Args:
        dtype: the dtype that was asked for; None if every part kept its own.

    Returns:
        (check, finding) rows.
    """
    stored_dtype = dtype or parts.language_model.dtype
    text_is_rounded, vision_is_rounded = (_is_rounded(one, dtype) for one in (parts.language_model, parts.vision_tower))
    # Half precision runs everywhere on the GPU, but not every CPU kernel takes float16; float32 holds it exactly.
    needs_float32 = stored_dtype == torch.float16 or text_is_rounded or vision_is_rounded
    compute_dtype = torch.float32 if needs_float32 else stored_dtype
    processing = load_processing(folder)
    # Plain text: a source without ChatML has no rows for its tokens.
    text_ids = torch.tensor([processing.encoder.encode_text("".join(turn.text for turn in PROOF_CHAT))])  # (1, length)
    size = parts.config.vision_config.image_size
    pixel_values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(compute_dtype)
    question = Turn("user", f"{IMAGE_PLACEHOLDER}\n图里写了什么？")
    prompt_ids = torch.tensor([processing.encoder.encode_prompt([question])])  # (1, length)

    tensors = open_model_tensors(folder)
    empty = make_empty_model(LlavaForConditionalGeneration, parts.config, compute_dtype)
    expected_names = {find_stored(tensors, name) for name in empty.state_dict()}
    check_same_names(expected_names, tensors, str(folder))
    fits = fits_in_memory(tensors, compute_dtype)
    ignore = contextlib.nullcontext(lambda count: None)
    # The language model runs once by itself and twice in the assembled one; that is nearly all of the work.
    passed_layers = 3 * parts.config.text_config.num_hidden_layers
    with ignore if fits else show_count("comparing layers", passed_layers) as advance:
        language_model = _open_source(parts.language_model, compute_dtype, fits)
        report_layers(language_model, advance)
        expected_logits = language_model(input_ids=text_ids).logits
        del language_model
        gc.collect()
        vision_tower = _open_source(parts.vision_tower, compute_dtype, fits)
        expected_features = _vision_features(vision_tower, pixel_values)
        if fits:
            model = load_strictly(LlavaForConditionalGeneration, folder, dtype=compute_dtype)
        else:
            model = offload_weights(empty, lambda name: tensors[find_stored(tensors, name)].load(compute_dtype))
        report_layers(model, advance)
        logits = model(input_ids=text_ids).logits
        features = _vision_features(model.model.vision_tower, pixel_values)
        projected = model.get_image_features(pixel_values=pixel_values).pooler_output[0]
        answer_logits = model(input_ids=prompt_ids, pixel_values=pixel_values, logits_to_keep=1).logits
    image_tokens = int((prompt_ids == processing.encoder.image_token_id).sum())
    is_finite = bool(torch.isfinite(answer_logits).all())
    # Rows that new tokens took, and rows after the source's own, have nothing to be compared with.
    compared = [row for row in range(expected_logits.shape[-1]) if row not in parts.copied_rows]
    logits, expected_logits = logits[..., compared], expected_logits[..., compared]
    policy = processing.image_policy
    mean, std = (" ".join(f"{value:.2f}" for value in values) for values in (policy.mean, policy.std))
    checks = [
        ("the models ran", True, IN_MEMORY if fits else OFFLOADED),
        ("no tensor missing or unexpected", True, f"{len(expected_names)} tensors"),
        ("text-only logits equal the language model's", *_compare(logits, expected_logits, text_is_rounded)),
        ("vision features equal the vision tower's", *_compare(features, expected_features, vision_is_rounded)),
        ("one <image> token per feature", len(projected) == image_tokens, f"{len(projected)} = {image_tokens}"),
        ("logits about an image are finite", is_finite, str(tuple(answer_logits.shape))),
        ("config, tokenizer, processor agree on <image>", True, f"id {processing.encoder.image_token_id}"),
        _check_chat(processing),
        ("images", True, f"{policy.resize} to {policy.size} x {policy.size}\nmean {mean}\nstd {std}"),
    ]
    failed = [f"{name} ({finding})" for name, passed, finding in checks if not passed]
    if failed:
        advice = ". Store it with --dtype bfloat16 or float32" if dtype == torch.float16 else ""
        raise UserError(f"the assembled model differs from its sources: {'; '.join(failed)}{advice}")
    packing = prove_packing(parts.config, tensors, policy, str(parts.language_model.folder))
    return [*((name, finding) for name, _, finding in checks), ("a packed row equals its records", packing)]


def _is_rounded(source: Source, dtype: torch.dtype | None) -> bool:
    """Whether the dtype that was asked for cannot hold every value of a source."""
    return dtype is not None and any(torch.promote_types(one.dtype, dtype) != dtype for one in source.tensors.values())


def _open_source(source: Source, dtype: torch.dtype, fits: bool) -> nn.Module:
    """A source as transformers runs it."""
    if fits:
        return load_strictly(source.model_class, source.folder, OTHER_TOWER_PREFIXES, dtype=dtype).eval()
    empty = make_empty_model(source.model_class, source.config, dtype)
    # A tied head has no tensor of its own.
    return offload_weights(empty, lambda name: (source.tensors.get(name) or source.tensors[EMBEDDING]).load(dtype))


def _check_chat(processing: Processing) -> tuple[str, bool, str]:
    messages = [{"role": turn.role, "content": turn.text} for turn in PROOF_CHAT]
    templated = processing.processor.apply_chat_template(messages, tokenize=False)
    ids = processing.encoder.encode_tokens(PROOF_CHAT).ids.tolist()
    decoded = processing.tokenizer.decode(ids, skip_special_tokens=False)
    survives = all(turn.text in decoded for turn in PROOF_CHAT) and templated.rstrip("\n") == decoded
    return "a Chinese chat round-trips through the template", survives, f"{len(ids)} tokens"


def _vision_features(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return tower(pixel_values, output_hidden_states=True).hidden_states[VISION_FEATURE_LAYER]


def _compare(found: torch.Tensor, expected: torch.Tensor, is_rounded: bool) -> tuple[bool, str]:
    if not is_rounded:
        return torch.equal(found, expected), f"largest difference {(found - expected).abs().max().item():g}"
    share = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
    return share <= MAX_ROUNDING_DIFFERENCE, f"differ by {share:.2%} (limit {MAX_ROUNDING_DIFFERENCE:.0%})"
