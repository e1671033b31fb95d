"""Assembly of a language model and a vision tower into one LLaVA directory, tensor by tensor."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from meme_llava.convert.towers import EMBEDDING, HEAD, Source, open_language_model, open_vision_tower
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, TURN_END, TURN_START, make_chat_template
from meme_llava.dataset.images import Resize
from meme_llava.errors import UserError
from meme_llava.model.llava import PADDING_SIDE, count_image_tokens, has_class_token
from meme_llava.model.loading import explain_unloadable, quiet_transformers
from meme_llava.storage.files import write_json
from meme_llava.storage.json_files import DAMAGED, read_json
from meme_llava.storage.tensor_files import StoredTensor
from meme_llava.storage.tensor_writer import PlannedTensor, Rounding, count_bytes, write_tensors
from meme_llava.terminal import show_bytes

# The features of the last layer but one, as LLaVA takes them: the last one is tuned for the contrastive loss.
VISION_FEATURE_LAYER = -2
# How each family's published checkpoints normalise pixels, for folders without preprocessor_config.json: (mean, std).
CLIP_NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_NORMALISATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EMBEDDING_MULTIPLE = 64  # rows are added in multiples that matrix kernels like


@dataclass
class Parts:
    """The ingredients of a LLaVA, weights still in their files."""

    language_model: Source
    vision_tower: Source
    tokenizer: object
    config: LlavaConfig
    image_processor: CLIPImageProcessorPil | LlavaImageProcessorPil
    # Embedding rows of control tokens that the language model lacked: row of the new token: row that it copies.
    copied_rows: dict[int, int] = field(default_factory=dict)


def open_parts(language_folder: Path, vision_folder: Path, resize: Resize) -> Parts:
    """Open both sources, add the control tokens, and describe the model they make."""
    vision_tower = open_vision_tower(vision_folder)
    language_model, tokenizer = open_language_model(language_folder)
    rows, copied_rows = add_control_tokens(tokenizer, language_model.tensors[EMBEDDING].shape[0])
    vision_config = vision_tower.config
    config = LlavaConfig(
        # LlavaConfig rewrites what it is given; the sources keep their own.
        vision_config=copy.deepcopy(vision_config),
        text_config=copy.deepcopy(language_model.config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=VISION_FEATURE_LAYER,
        # "default" drops the class token; SigLIP has none to drop.
        vision_feature_select_strategy="default" if has_class_token(vision_config) else "full",
        tie_word_embeddings=language_model.has_tied_head,
    )
    # The sources' folders on the builder's disk mean nothing to whoever gets the model.
    config.vision_config._name_or_path = config.text_config._name_or_path = ""
    config.text_config.vocab_size = rows
    config.pad_token_id = config.text_config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = config.text_config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.text_config.eos_token_id = tokenizer.eos_token_id
    config.image_seq_length = count_image_tokens(config)
    config.architectures = [LlavaForConditionalGeneration.__name__]
    image_processor = _make_image_processor(vision_folder, vision_config, resize)
    return Parts(language_model, vision_tower, tokenizer, config, image_processor, copied_rows)


def add_control_tokens(tokenizer, rows: int) -> tuple[int, dict[int, int]]:
    """Make sure that ChatML's tokens and `<image>` exist, each with an embedding row.

    Qwen2 lacks only `<image>`; its embedding has spare rows. For a model without ChatML (Llama) the end token starts
    as a copy of the model's own end-of-text token: until it is trained both are equally likely, and generation stops
    at either.

    Args:
        rows: of the language model's embedding.

    Returns:
        The rows that the embedding must have, and {row of a new token: row that it starts as a copy of}.
    """
    known = tokenizer.get_added_vocab()
    new_tokens = [token for token in (TURN_START, TURN_END, IMAGE_PLACEHOLDER) if token not in known]
    tokenizer.add_tokens(new_tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or TURN_END
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= rows:
        rows = -(-(largest_id + 1) // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    # Spare rows hold whatever the source's authors left there; `<image>`'s is never read, its features replace it.
    ends_text = tokenizer.eos_token_id
    begins_text = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends_text
    copied_from = {TURN_END: ends_text, TURN_START: begins_text}
    new_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in new_tokens}
    return rows, {new_ids[token]: copied_from[token] for token in new_tokens if copied_from.get(token) is not None}


def write_llava(parts: Parts, folder: Path, seed: int, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """Write weights, config, tokenizer and processor to `folder`.

    Args:
        seed: draws the projector.
        dtype: of all weights; None leaves every part in the dtype of its source, byte for byte.
    """
    planned = plan_llava(parts, seed)
    if dtype is not None:
        rounding = Rounding(dtype)
        planned = {name: rounding.plan(name, tensor) for name, tensor in planned.items()}
    with show_bytes("assembling", count_bytes(planned)) as advance:
        write_tensors(planned, folder, max_shard_size, advance)
    if dtype is not None:
        rounding.check()
        if vanished := rounding.underflow.total():
            print(f"{vanished:,} values are too small for {str(dtype).removeprefix('torch.')} and became 0")
    parts.config.dtype = parts.config.text_config.dtype = dtype or parts.language_model.dtype
    parts.config.vision_config.dtype = dtype or parts.vision_tower.dtype
    with quiet_transformers():
        parts.config.save_pretrained(folder)
        _make_generation_config(parts).save_pretrained(folder)
        make_processor(parts).save_pretrained(folder)
        # Readers before transformers 5 look for the image processor in a file of its own.
        parts.image_processor.save_pretrained(folder)
    _write_for_other_readers(folder)


def plan_llava(parts: Parts, seed: int) -> dict[str, PlannedTensor | StoredTensor]:
    """All tensors of the LLaVA under their names on disk, in the order in which the sources' files hold them."""
    planned = {f"language_model.{name}": stored for name, stored in parts.language_model.tensors.items()}
    planned |= {f"vision_tower.vision_model.{name}": stored for name, stored in parts.vision_tower.tensors.items()}
    for name in (EMBEDDING, HEAD):
        if name in parts.language_model.tensors:
            planned[f"language_model.{name}"] = _plan_embedding(parts, parts.language_model.tensors[name])
    for name, tensor in _draw_projector(parts.config, seed).items():
        tensor = tensor.to(parts.language_model.dtype)
        make_pieces = partial(iter, [tensor])
        planned[f"multi_modal_projector.{name}"] = PlannedTensor(tensor.dtype, tuple(tensor.shape), make_pieces)
    return planned


def _plan_embedding(parts: Parts, stored: StoredTensor) -> PlannedTensor | StoredTensor:
    """An embedding with the rows of new tokens copied, and zero rows up to its new size."""
    rows = parts.config.text_config.vocab_size
    if rows == stored.shape[0] and not parts.copied_rows:
        return stored

    def make_pieces() -> Iterator[torch.Tensor]:
        embedding = torch.zeros(rows, *stored.shape[1:], dtype=stored.dtype)  # (rows, hidden)
        embedding[: stored.shape[0]] = stored.map()
        for row, copied in parts.copied_rows.items():
            embedding[row] = embedding[copied]
        yield embedding

    return PlannedTensor(stored.dtype, (rows, *stored.shape[1:]), make_pieces)


def _draw_projector(config: LlavaConfig, seed: int) -> dict[str, torch.Tensor]:
    """A fresh multi_modal_projector in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in LlavaMultiModalProjector(config).state_dict().items():
        tensors[name] = torch.zeros_like(tensor, dtype=torch.float32)
        if name.endswith("weight"):
            tensors[name].normal_(std=config.text_config.initializer_range, generator=generator)
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


def _make_image_processor(
    vision_folder: Path, vision_config, resize: Resize
) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
    """The transformers class that does what `images.ImagePolicy` does; the folder's own class may cut words off."""
    path = vision_folder / "preprocessor_config.json"
    mean, std = CLIP_NORMALISATION if has_class_token(vision_config) else SIGLIP_NORMALISATION
    side = vision_config.image_size
    square = {"height": side, "width": side}
    crops, pads = resize == "crop", resize == "pad"
    make_processor = LlavaImageProcessorPil if pads else CLIPImageProcessorPil
    return make_processor(
        size={"shortest_edge": side} if crops else square,
        crop_size=square,
        do_center_crop=crops,
        **{"image_mean": mean, "image_std": std, "resample": Image.Resampling.BICUBIC} | _read_pixel_settings(path),
        **({"do_pad": True} if pads else {}),
    )


def _read_pixel_settings(path: Path) -> dict:
    """What a preprocessor_config.json, if there is one, says of pixels. Raises UserError for what makes no images."""
    source = read_json(path) if path.is_file() else {}
    found = {name: source[name] for name in ("image_mean", "image_std", "resample") if name in source}
    for name in found.keys() & {"image_mean", "image_std"}:
        values = found[name] if isinstance(found[name], list) else []
        if [type(value) in (int, float) and math.isfinite(value) for value in values] != [True] * 3:
            raise UserError(f"{path}: {name} is {found[name]}, expected three finite numbers. {DAMAGED}")
    if found.get("resample", 0) not in list(Image.Resampling):
        raise UserError(f"{path}: resample is {found['resample']}, expected 0 to 5. {DAMAGED}")
    return found


def _make_generation_config(parts: Parts) -> GenerationConfig:
    """Greedy: reading the words in an image needs no luck. Stops where the language model stops, and at a turn's end.

    A repetition penalty, which Qwen2 ships, would garble memes that repeat a character on purpose (哈哈哈哈).
    """
    source, tokenizer = parts.language_model, parts.tokenizer
    own = source.config
    if (source.folder / "generation_config.json").is_file():
        with explain_unloadable(source.folder, "generation_config.json cannot be used"):
            own = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = [tokenizer.convert_tokens_to_ids(TURN_END), *ends]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[stop for stop in dict.fromkeys([*stops, tokenizer.eos_token_id]) if stop is not None],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _write_for_other_readers(folder: Path) -> None:
    """Say what transformers 5 says in words of its own once more in those of 4.x, and on which side a batch is padded,
    which it leaves to its readers' own default. All of them read the result."""
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
    config = read_json(config_file)
    rope = dict(config["text_config"].get("rope_parameters") or {})
    if "rope_theta" in rope:
        # 4.x does not read rope_parameters: it would silently take a theta of 10,000 and positions without scaling.
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["text_config"]["rope_scaling"] = rope
    write_json(config_file, config)

    tokenizer = read_json(tokenizer_file) | {"padding_side": PADDING_SIDE}
    # transformers copies these from the source's tokenizer.json, whose truncation and padding are cleared.
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id"):
        tokenizer.pop(name, None)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        # Under the new name 4.x expects a dict and stops.
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        # The class' name in 4.x; there it returns token_type_ids, which no LLaVA takes, unless told otherwise.
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(tokenizer_file, tokenizer)
