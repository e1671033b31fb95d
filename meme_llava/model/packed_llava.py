"""The forward pass of a packed batch: each image encoded once, each record attending to its own path, the loss at
supervised positions only. A language model whose records cannot share a row gets a row for each.

The parameters and their names are those of transformers' LlavaForConditionalGeneration; so is the loss, as if each
record had gone through it alone. Nothing about files, prompts or optimizers.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meme_llava.dataset.collator import make_normalisation, normalise
from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.model.cross_entropy_head import CrossEntropyHead
from meme_llava.model.lean_layers import use_lean_norms
from meme_llava.model.llava import count_used_vision_layers, load_llava
from meme_llava.model.packed_attention import KERNELS, MATMUL, PACKED, VARLEN, Packing
from meme_llava.model.packing import find_obstacle

for name, attend in KERNELS.items():
    # Compiled layers call these as they are; compiling them would start anew for every new set of segment lengths.
    ALL_ATTENTION_FUNCTIONS.register(PACKED + name, torch.compiler.disable(attend))


class PackedLlava(LlavaForConditionalGeneration):
    """A LLaVA whose forward pass takes what `PackingCollator` returns. Made by `load_packed_llava`."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.own_attention = self.model.language_model.config._attn_implementation
        self.obstacle = find_obstacle(config.text_config)
        self.lm_head = CrossEntropyHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        kv_index: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        image_runs: torch.Tensor,
        image_positions: torch.Tensor,
        loss_positions: torch.Tensor,
        loss_targets: torch.Tensor,
        loss_weights: torch.Tensor,
        pixel_values: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The sum of weight times cross entropy over all supervised positions, a float32 scalar, as {"loss": …}; of
        what `PackingCollator` describes."""
        vision_features = self.encode_images(pixel_values)  # (images, tokens, vision width)
        features = self.model.multi_modal_projector(vision_features)  # (images, tokens, width)
        embeddings = self.get_input_embeddings()(input_ids).squeeze(0)  # (positions, width)
        shown = features.index_select(0, image_runs).flatten(0, 1)  # (runs * tokens, width)
        embeddings = embeddings.index_copy(0, image_positions, shown.to(embeddings.dtype)).unsqueeze(0)
        packing = Packing(cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        hidden = self.run_language_model(embeddings, position_ids, packing)
        hidden = hidden.squeeze(0).index_select(0, loss_positions)  # (supervised, width)
        loss = self.lm_head(hidden, loss_targets, loss_weights)
        if len(image_runs) == 0:
            # The blank image of a batch of text: the parts that see images get a gradient of zero, not none.
            loss = loss + 0.0 * features.float().sum()
        return {"loss": loss}

    def run_language_model(
        self, embeddings: torch.Tensor, position_ids: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """The last hidden states of a packed row: (1, positions, width), of the same shape as its embeddings. Where
        records cannot share a row, they share no beginnings in it either."""
        run = partial(self.model.language_model, use_cache=False)
        if not self.obstacle:
            return run(inputs_embeds=embeddings, position_ids=position_ids, packing=packing).last_hidden_state
        lengths = packing.cu_seqlens_q.diff().tolist()
        # All in one call, or processes with fewer records would gather divided weights less often than the others.
        # What fills a row up stands behind its record, where a causal model does not look.
        rows = pad_sequence(embeddings.squeeze(0).split(lengths), batch_first=True)  # (records, longest, width)
        hidden = run(inputs_embeds=rows).last_hidden_state
        return torch.cat([own[:length] for own, length in zip(hidden, lengths, strict=True)])[None]

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Like `encode_normalised`, from uint8 (images, 3, size, size)."""
        return self.encode_normalised(normalise(pixel_values, self.normalisation))

    def encode_normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower's features as the projector takes them: numbers (images, 3, size, size) to
        (images, tokens, vision width).

        Layers after the features that are used are not computed. A frozen tower keeps nothing for a backward pass.
        """
        tower = self.model.vision_tower
        learns = any(parameter.requires_grad for parameter in tower.parameters())
        with contextlib.nullcontext() if learns else torch.no_grad():
            hidden = tower.embeddings(pixels.to(tower.dtype))  # (images, patches and class token, vision width)
            if hasattr(tower, "pre_layrnorm"):
                hidden = tower.pre_layrnorm(hidden)
            for layer in tower.encoder.layers[: count_used_vision_layers(self.config)]:
                hidden = layer(hidden, None)
        drops_class_token = self.config.vision_feature_select_strategy == "default"
        return hidden[:, 1:] if drops_class_token else hidden


def load_packed_llava(
    folder: Path, dtype: torch.dtype, image_policy: ImagePolicy, attention: str, **options
) -> PackedLlava:
    """Load a LLaVA folder for training on packed rows, with an attention that `choose_attention` returned; more
    `options` are those of `load_llava`. Raises UserError where a tensor is missing, unexpected or of another shape, or
    the model cannot be packed."""
    model = load_llava(folder, dtype, PackedLlava, **options)
    prepare_packed_llava(model, image_policy, attention, str(folder))
    return model


def prepare_packed_llava(model: PackedLlava, image_policy: ImagePolicy, attention: str, source: str) -> None:
    """Give a model its image policy and attention. Raises UserError, naming `source`, if it cannot be packed."""
    if not isinstance(model.config.vision_feature_layer, int):
        raise UserError(
            f"{source}: uses the vision layers {model.config.vision_feature_layer}, expected a single one. Build the "
            "model with build_base_model.py."
        )
    dropout = getattr(model.config.text_config, "attention_dropout", 0.0)
    if attention == VARLEN and dropout and not model.obstacle:
        raise UserError(
            f"{source}: its language model has attention_dropout {dropout:g}, which --attention varlen cannot apply; "
            "pass --attention sdpa, or set attention_dropout to 0 under text_config in its config.json"
        )
    use_lean_norms(model.model.language_model)
    model.register_buffer("normalisation", make_normalisation(image_policy), persistent=False)
    # What FSDP gathers at a time; transformers' list names classes that only other parts of these models have.
    model._no_split_modules = sorted({type(layer).__name__ for layer in list_repeated_layers(model)})
    if not model.obstacle:
        model.model.language_model.config._attn_implementation = PACKED + attention
    if attention == MATMUL:
        model.model.vision_tower.config._attn_implementation = "eager"  # transformers' name for the same


def _get_image_features(packed: PackedLlava, pixel_values: torch.Tensor, **options) -> BaseModelOutputWithPooling:
    """What LlavaModel puts in the place of image tokens, (tokens, width) an image; no unused layer is computed."""
    features = packed.model.multi_modal_projector(packed.encode_normalised(pixel_values))
    return BaseModelOutputWithPooling(pooler_output=list(features))


@contextlib.contextmanager
def answer_unpacked(model: torch.nn.Module) -> Iterator[None]:
    """While the block lasts, a packed model, bare or wrapped by peft, generates as LlavaForConditionalGeneration does.

    Same parameters, same vision tower, same hooks of engines around every layer; another forward pass of the language
    model, with a KV cache. Behind the block the model trains on as before.
    """
    packed = next(module for module in model.modules() if isinstance(module, PackedLlava))
    config = packed.model.language_model.config
    attention = config._attn_implementation
    forward = packed.__dict__.get("forward")  # accelerate puts its own there where nothing wraps the model
    layers = list_repeated_layers(packed)
    # Compiled for packed rows, they would be compiled anew for every length of an answer.
    compiled = [layer._compiled_call_impl for layer in layers]
    was_training = model.training
    model.eval()
    packed.forward = MethodType(LlavaForConditionalGeneration.forward, packed)
    packed.model.get_image_features = partial(_get_image_features, packed)
    config._attn_implementation = packed.own_attention
    for layer in layers:
        layer._compiled_call_impl = None
    # FSDP gathers the weights outside its layers for `forward` alone.
    if "generate" not in model.__dict__:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
        config._attn_implementation = attention
        del packed.model.get_image_features, packed.forward
        if forward is not None:
            packed.forward = forward
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # It keeps gathered what a backward pass would need, and would take it for the weights after an update.
                module.reshard()
        model.train(was_training)


def list_repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of both towers."""
    return [module for name, module in model.named_modules() if re.search(r"\.layers\.\d+$", name)]


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile the layers that repeat, each kind once, for rows of any length."""
    for layer in list_repeated_layers(model):
        layer.compile(backend=backend, dynamic=True)
