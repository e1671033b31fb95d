"""The proof that a language model computes in a packed row what it computes of each record alone."""

import copy
from collections.abc import Mapping

import torch

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.model.llava import make_empty_model, to_disk_name
from meme_llava.model.offloading import offload_weights
from meme_llava.model.packed_attention import ADVICE, SDPA, Packing
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava
from meme_llava.storage.tensor_files import StoredTensor

# A window, or chunk, of attention is made this short: its code is proved, and records need not be longer than its size.
WINDOW = 8
# Two records of 24 and 28 tokens begin with the same image and 11 tokens more; the third shows none. 0 is the image.
PROOF_RECORDS = ([*range(24)], [*range(12), *range(30, 46)], [*range(50, 80)])
SCALE = 0.02  # of the row, about that of embeddings, so that what attention adds weighs as much as usual
# Of a position's hidden state. Plain attention differs by 2e-5 at most, records that leaked by 0.04 and more.
MAX_DIFFERENCE = 1e-4


def prove_packing(config, tensors: Mapping[str, StoredTensor], image_policy: ImagePolicy, source: str) -> str:
    """Compare a packed row with its records one by one through transformers' own model, in float32, by the first layer
    of every type with the weights of `tensors`. Records are longer than the window, where there is one. Returns the
    difference in words.

    What a window under another name in the configuration hides is proved only if it is shorter than 24 positions; of
    kernels, the one that runs everywhere. Raises UserError, naming `source`, where the results differ, or the language
    model cannot be packed.
    """
    text = config.text_config
    kinds = list(getattr(text, "layer_types", None) or ("attention",))
    name = f"{source}: its language model ({text.model_type}, layers: {', '.join(sorted(set(kinds)))})"
    try:
        worst = _measure_difference(copy.deepcopy(config), kinds, tensors, image_policy, source)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} does not run as others do ({what}); {ADVICE}") from error
    if not worst <= MAX_DIFFERENCE:
        raise UserError(
            f"{name} computes something else in a packed row than record by record (largest difference {worst:.2g}, "
            f"limit {MAX_DIFFERENCE:g}), so records would learn from each other; {ADVICE}"
        )
    return f"largest difference {worst:.1g}"


@torch.inference_mode()
def _measure_difference(config, kinds: list[str], tensors, image_policy: ImagePolicy, source: str) -> float:
    """The largest relative difference of a position's hidden state."""
    text = config.text_config
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None):
            setattr(text, name, WINDOW)
    model = make_empty_model(PackedLlava, config)
    language_model = model.model.language_model
    language_model.layers = layers = language_model.layers[: 1 + max(map(kinds.index, kinds))]
    # Layer by layer: some models use their experts' weights without calling them.
    offload_weights(language_model, lambda name: tensors[to_disk_name(f"model.language_model.{name}")].load(), layers)

    collate = PackingCollator(image_token_id=0, tokens_per_image=1, image_size=1, shared_images=not model.obstacle)
    batch = collate(_make_examples())
    positions = batch["position_ids"]  # (1, positions)
    row = SCALE * torch.randn(*positions.shape, text.hidden_size, generator=torch.Generator().manual_seed(0))
    paths = batch["kv_index"].split(batch["cu_seqlens_k"].diff().tolist())
    alone = [language_model(inputs_embeds=row[:, path], use_cache=False).last_hidden_state for path in paths]
    prepare_packed_llava(model, image_policy, SDPA, source)
    bounds = (batch[name] for name in ("cu_seqlens_q", "kv_index", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    packed = model.run_language_model(row, positions, Packing(*bounds))  # (1, positions, width)
    pairs = [(packed[:, path], one) for path, one in zip(paths, alone, strict=True)]
    return max(((found - one).norm(dim=-1) / one.norm(dim=-1)).max().item() for found, one in pairs)


def _make_examples() -> list[dict]:
    """The records as `MemeDataset` gives them, with nothing to learn."""
    return [
        {
            "record_id": str(number),
            "input_ids": torch.tensor(tokens),
            "labels": torch.full((len(tokens),), -100),
            "image_paths": ("image",) * tokens.count(0),
            "pixel_values": [torch.zeros(3, 1, 1, dtype=torch.uint8)] * tokens.count(0),
        }
        for number, tokens in enumerate(PROOF_RECORDS)
    ]
