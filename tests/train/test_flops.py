"""Tests of flops.py and accelerators.py: what a step costs, against torch's own count, and which devices are known."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, train_flags
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.errors import UserError
from meme_llava.model.attention_choice import SDPA
from meme_llava.model.llava import load_processing
from meme_llava.model.packed_llava import load_packed_llava
from meme_llava.model.trainable import prepare_trainable
from meme_llava.train.planning.accelerators import find_accelerator, measure_ceiling, recognise_accelerator
from meme_llava.train.planning.flops import Flops, StepCounts, TrainingCosts, count_batch
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


def make_batch(image_token_id: int) -> dict:
    """Two records about one image that part after 3 words, one about two images, one of text."""
    examples = [
        make_example(image_token_id, ["a"], [1, 2, 3, 4, 5], supervised=2),
        make_example(image_token_id, ["a"], [1, 2, 3, 6, 7, 8], supervised=3),
        make_example(image_token_id, ["bb", "ccc"], [9, 10, 11], supervised=2),
        make_example(image_token_id, [], [12, 13, 14, 15, 16], supervised=4),
    ]
    return PackingCollator(image_token_id, TOKENS_PER_IMAGE, IMAGE_SIZE)(examples)


def load_prepared(world, **changes):
    """The tiny world's model as train.py prepares it, in float32, without dropout; LoRA is no longer at its start."""
    flags = train_flags(world, world.folder / "unused", **{"lora_dropout": 0.0, **changes})
    processing = load_processing(world.base)
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    model = prepare_trainable(model, parse_train_arguments(flags, description=""), seed=0).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # At zero the other matrix has no gradient.
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_counts_of_a_batch_are_those_of_its_tree():
    # Paths: 9 positions; 7 shared + 3 own; 11; 5. Pairs: 45; 3 x 7 + 6; 66; 15.
    counts = count_batch(make_batch(99))

    assert counts == StepCounts(
        positions=28, attention_pairs=45 + 27 + 66 + 15, images=3, encoded_images=3, supervised=11
    )


def test_cached_features_are_not_encoded_again():
    batch = make_batch(99)
    batch["vision_features"] = torch.zeros(len(batch.pop("pixel_values")), TOKENS_PER_IMAGE, 16)

    counts = count_batch(batch)

    assert (counts.images, counts.encoded_images) == (3, 0)


def test_counts_of_batches_add_up():
    counts = count_batch(make_batch(99))

    assert sum([counts, counts], StepCounts()).attention_pairs == 2 * counts.attention_pairs


@pytest.mark.parametrize("train_type", ["lora", "projector", "freeze_vision", "full"])
def test_costs_are_what_torch_counts(world, train_type):
    model = load_prepared(world, train_type=train_type)
    batch = make_batch(model.config.image_token_id)
    # torch counts every product of a segment's queries and its path's keys, seen or not, where it counts attention at
    # all: on a CPU only when it is computed as plain matrix products.
    products = int((batch["cu_seqlens_q"].diff() * batch["cu_seqlens_k"].diff()).sum())
    counts = dataclasses.replace(count_batch(batch), attention_pairs=products)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()

    assert TrainingCosts.of_model(model).flops(counts) == counter.get_total_flops()


def test_frozen_weights_cost_no_gradient_of_their_own(world):
    costs = TrainingCosts.of_model(load_prepared(world, train_type="projector"))

    assert costs.per_position.weight_gradients == 0
    assert costs.per_position.input_gradients == costs.per_position.forward
    assert costs.per_encoded_image.input_gradients == costs.per_encoded_image.weight_gradients == 0
    # Per image token 16 x 32 and 32 x 32 forward, both again for the weights, the second for its input.
    assert costs.per_image == Flops(2 * 4 * (512 + 1024), 2 * 4 * 1024, 2 * 4 * (512 + 1024))


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A10", "a10"),
    ],
)
def test_devices_are_recognised_by_their_own_name(device_name, name):
    assert recognise_accelerator(device_name).name == name == find_accelerator(name).name


@pytest.mark.parametrize(
    "device_name", ["NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_a_device_that_only_resembles_a_known_one_is_unknown(device_name):
    assert recognise_accelerator(device_name) is None


def test_an_unknown_machine_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="--accelerator b300: no known accelerator; there are a800-80gb, .*, cpu"):
        find_accelerator("b300")


def test_the_ceiling_of_a_cpu_is_measured():
    assert 1e9 < measure_ceiling(torch.device("cpu"), torch.float32) < 1e14
