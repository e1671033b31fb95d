"""A merged model for llama.cpp and Ollama: language model and vision tower as GGUF files, and a Modelfile."""

import json
import math
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import torch

from meme_llava.dataset.conversation import DEFAULT_SYSTEM, TURN_END, TURN_START, make_chat_template, starts_with_bos
from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.model.llava import (
    LANGUAGE_MODEL,
    PROJECTOR,
    Processing,
    count_used_vision_layers,
    has_class_token,
    is_unused_vision_parameter,
    load_processing,
    open_llava_tensors,
    role_of,
)
from meme_llava.storage.files import write_whole
from meme_llava.storage.gguf_files import ARCHITECTURE, GgufFile, import_gguf
from meme_llava.terminal import show_bytes

LANGUAGE_FILE, VISION_FILE, MODELFILE = "language.gguf", "mmproj.gguf", "Modelfile"
FILE_KINDS = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
TOWERS = ("chinese_clip_vision_model", "clip_vision_model", "siglip_vision_model")
# How Qwen2 and Qwen3 split text before merges are looked up; llama.cpp has it by the name "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp has only the approximation by tanh, which is within 0.0005 of the exact function.
GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
# llama.cpp pads with CLIP's mean, whatever the file says.
PAD_COLOUR = (122, 116, 104)
OLLAMA_POSITIONS = 4096  # less than its models may have: it takes memory for all of them
# llama-server hands images over as marks such as <__media_X7g__>, with other letters each time, among the text of a
# message. Training has them in front, each with a line break behind.
CONTENT = "{{ message['content'] }}"
MARKED_CONTENT = (
    "{% for part in message['content'].split('<__media_') %}"
    "{% if not loop.first %}{{ '<__media_' + part.split('__>')[0] + '__>\n' }}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'].split('<__media_') %}"
    "{{ part if loop.first else part.split('__>', 1)[1] }}"
    "{% endfor %}"
)
# Ollama puts [img-0] in front of the text, then [img-1], and so on, without line breaks.
OLLAMA_TEMPLATE = (
    '{{ define "content" }}{{ if and (ge (len .) 7) (eq (slice . 0 5) "[img-") (eq (slice . 6 7) "]") }}'
    '{{ slice . 0 7 }}\n{{ template "content" (slice . 7) }}{{ else }}{{ . }}{{ end }}{{ end }}'
    '{{ if ne (index .Messages 0).Role "system" }}'
    f"{TURN_START}system\n{DEFAULT_SYSTEM}{TURN_END}\n"
    "{{ end }}{{ range .Messages }}"
    f"{TURN_START}{{{{ .Role }}}}\n"
    '{{ template "content" .Content }}'
    f"{TURN_END}\n"
    "{{ end }}"
    f"{TURN_START}assistant\n"
)
CLASS_TOKEN_WARNING = (
    "llama.cpp puts the class token of CLIP towers in the wrong place, up to b11549 at least "
    "(https://github.com/ggml-org/llama.cpp/issues/25814): of 400 answers about data/unseen 344 were the same there, "
    "and 320 were right in place of 342. SigLIP towers are not affected."
)
PADDING_WARNING = (
    "llama.cpp resizes an image before it pads it, and training pads it first: pixels along the image's edges differ"
)


def check_base(base_folder: Path) -> None:
    """Raise UserError unless llama.cpp can compute what this base computes. What it gets wrong is said as a warning."""
    import_gguf()
    processing = load_processing(base_folder)
    for what, found, expected in _list_requirements(processing):
        if found not in expected:
            raise UserError(
                f"--export gguf: {what} of {base_folder} is {found!r}, expected {' or '.join(map(repr, expected))}. "
                "Files for llama.cpp are made of nothing else; leave --export out, docs/serving.md has other servers"
            )
    warnings = [CLASS_TOKEN_WARNING] * has_class_token(processing.config.vision_config)
    warnings += [PADDING_WARNING] * (processing.image_policy.resize == "pad")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def count_bytes(base_folder: Path, dtype: torch.dtype) -> int:
    """What the tensors of the two GGUF files take on disk, of a model that is merged in `dtype`."""
    config, tensors = load_processing(base_folder).config, open_llava_tensors(base_folder)
    used = {name: stored.shape for name, stored in tensors.items() if not is_unused_vision_parameter(name, config)}
    return sum(math.prod(shape) * _choose_dtype(name, shape, dtype).itemsize for name, shape in used.items())


def write(folder: Path) -> None:
    """Add the three files to the folder of a merged model."""
    files = _describe(folder)
    with show_bytes("writing GGUF", sum(file.nbytes for file in files)) as advance:
        for file in files:
            file.write(advance)
    write_whole(folder / MODELFILE, _make_modelfile(load_processing(folder).config.text_config.max_position_embeddings))


def verify(base_folder: Path, folder: Path) -> list[tuple[str, str]]:
    """Read the files back and compare every setting, and every bit of every tensor, with the merged model.

    Returns (check, finding) rows. Raises UserError where one differs.
    """
    files = _describe(folder)
    for file in files:
        if wrong := file.list_differences():
            raise UserError(f"{file.path}: its {wrong[0]} is not the merged model's; report this as a bug")
    counts = {file.path.name: f"{len(file.settings)} settings and {len(file.tensors)} tensors" for file in files}
    return [(f"export: {name}", f"{count} read back, same bits") for name, count in counts.items()]


def _list_requirements(processing: Processing) -> Iterator[tuple[str, object, tuple]]:
    """(what, as a base has it, as llama.cpp and this export take it); later ones may need that earlier ones hold."""
    config, policy, tokenizer = processing.config, processing.image_policy, _read_tokenizer(processing)
    text, vision = config.text_config, config.vision_config
    yield "text_config.model_type", text.model_type, ("qwen2", "qwen3")
    yield "text_config.hidden_act", text.hidden_act, ("silu",)
    yield "text_config.attention_bias", getattr(text, "attention_bias", False), (False,)
    yield "text_config.layer_types", sorted(set(text.layer_types)), (["full_attention"],)
    yield "text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], ("default",)
    yield "the normalizer in tokenizer.json", (tokenizer["normalizer"] or {}).get("type"), ("NFC", None)
    splits = [
        step["pattern"] for step in (tokenizer["pre_tokenizer"] or {}).get("pretokenizers", []) if "pattern" in step
    ]
    yield "the pre_tokenizer in tokenizer.json", splits, ([{"Regex": QWEN2_SPLIT}],)
    yield "vision_config.model_type", vision.model_type, TOWERS
    yield "vision_config.hidden_act", vision.hidden_act, ("quick_gelu", *GELUS)
    # llama.cpp takes it for a file of old, whose two matrices had each other's names.
    yield "intermediate_size == hidden_size", vision.intermediate_size == vision.hidden_size, (False,)
    yield "the kind of vision_feature_layer", type(config.vision_feature_layer).__name__, ("int",)
    features = "default" if has_class_token(vision) else "full"
    yield "vision_feature_select_strategy", config.vision_feature_select_strategy, (features,)
    yield "projector_hidden_act", config.projector_hidden_act, GELUS
    yield "multimodal_projector_bias", config.multimodal_projector_bias, (True,)
    yield "the image policy", policy.resize, ("squash", "pad")
    if policy.resize == "pad":
        yield "the colour of padding", tuple(int(channel * 255) for channel in policy.mean), (PAD_COLOUR,)
    yield "resample in preprocessor_config.json", policy.resample, (ImagePolicy.resample,)


def _describe(folder: Path) -> list[GgufFile]:
    """The files of a merged model: its language model, and its vision tower with the projector."""
    gguf = import_gguf()
    processing = load_processing(folder)
    config, tensors = processing.config, open_llava_tensors(folder)
    text, used_layers = config.text_config, count_used_vision_layers(config)
    language_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[text.model_type.upper()], text.num_hidden_layers)
    vision_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, used_layers)
    language, vision = {}, {}
    for name, stored in tensors.items():
        if is_unused_vision_parameter(name, config):
            continue
        dtype = _choose_dtype(name, stored.shape, stored.dtype)
        if role_of(name) == LANGUAGE_MODEL:
            language[_rename(language_names, name.removeprefix(f"{LANGUAGE_MODEL}."))] = stored, dtype
        elif role_of(name) == PROJECTOR:
            # The GELU between them counts as number 1.
            number = name.replace(f"{PROJECTOR}.linear_1.", "mm.0.").replace(f"{PROJECTOR}.linear_2.", "mm.2.")
            vision[number] = stored, dtype
        else:
            vision[_rename(vision_names, name)] = stored, dtype
    kind = FILE_KINDS[next(iter(tensors.values())).dtype]  # all tensors of a merged model have one
    shared = {
        "general.file_type": int(gguf.LlamaFileType[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return [
        GgufFile(folder / LANGUAGE_FILE, shared | _set_language(processing, gguf.TokenType), language),
        GgufFile(folder / VISION_FILE, shared | _set_vision(processing, used_layers), vision),
    ]


def _choose_dtype(name: str, shape: tuple[int, ...], merged: torch.dtype) -> torch.dtype:
    # llama.cpp adds and multiplies by vectors, and makes patches, in float32.
    return torch.float32 if len(shape) == 1 or ".embeddings." in name else merged


def _rename(names, name: str) -> str:
    new_name = names.get_name(name, (".weight", ".bias"))
    if new_name is None:
        raise UserError(f"--export gguf: the gguf package has no name for tensor {name}, so llama.cpp cannot take it")
    return new_name


def _set_language(processing: Processing, kinds: type[IntEnum]) -> dict[str, object]:
    text, tokenizer = processing.config.text_config, processing.tokenizer
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    model = {
        "context_length": text.max_position_embeddings,
        "block_count": text.num_hidden_layers,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": float(text.rope_parameters["rope_theta"]),
    }
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    # The embedding has more rows than there are words.
    unused = {index: f"[PAD{index}]" for index in range(text.vocab_size) if index not in words}
    special_kinds = {index: kinds.CONTROL if token.special else kinds.USER_DEFINED for index, token in added.items()}
    token_kinds = dict.fromkeys(unused, kinds.UNUSED) | special_kinds
    special_ids = {
        "bos": tokenizer.bos_token_id,
        "eos": processing.encoder.turn_end_id,
        "padding": tokenizer.pad_token_id,
    }
    return {
        ARCHITECTURE: text.model_type,
        "general.type": "model",
        **{f"{text.model_type}.{key}": value for key, value in model.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [(words | unused)[index] for index in range(text.vocab_size)],
        "tokenizer.ggml.token_type": [int(token_kinds.get(i, kinds.NORMAL)) for i in range(text.vocab_size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _read_tokenizer(processing)["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": starts_with_bos(tokenizer),
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in special_ids.items() if index is not None},
        "tokenizer.chat_template": make_chat_template(tokenizer).replace(CONTENT, MARKED_CONTENT),
    }


def _set_vision(processing: Processing, used_layers: int) -> dict[str, object]:
    config, policy = processing.config, processing.image_policy
    vision = config.vision_config
    tower = {
        "image_size": policy.size,
        "patch_size": vision.patch_size,
        "image_mean": [*policy.mean],
        "image_std": [*policy.std],
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": config.text_config.hidden_size,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": vision.layer_norm_eps,
        # Without feature_layer, llama.cpp leaves out the last of the layers that there are.
        "block_count": used_layers,
        "feature_layer": [used_layers],
    }
    if policy.resize == "squash":
        # Tiles of no size: there are none, and the whole is squashed. Without this it is padded.
        tower["image_grid_pinpoints"] = [0, 0]
    return {
        ARCHITECTURE: "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act in GELUS,
        **{f"clip.vision.{key}": value for key, value in tower.items()},
    }


def _read_tokenizer(processing: Processing) -> dict:
    return json.loads(processing.tokenizer.backend_tokenizer.to_str())


def _make_modelfile(context_length: int) -> str:
    return f'''# ollama create NAME -f {MODELFILE}
FROM ./{LANGUAGE_FILE}
FROM ./{VISION_FILE}
TEMPLATE """{OLLAMA_TEMPLATE}"""
PARAMETER temperature 0
PARAMETER num_ctx {min(context_length, OLLAMA_POSITIONS)}
PARAMETER stop {TURN_END}
'''
