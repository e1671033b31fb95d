"""Recomputed layers: the same gradients with less kept."""

import pytest
import torch
from batches import load_prepared, make_batch

from meme_llava.model.trainable import CheckpointedLayers, recompute_layers


def compute_gradients(model, recomputed: CheckpointedLayers) -> tuple[dict, int]:
    """Gradients of one batch by name, and the bytes that autograd kept for the backward pass."""
    recompute_layers(model, recomputed)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**make_batch(model.config.image_token_id))["loss"]
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(
    "recomputed", [CheckpointedLayers(1, 0), CheckpointedLayers(2, 0), CheckpointedLayers(2, 2)], ids=str
)
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_gradients_stay_the_same_to_the_bit(world, train_type, recomputed):
    model = load_prepared(world, train_type=train_type)
    expected, kept = compute_gradients(model, CheckpointedLayers())

    gradients, kept_less = compute_gradients(model, recomputed)

    assert expected.keys() == gradients.keys()
    assert all(torch.equal(expected[name], gradients[name]) for name in expected)
    assert kept_less < kept


def test_a_dropped_element_is_dropped_again(world):
    model = load_prepared(world, lora_dropout=0.5)
    results = []
    for recomputed in (CheckpointedLayers(), CheckpointedLayers(2, 2)):
        torch.manual_seed(0)
        results.append(compute_gradients(model, recomputed)[0])

    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_layers_can_keep_their_activations_again(world):
    model = load_prepared(world)
    _, kept = compute_gradients(model, CheckpointedLayers())
    compute_gradients(model, CheckpointedLayers(2, 2))

    assert compute_gradients(model, CheckpointedLayers())[1] == kept
