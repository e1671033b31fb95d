"""What a train type means: what is frozen, what gets LoRA, what trains in full, and at which learning rate.

Also how the trained part alone is written and put back on its base, and which layers keep their activations for the
backward pass, which recompute them to save memory. Nothing about how much memory there is.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from meme_llava.errors import UserError
from meme_llava.model.lean_layers import use_lean_lora
from meme_llava.model.llava import (
    LANGUAGE_MODEL,
    PROJECTOR,
    ROLES,
    VISION_TOWER,
    check_same_names,
    count_used_vision_layers,
    is_unused_vision_parameter,
    list_linears,
    role_of,
    to_disk_name,
)
from meme_llava.model.loading import explain_unloadable
from meme_llava.model.settings import LearningRates, LoraRecipe
from meme_llava.storage.json_files import DAMAGED, check_fields, read_json
from meme_llava.storage.run_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS
from meme_llava.storage.tensor_files import read_tensors
from meme_llava.storage.tensor_writer import PlannedTensor, write_file

PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters of one role that share learning rate and weight decay."""

    role: str
    learning_rate: float
    weight_decay: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    def describe(self) -> dict:
        """What the run record keeps of the group."""
        kind = "vectors" if self.parameters[0].dim() < 2 else "matrices"
        if any("lora_" in name for name in self.names):
            kind = "LoRA" if kind == "matrices" else "DoRA magnitudes"
        return {
            "role": self.role,
            "kind": kind,
            "tensors": len(self.names),
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
        }


def prepare_trainable(model: nn.Module, recipe: LoraRecipe, seed: int) -> nn.Module:
    """Freeze, add LoRA and unfreeze as the recipe says; trainable parameters become float32.

    The projector always trains in full. Vision layers after the used features stay frozen: no gradient reaches them.
    DeepSpeed in bf16 rounds the parameters again and keeps float32 masters of its own. Raises UserError where a LoRA
    module name matches nothing.
    """
    model.requires_grad_(False)
    # The top-level config has one, too, but the language model reads its own.
    model.config.text_config.use_cache = False
    if recipe.uses_lora:
        targets = find_lora_targets(model, recipe)
        lora_config = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            use_rslora=recipe.lora_variant == "rslora",
            use_dora=recipe.lora_variant == "dora",
            target_modules=_to_pattern(targets),
            modules_to_save=[PROJECTOR],
        )
        # LoRA's start values are drawn here.
        torch.manual_seed(seed)
        model = get_peft_model(model, lora_config)
        adapted = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
        check_same_names({f"{PEFT_PREFIX}{name}" for name in targets}, adapted, "LoRA targets")
        use_lean_lora(model)
    else:
        training = {VISION_TOWER: recipe.vision_tower_training, LANGUAGE_MODEL: recipe.language_model_training}
        for name, parameter in model.named_parameters():
            learns = training.get(role_of(name), "full") == "full"
            parameter.requires_grad_(learns and not is_unused_vision_parameter(name, model.config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def find_lora_targets(model: nn.Module, recipe: LoraRecipe) -> list[str]:
    """Full names of the linear layers that get LoRA, chosen by role and by their own name."""
    targets = []
    for role, training, leaf_names in (
        (VISION_TOWER, recipe.vision_tower_training, recipe.lora_vision_modules),
        (LANGUAGE_MODEL, recipe.language_model_training, recipe.lora_language_modules),
    ):
        linear = [name for name in list_linears(model, role) if not is_unused_vision_parameter(name, model.config)]
        for leaf_name in leaf_names if training == "lora" else ():
            matches = [name for name in linear if name.endswith(f".{leaf_name}")]
            if not matches:
                available = ", ".join(sorted({name.split(".")[-1] for name in linear}))
                raise UserError(f"LoRA module {leaf_name!r} matches nothing in the {role}; it has {available}")
            targets += matches
    return targets


def _to_pattern(names: list[str]) -> str:
    """One regular expression for many module names, layer numbers folded together."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, number, rest = re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name).groups()
        layers.setdefault((head, rest), []).append(number)
    return "|".join(
        rf"{re.escape(head)}\.({'|'.join(numbers)})\.{re.escape(rest)}" for (head, rest), numbers in layers.items()
    )


def plan_parameter_groups(model: nn.Module, rates: LearningRates) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group; biases and norms never decay. Raises UserError where the
    projector does not learn."""
    members: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Biases, norm scales and the class embedding are the one-dimensional parameters.
            key = (ROLES.index(role_of(name)), parameter.dim() < 2)
            members.setdefault(key, {})[name] = parameter
    groups = []
    for (index, is_vector), named in sorted(members.items()):
        role = ROLES[index]
        learning_rate = rates.high_lr if role == PROJECTOR else rates.low_lr
        decay = 0.0 if is_vector else rates.weight_decay
        groups.append(ParameterGroup(role, learning_rate, decay, tuple(named), tuple(named.values())))
    if not any(group.role == PROJECTOR for group in groups):
        raise UserError("the multi_modal_projector does not learn; no train type is meant to freeze it")
    return groups


def save_trained_weights(model: nn.Module, folder: Path, state_dict: dict | None = None) -> None:
    """Write only what learned: a peft adapter with the projector, or `trained_weights.safetensors`. `state_dict` has
    the model's tensors where an engine has gathered them. Raises OSError where they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, state_dict=state_dict)
        config = model.peft_config["default"]
        config.inference_mode = True
        config.save_pretrained(folder)
        config.inference_mode = False
        path = folder / ADAPTER_WEIGHTS
    else:
        source = dict(model.named_parameters()) if state_dict is None else state_dict
        tensors = {to_disk_name(name): source[name] for name, own in model.named_parameters() if own.requires_grad}
        path = folder / TRAINED_WEIGHTS
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    write_file(path, {name: PlannedTensor(one.dtype, one.shape, partial(iter, [one])) for name, one in tensors.items()})


def load_trained_weights(model: nn.Module, folder: Path) -> None:
    """Put saved trained weights into a model prepared the same way; every tensor must find its place."""
    if isinstance(model, PeftModel):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        check_same_names(get_peft_model_state_dict(model), tensors, str(folder / ADAPTER_WEIGHTS))
        set_peft_model_state_dict(model, tensors)
        return
    tensors = load_file(folder / TRAINED_WEIGHTS)
    parameters = {to_disk_name(name): parameter for name, parameter in model.named_parameters()}
    check_same_names(set(tensors) & set(parameters), tensors, str(folder / TRAINED_WEIGHTS))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def load_projector(model: nn.Module, folder: Path) -> None:
    """Put the multi_modal_projector that another run trained on the same base into a model prepared to learn. Raises
    UserError where its tensors are not those of this model's projector."""
    path = next(path for path in (folder / ADAPTER_WEIGHTS, folder / TRAINED_WEIGHTS) if path.is_file())
    # The names in front of it depend on what else learned there and learns here.
    before = {
        _name_in_projector(name): tensor for name, tensor in load_file(path).items() if role_of(name) == PROJECTOR
    }
    parameters = {
        _name_in_projector(name): parameter
        for name, parameter in model.named_parameters()
        if role_of(name) == PROJECTOR and parameter.requires_grad
    }
    check_same_names(parameters, before, f"{path}, the projector's tensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


def _name_in_projector(name: str) -> str:
    return name.rpartition(f"{PROJECTOR}.")[2].removeprefix("modules_to_save.default.")


def apply_trained_weights(model: nn.Module, folder: Path) -> nn.Module:
    """Base model → base + what train.py saved in `folder`, for asking it before merging."""
    if (folder / ADAPTER_CONFIG).is_file():
        model = add_adapter(model, folder)
    load_trained_weights(model, folder)
    return model


def add_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Base model → base with the modules of the adapter in `folder`, its weights not yet loaded."""
    config = read_adapter_config(folder)
    # The run record knows the base and its fingerprint; peft would only warn that the folder's name changed.
    config.base_model_name_or_path = None
    with explain_unloadable(folder, "its adapter does not fit the base"):
        # The adapter learned as float32; in the model's own dtype a forward pass needs no autocast.
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in `folder`, for the modules that its weights name.

    No regular expression of the file is matched, as one can be made to take for ever.

    Raises UserError for other kinds of adapters, and for a value that makes no LoRA.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    check_fields(path, values, {"peft_type": str, "r": int, "lora_alpha": float})
    if values["peft_type"] != "LORA":
        raise UserError(f"{path}: is a {values['peft_type']} adapter, expected LORA")
    patterns = [values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    numbers = [values["r"], values["lora_alpha"], *(number for pattern in patterns for number in pattern.values())]
    if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
        raise UserError(f"{path}: r, lora_alpha or a pattern of them is not above 0 and finite. {DAMAGED}")
    if used := [name for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if values.get(name)]:
        raise UserError(f"{path}: uses {', '.join(used)}, expected LoRA as train.py writes it")
    if not all(re.fullmatch(r"[\w.]+", module) for pattern in patterns for module in pattern):
        raise UserError(f"{path}: a pattern is no name of a module, expected LoRA as train.py writes it")
    with explain_unloadable(folder, f"{ADAPTER_CONFIG} cannot be used"):
        config = PeftConfig.from_pretrained(folder)
    weights, end = read_tensors([folder / ADAPTER_WEIGHTS]), ".lora_A.weight"
    config.target_modules = {name.removeprefix(PEFT_PREFIX).removesuffix(end) for name in weights if name.endswith(end)}
    return config


@dataclass(frozen=True)
class CheckpointedLayers:
    """How many layers of each tower compute their activations again in the backward pass, counted from the input.

    The first layers, because the backward pass reaches them last: what it then computes again takes the place of what
    the later layers have freed.
    """

    language: int = 0
    vision: int = 0


def count_layers(config: LlavaConfig, vision_trainable: bool) -> CheckpointedLayers:
    """All layers that keep activations; a frozen vision tower keeps none."""
    vision = count_used_vision_layers(config) if vision_trainable else 0
    return CheckpointedLayers(config.text_config.num_hidden_layers, vision)


def recompute_layers(model: nn.Module, recomputed: CheckpointedLayers) -> None:
    """Let exactly these layers of a LLaVA, bare or wrapped by peft, compute their activations again."""
    for role, count in ((LANGUAGE_MODEL, recomputed.language), (VISION_TOWER, recomputed.vision)):
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, GradientCheckpointingLayer) and role in name.split(".")
        ]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < count
            # Reentrant checkpointing needs inputs with a gradient, which LoRA's first layers have not.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
