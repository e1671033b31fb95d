"""A batch written by hand, and the tiny world's model as training prepares it."""

from pathlib import Path

import torch
from conftest import IMAGE_SIZE, train_flags

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.model.llava import load_processing
from meme_llava.model.packed_attention import SDPA
from meme_llava.model.packed_llava import load_packed_llava
from meme_llava.model.trainable import prepare_trainable
from meme_llava.train.settings import parse_train_arguments

TOKENS_PER_IMAGE = 4


def make_example(image_token_id: int, images: list[str], words: list[int], supervised: int) -> dict:
    """A record: its images first, then words, the last `supervised` of which carry loss."""
    ids = torch.tensor([image_token_id] * TOKENS_PER_IMAGE * len(images) + words)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
    pixels = [torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 7 * len(name), dtype=torch.uint8) for name in images]
    return {
        "record_id": "r",
        "input_ids": ids,
        "labels": labels,
        "image_paths": tuple(Path(name) for name in images),
        "pixel_values": pixels,
    }


def make_batch(image_token_id: int, records: int = 4) -> dict:
    """Two records about one image that part after 3 words, one about two images, one of text; or the first of them."""
    examples = [
        make_example(image_token_id, ["a"], [1, 2, 3, 4, 5], supervised=2),
        make_example(image_token_id, ["a"], [1, 2, 3, 6, 7, 8], supervised=3),
        make_example(image_token_id, ["bb", "ccc"], [9, 10, 11], supervised=2),
        make_example(image_token_id, [], [12, 13, 14, 15, 16], supervised=4),
    ]
    return PackingCollator(image_token_id, TOKENS_PER_IMAGE, IMAGE_SIZE)(examples[:records])


def load_prepared(world, four_bit_on=None, change=lambda model: None, **changes):
    """The tiny world's model as train.py prepares it, in float32, without dropout; LoRA is no longer at its start.
    `change` is done to the base before."""
    flags = train_flags(world, world.folder / "unused", **{"lora_dropout": 0.0, **changes})
    processing = load_processing(world.base)
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA, four_bit_on=four_bit_on)
    change(model)
    model = prepare_trainable(model, parse_train_arguments(flags, description=""), seed=0).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # At zero the other matrix has no gradient.
            torch.nn.init.normal_(parameter, std=0.1)
    return model
