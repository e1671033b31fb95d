"""The parts of a LLaVA by role, names of its tensors in memory and on disk, and strict loading of a saved one.

Roles, not key prefixes, name the parts: "vision_tower", "multi_modal_projector", "language_model".

Files are written in the classic LLaVA layout, which old and new transformers read, and read in all layouts:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.*`.
Modules in memory are named as transformers 5 names them: `model.vision_tower.*`, … and `lm_head.*`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoProcessor, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, ConversationEncoder
from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.model.four_bit import use_four_bit
from meme_llava.model.loading import LOCALLY, NO_CODE, explain_unloadable, quiet_transformers
from meme_llava.storage.json_files import DAMAGED, read_json
from meme_llava.storage.run_record import check_is_whole, check_not_unfinished, holds_trained_weights
from meme_llava.storage.tensor_files import StoredTensor, open_model_tensors

VISION_TOWER = "vision_tower"
PROJECTOR = "multi_modal_projector"
LANGUAGE_MODEL = "language_model"
ROLES = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL)
# (in memory, on disk); the first match wins.
_PREFIXES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Prompts of a batch end together, where their answers begin; readers of our folders take the side from it.
PADDING_SIDE = "left"


@dataclass(frozen=True)
class Processing:
    """What stands between a user's data and a model: tokens and pixels, read from the model's own folder."""

    processor: object  # transformers LlavaProcessor, saved beside every output
    encoder: ConversationEncoder
    image_policy: ImagePolicy
    tokens_per_image: int
    config: LlavaConfig

    @property
    def tokenizer(self):
        return self.processor.tokenizer


def role_of(name: str) -> str:
    """The role of a parameter or module by its name in memory, bare or wrapped by peft."""
    parts = name.split(".")
    for role in ROLES:
        if role in parts:
            return role
    if "lm_head" in parts:
        return LANGUAGE_MODEL
    raise ValueError(f"{name!r} belongs to no part of a LLaVA")


def list_linears(model: nn.Module, role: str) -> dict[str, nn.Linear]:
    """The linear layers of a role's transformer layers, by name: not the language model's head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and role_of(name) == role
    }


def has_class_token(vision_config) -> bool:
    """Whether a tower puts a class token in front of its patches (CLIP and Chinese-CLIP do, SigLIP does not)."""
    return "siglip" not in vision_config.model_type


def count_image_tokens(config: LlavaConfig) -> int:
    """Positions one image takes: one per patch, plus the class token where the config keeps it."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    keeps_class_token = config.vision_feature_select_strategy == "full" and has_class_token(config.vision_config)
    return patches + int(keeps_class_token)


def count_used_vision_layers(config: LlavaConfig) -> int:
    """Vision layers whose output reaches the projector; the layers after it never receive a gradient."""
    layers = config.vision_config.num_hidden_layers
    feature_layer = config.vision_feature_layer
    # hidden_states holds the embeddings and every layer's output: layers + 1 entries.
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def is_unused_vision_parameter(name: str, config: LlavaConfig) -> bool:
    """Whether a vision tower's parameter lies after the layer whose features are used."""
    if role_of(name) != VISION_TOWER:
        return False
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) >= count_used_vision_layers(config)
    return not any(part in parts for part in ("embeddings", "pre_layrnorm"))


def to_disk_name(name: str) -> str:
    """`model.vision_tower.x` → `vision_tower.vision_model.x`, and so on for every part of a LLaVA."""
    for in_memory, on_disk in _PREFIXES:
        if name.startswith(in_memory):
            return on_disk + name.removeprefix(in_memory)
    raise ValueError(f"tensor {name!r} belongs to no part of a LLaVA")


def to_classic_name(name: str) -> str:
    """A tensor's name in any layout that a release of transformers has written → its name in ours."""
    name = name.removeprefix("model.")
    role, _, rest = name.partition(".")
    if role == "lm_head":
        return f"{LANGUAGE_MODEL}.{name}"
    if role == VISION_TOWER:
        return f"{role}.vision_model.{rest.removeprefix('vision_model.')}"
    if role == LANGUAGE_MODEL and not rest.startswith("lm_head."):
        return f"{role}.model.{rest.removeprefix('model.')}"
    return name


def open_llava_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a LLaVA folder by their classic names, whichever release of transformers wrote it.

    Raises UserError like `open_model_tensors`, and where two tensors would have the same name.
    """
    tensors = {}
    for stored in open_model_tensors(folder).values():
        name = to_classic_name(stored.name)
        if name in tensors:
            both = f"{tensors[name].name_in_file} and {stored.name}"
            raise UserError(f"{stored.path}: holds {both}, which are one tensor of a LLaVA; keep only one of them")
        tensors[name] = replace(stored, name=name, name_in_file=stored.name)
    return tensors


def find_stored(tensors: Iterable[str], name: str) -> str:
    """The name on disk of a LLaVA's parameter in memory; a tied head is stored as the embedding."""
    disk_name = to_disk_name(name)
    if disk_name not in tensors and name == "lm_head.weight":
        return to_disk_name("model.language_model.embed_tokens.weight")
    return disk_name


def check_same_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Raise UserError unless both name the same tensors."""
    expected, found = set(expected), set(found)
    for kind, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise UserError(f"{source}: {len(names)} tensors are {kind}, e.g. {', '.join(sorted(names)[:3])}")


def check_same_shapes(expected: Mapping[str, torch.Tensor], found: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless each of the tensors has the shape in its file that the model's configuration gives it."""
    for name, outline in expected.items():
        if (stored := found[name]).shape != tuple(outline.shape):
            raise UserError(f"{stored.path}: {name} is {stored.shape}, config.json asks for {tuple(outline.shape)}")


def check_llava_folder(folder: Path) -> None:
    """Raise UserError unless `folder` looks like a LLaVA's."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    check_is_whole(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        if holds_trained_weights(folder):
            raise UserError(
                f"{folder}: holds trained weights, not a whole model; merge them: python merge_lora.py --adapter "
                f"{folder} --output_dir …"
            )
        check_not_unfinished(folder)
        models = [folder / name for name in ("merged", "base") if (folder / name / "config.json").is_file()]
        if models:
            raise UserError(
                f"{folder}: is no model folder, but holds some; did you mean {' or '.join(map(str, models))}?"
            )
        raise UserError(f"{folder}: has no config.json, so it is not a model folder")
    model_type = read_json(config_file).get("model_type")
    if model_type != "llava":
        raise UserError(f"{folder}: is a {model_type!r} model, expected 'llava'. Build one with build_base_model.py.")


def check_vocabulary(folder: Path) -> None:
    """Raise UserError for a folder without the words of its tokenizer; transformers may make an empty one of it."""
    names = {path.name for path in folder.iterdir()}
    if not (
        names & {"tokenizer.json", "tekken.json", "vocab.txt"}
        or names >= {"vocab.json", "merges.txt"}
        or any(name.endswith((".model", ".tiktoken")) for name in names)
    ):
        raise UserError(
            f"{folder}: has no vocabulary; expected tokenizer.json (or vocab.json and merges.txt, or tokenizer.model). "
            "Download the complete model folder"
        )


def check_words(tokenizer, folder: Path) -> None:
    """Raise UserError for a loaded tokenizer of which nothing but added tokens is left."""
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(f"{folder}: the vocabulary of its tokenizer is empty. {DAMAGED}")


def make_empty_model(model_class, config, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model_class` with frozen parameters that have shape and dtype but no storage; buffers are real."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        make = getattr(model_class, "_from_config", None) or partial(model_class.from_config, **NO_CODE)
        return make(config, dtype=dtype).eval().requires_grad_(False)


def fill_weights(
    model: nn.Module, read: Callable[[str], torch.Tensor], devices: Mapping[str, torch.device] | None = None
) -> nn.Module:
    """Give an empty model its parameters; `read` gives one by its name in `model`, in any float dtype. They stand in
    main memory, but for those that `devices` names."""
    for name, _ in list(model.named_parameters()):
        device = (devices or {}).get(name, "cpu")
        set_module_tensor_to_device(model, name, device, value=read(name), clear_cache=False)
    model.tie_weights()
    return model


def load_llava(
    folder: Path,
    dtype: torch.dtype,
    model_class: type[LlavaForConditionalGeneration] = LlavaForConditionalGeneration,
    maps_weights: bool = False,
    four_bit_on: torch.device | None = None,
) -> LlavaForConditionalGeneration:
    """Load a LLaVA, such as build_base_model.py and merge_lora.py write, in `dtype`, on the CPU; `model_class` may be
    another one with the same parameters. Raises UserError where a tensor is missing, unexpected, or of another shape.

    Every tensor is read and converted on its own, so that loading takes no more memory than the model; and next to none
    with `maps_weights`, for a model that goes to another device at once: weights stored in `dtype` stay in their file
    until then, where all processes of a machine share them. With `four_bit_on`, the linear layers of the language model
    are quantised to four bits there, each as it is read.
    """
    check_llava_folder(folder)
    with explain_unloadable(folder, "cannot be loaded"):
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
        config._name_or_path = str(folder)  # peft notes it in an adapter's configuration
        model = make_empty_model(model_class, config, dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tensors = open_llava_tensors(folder)
    expected = {find_stored(tensors, name): outline for name, outline in model.named_parameters()}
    check_same_names(expected, tensors, str(folder))
    check_same_shapes(expected, tensors)

    def read(name: str) -> torch.Tensor:
        stored = tensors[find_stored(tensors, name)]
        return stored.map() if maps_weights and stored.dtype == dtype else stored.load(dtype)

    linears = {} if four_bit_on is None else list_linears(model, LANGUAGE_MODEL)
    if linears:
        use_four_bit(model, linears, dtype)
    return fill_weights(model, read, {f"{name}.weight": four_bit_on for name in linears})


def load_processing(folder: Path) -> Processing:
    """Tokenizer, image policy and prompt encoder of a model folder, checked against its config. Raises UserError where
    a file is missing, or the ids of `<image>` in config, tokenizer and processor disagree."""
    check_llava_folder(folder)
    check_vocabulary(folder)
    with explain_unloadable(folder, "its processor cannot be loaded"):
        processor = AutoProcessor.from_pretrained(folder, **LOCALLY)
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
    check_words(processor.tokenizer, folder)
    if type(processor).__name__ != "LlavaProcessor":
        raise UserError(f"{folder}: processor_config.json gives {type(processor).__name__}, expected LlavaProcessor")
    tokens_per_image = count_image_tokens(config)
    encoder = ConversationEncoder(processor.tokenizer, tokens_per_image, str(folder))
    ids = {
        "config.json": config.image_token_id,
        "tokenizer": encoder.image_token_id,
        "processor": processor.image_token_id,
    }
    if len(set(ids.values())) != 1:
        raise UserError(f"{folder}: the id of {IMAGE_PLACEHOLDER} differs: {ids}. Build the model again.")
    largest_id, rows = max(processor.tokenizer.get_vocab().values()), config.text_config.vocab_size
    if largest_id >= rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {largest_id}, the embedding only {rows} rows. Build the model "
            "again."
        )
    image_policy = ImagePolicy.from_image_processor(processor.image_processor, str(folder))
    return Processing(processor, encoder, image_policy, tokens_per_image, config)
