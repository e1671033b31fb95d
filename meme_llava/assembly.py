"""Knows how a language model and a vision tower become one LLaVA directory, and how to prove that nothing was lost."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ChineseCLIPVisionModel,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from meme_llava.conversation import IMAGE_PLACEHOLDER, TURN_END, TURN_START, Turn, make_chat_template
from meme_llava.errors import UserError
from meme_llava.images import ImagePolicy
from meme_llava.model import (
    Processing,
    count_image_tokens,
    has_class_token,
    load_llava,
    load_processing,
    load_strictly,
    quiet_transformers,
)
from meme_llava.weights import TensorFolder, check_same_names, save_tensors

# The features of the last layer but one, as LLaVA takes them: the last one is tuned for the contrastive loss.
VISION_FEATURE_LAYER = -2
VISION_MODEL_CLASSES = {
    "chinese_clip": ChineseCLIPVisionModel,
    "chinese_clip_vision_model": ChineseCLIPVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
# What a two-tower checkpoint holds beside its vision tower.
OTHER_TOWER_PREFIXES = ("text_model.", "logit_scale", "logit_bias", "text_projection", "visual_projection")
# How each family's published checkpoints normalise pixels, for folders without preprocessor_config.json: (mean, std).
CLIP_NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_NORMALISATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EMBEDDING_MULTIPLE = 64  # rows are added in multiples that matrix kernels like
PROOF_CHAT = [
    Turn("user", "你好！“加班使我快乐”是什么意思？"),
    Turn("assistant", "这是反话：其实一点也不快乐。😂"),
    Turn("user", "谢谢"),
    Turn("assistant", "不客气"),
]


@dataclass
class Parts:
    """The loaded ingredients of a LLaVA; the language model may have got embedding rows for new tokens."""

    language_model: nn.Module
    tokenizer: object
    vision_tower: nn.Module
    config: LlavaConfig
    image_processor: CLIPImageProcessorPil


def load_vision_tower(folder: Path) -> nn.Module:
    """The vision tower of a Chinese-CLIP, CLIP or SigLIP folder, two-tower or vision-only, in its stored dtype."""
    config = _load_config(folder)
    model_class = VISION_MODEL_CLASSES.get(config.model_type)
    if model_class is None:
        raise UserError(
            f"{folder}: is a {config.model_type!r} model, expected a vision tower of type "
            f"{', '.join(sorted(VISION_MODEL_CLASSES))}"
        )
    return load_strictly(model_class, folder, allowed_unexpected=OTHER_TOWER_PREFIXES, dtype="auto").eval()


def load_language_model(folder: Path) -> tuple[nn.Module, object]:
    """A causal language model in its stored dtype, and its tokenizer."""
    config = _load_config(folder)
    if config.model_type in VISION_MODEL_CLASSES or hasattr(config, "vision_config"):
        raise UserError(f"{folder}: is a {config.model_type!r} model, expected a causal language model")
    # Without it transformers falls back to a Llama tokenizer and a wrong prompt, without an error.
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: has no tokenizer_config.json; download the complete model folder")
    language_model = load_strictly(AutoModelForCausalLM, folder, dtype="auto").eval()
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    return language_model, tokenizer


def make_parts(language_folder: Path, vision_folder: Path) -> Parts:
    """Load both sources, add the control tokens, and describe the model they make."""
    vision_tower = load_vision_tower(vision_folder)
    language_model, tokenizer = load_language_model(language_folder)
    add_control_tokens(language_model, tokenizer)
    vision_config = vision_tower.config
    config = LlavaConfig(
        # LlavaConfig rewrites what it is given; the loaded models keep their own.
        vision_config=copy.deepcopy(vision_config),
        text_config=copy.deepcopy(language_model.config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=VISION_FEATURE_LAYER,
        # "default" drops the class token; SigLIP has none to drop.
        vision_feature_select_strategy="default" if has_class_token(vision_config) else "full",
        tie_word_embeddings=bool(language_model.config.tie_word_embeddings),
    )
    # The sources' folders on the builder's disk mean nothing to whoever gets the model.
    config.vision_config._name_or_path = config.text_config._name_or_path = ""
    config.pad_token_id = config.text_config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = config.text_config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.text_config.eos_token_id = tokenizer.eos_token_id
    config.image_seq_length = count_image_tokens(config)
    config.dtype = language_model.dtype
    config.architectures = [LlavaForConditionalGeneration.__name__]
    return Parts(language_model, tokenizer, vision_tower, config, _make_image_processor(vision_folder, vision_config))


def add_control_tokens(language_model: nn.Module, tokenizer) -> None:
    """Make sure that ChatML's tokens and `<image>` exist, each with an embedding row.

    Qwen2 lacks only `<image>`; its embedding has spare rows. For a model without ChatML (Llama) the end token starts
    as a copy of the model's own end-of-text token: until it is trained both are equally likely, and generation stops
    at either.
    """
    rows = language_model.get_input_embeddings().weight.shape[0]
    known = tokenizer.get_added_vocab()
    new_tokens = [token for token in (TURN_START, TURN_END, IMAGE_PLACEHOLDER) if token not in known]
    tokenizer.add_tokens(new_tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or TURN_END
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= rows:
        with quiet_transformers():
            language_model.resize_token_embeddings(
                largest_id + 1, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False
            )
    # Spare rows hold whatever the source's authors left there; `<image>`'s is never read, its features replace it.
    ends_text = tokenizer.eos_token_id
    copied_from = {TURN_END: ends_text, TURN_START: tokenizer.bos_token_id or ends_text}
    with torch.no_grad():
        for token in set(new_tokens) & set(copied_from):
            for embedding in {language_model.get_input_embeddings(), language_model.get_output_embeddings()}:
                embedding.weight[tokenizer.convert_tokens_to_ids(token)] = embedding.weight[copied_from[token]]


def write_llava(parts: Parts, folder: Path, seed: int) -> None:
    """Write weights (every tensor in the dtype of its source), config, tokenizer and processor to `folder`."""
    tensors = collect_tensors(parts, seed)
    save_tensors(tensors, folder)
    with quiet_transformers():
        parts.config.save_pretrained(folder)
        _make_generation_config(parts).save_pretrained(folder)
        make_processor(parts).save_pretrained(folder)
        # Readers before transformers 5 look for the image processor in a file of its own.
        parts.image_processor.save_pretrained(folder)
    _write_classic_rope_theta(folder / "config.json")


def collect_tensors(parts: Parts, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of the LLaVA under their names on disk; the projector is drawn from `seed`."""
    tensors = {}
    tied = parts.config.tie_word_embeddings
    for name, tensor in parts.language_model.base_model.state_dict().items():
        tensors[f"language_model.model.{name}"] = tensor
    if not tied:
        tensors["language_model.lm_head.weight"] = parts.language_model.get_output_embeddings().weight.detach()
    for name, tensor in parts.vision_tower.state_dict().items():
        tensors[f"vision_tower.vision_model.{name}"] = tensor
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in LlavaMultiModalProjector(parts.config).state_dict().items():
        fresh = torch.zeros_like(tensor, dtype=torch.float32)
        if name.endswith("weight"):
            fresh.normal_(std=parts.config.text_config.initializer_range, generator=generator)
        tensors[f"multi_modal_projector.{name}"] = fresh.to(parts.language_model.dtype)
    return tensors


def make_processor(parts: Parts) -> LlavaProcessor:
    """The processor that `AutoProcessor` gives back from the directory."""
    return LlavaProcessor(
        image_processor=parts.image_processor,
        tokenizer=parts.tokenizer,
        patch_size=parts.config.vision_config.patch_size,
        vision_feature_select_strategy=parts.config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if parts.config.vision_feature_select_strategy == "full" else 1,
        chat_template=make_chat_template(parts.tokenizer),
    )


@torch.no_grad()
def prove_llava(parts: Parts, folder: Path) -> list[tuple[str, str]]:
    """Load `folder` as a user would and compare it with its sources. Returns (check, finding) rows.

    Empties `parts` of the language model before loading, so that two copies never share the memory.

    Raises:
        UserError: a check failed.
    """
    # Half precision runs everywhere on the GPU, but not every CPU kernel takes float16; float32 holds it exactly.
    stored = parts.language_model.dtype
    dtype = torch.float32 if stored == torch.float16 else stored
    processing = load_processing(folder)
    text_ids = torch.tensor([processing.encoder.encode_example(PROOF_CHAT).input_ids])  # (1, length)
    pixel_values = _draw_test_pixels(parts.config.vision_config.image_size).to(dtype)
    # Only float16 is converted: module.to() would also round the rotary frequencies, which stay float32.
    language_model = parts.language_model if dtype == stored else parts.language_model.to(dtype)
    expected_logits = language_model(input_ids=text_ids).logits
    expected_features = _vision_features(parts.vision_tower.to(dtype), pixel_values)
    expected_names = {name for name in collect_tensors(parts, seed=0)}
    parts.language_model = language_model = None

    with TensorFolder(folder) as tensors:
        check_same_names(expected_names, tensors, str(folder))
    model = load_llava(folder, dtype).eval()
    logits = model(input_ids=text_ids).logits
    features = _vision_features(model.model.vision_tower, pixel_values)
    projected = model.get_image_features(pixel_values=pixel_values).pooler_output[0]
    question = Turn("user", f"{IMAGE_PLACEHOLDER}\n图里写了什么？")
    prompt_ids = torch.tensor([processing.encoder.encode_prompt([question])])
    image_tokens = int((prompt_ids == processing.encoder.image_token_id).sum())
    answer_logits = model(input_ids=prompt_ids, pixel_values=pixel_values).logits
    finite = bool(torch.isfinite(answer_logits).all())
    checks = [
        ("no tensor missing or unexpected", True, f"{len(expected_names)} tensors"),
        ("text-only logits equal the language model's", *_compare(logits, expected_logits)),
        ("vision features equal the vision tower's", *_compare(features, expected_features)),
        ("one <image> token per feature", len(projected) == image_tokens, f"{len(projected)} = {image_tokens}"),
        ("logits about a picture are finite", finite, str(tuple(answer_logits.shape))),
        ("config, tokenizer, processor agree on <image>", True, f"id {processing.encoder.image_token_id}"),
        _check_chat(processing),
        ("pictures", True, _describe_pictures(processing.image_policy)),
    ]
    failed = [f"{name} ({finding})" for name, passed, finding in checks if not passed]
    if failed:
        raise UserError(f"the assembled model differs from its sources: {'; '.join(failed)}")
    return [(name, finding) for name, _, finding in checks]


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


def _compare(found: torch.Tensor, expected: torch.Tensor) -> tuple[bool, str]:
    return torch.equal(found, expected), f"largest difference {(found - expected).abs().max().item():g}"


def _draw_test_pixels(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _load_config(folder: Path):
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it is no model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: config.json cannot be used: {error}") from error


def _make_image_processor(vision_folder: Path, vision_config) -> CLIPImageProcessorPil:
    path = vision_folder / "preprocessor_config.json"
    source = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    mean, std = CLIP_NORMALISATION if has_class_token(vision_config) else SIGLIP_NORMALISATION
    square = {"height": vision_config.image_size, "width": vision_config.image_size}
    return CLIPImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=source.get("image_mean", mean),
        image_std=source.get("image_std", std),
        resample=source.get("resample", Image.Resampling.BICUBIC),
    )


def _make_generation_config(parts: Parts) -> GenerationConfig:
    # Greedy: reading the words in a picture needs no luck. A repetition penalty, which Qwen2 ships, would garble
    # memes that repeat a character on purpose (哈哈哈哈).
    source = parts.language_model.generation_config.eos_token_id
    stops = [parts.tokenizer.convert_tokens_to_ids(TURN_END)]
    stops += [token for token in ([source] if isinstance(source, int) else source or []) if token not in stops]
    if parts.tokenizer.eos_token_id is not None and parts.tokenizer.eos_token_id not in stops:
        stops.append(parts.tokenizer.eos_token_id)
    return GenerationConfig(
        bos_token_id=parts.tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=parts.tokenizer.pad_token_id,
        do_sample=False,
    )


def _write_classic_rope_theta(config_file: Path) -> None:
    # transformers 5 writes rope_parameters only; 4.x reads rope_theta and silently falls back to 10,000.
    config = json.loads(config_file.read_text(encoding="utf-8"))
    rope = config["text_config"].get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
