"""Tests of flops.py: what a step costs, against torch's own count, and which devices are known."""

import dataclasses

import pytest
import torch
from batches import load_prepared, make_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meme_llava.errors import UserError
from meme_llava.model.accelerators import recognise_accelerator
from meme_llava.model.flops import StepCounts, TrainingCosts, count_batch
from meme_llava.train.planning.plan import find_accelerator, measure_ceiling


def test_counts_of_a_batch_are_those_of_its_tree():
    # Paths: 9 positions; 7 shared + 3 own; 11; 5. Pairs: 45; 3 x 7 + 6; 66; 15.
    counts = count_batch(make_batch(99))

    assert counts == StepCounts(positions=28, attention_pairs=45 + 27 + 66 + 15, images=3, supervised=11)


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

    # torch does not know that LoRA's products in place are products.
    in_place = {torch.ops.aten.addmm_: lambda own, left, right, **others: 2 * left[0] * left[1] * right[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**batch)["loss"].backward()

    # A head that learns computes its logits twice, which is no work of the model: 11 positions of width 32, 384 words.
    twice = 2 * 11 * 32 * 384 if train_type in ("freeze_vision", "full") else 0
    assert TrainingCosts.of_model(model).flops(counts) + twice == counter.get_total_flops()


def test_frozen_weights_cost_no_gradient_of_their_own(world):
    costs = TrainingCosts.of_model(load_prepared(world, train_type="projector"))

    forward, backward = costs.per_position
    assert forward == backward
    assert costs.per_encoded_image[1] == 0
    # Per image token 16 x 32 and 32 x 32 forward, both again for the weights, the second for its input.
    assert costs.per_image.tolist() == [2 * 4 * (512 + 1024), 2 * 4 * (512 + 2 * 1024)]


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090-d"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A800 40GB Active", "a800-40gb"),
    ],
)
def test_devices_are_recognised_by_their_own_name(device_name, name):
    assert recognise_accelerator(device_name).name == name == find_accelerator(name).name


@pytest.mark.parametrize(
    "device_name", ["NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_a_device_that_only_resembles_a_known_one_is_unknown(device_name):
    assert recognise_accelerator(device_name) is None


def test_an_unknown_machine_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="--accelerator b300: no known accelerator; there are a800-80gb, .*, cpu"):
        find_accelerator("b300")


def test_the_ceiling_of_a_cpu_is_measured():
    assert 1e9 < measure_ceiling(torch.device("cpu"), torch.float32) < 1e14
