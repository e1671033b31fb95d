"""The loss of the LM head against torch's cross entropy of all logits."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from meme_llava.model import cross_entropy_head
from meme_llava.model.cross_entropy_head import CrossEntropyHead


@pytest.mark.parametrize("learns", [False, True])
def test_the_loss_head_is_plain_cross_entropy(learns, monkeypatch):
    """Three tiles, the last one not full; gradients of hidden states and, where it learns, of the matrix."""
    monkeypatch.setattr(cross_entropy_head, "LOGITS_ON_CPU", 20 * 130)
    torch.manual_seed(0)
    positions, width, vocabulary = 20, 8, 300
    head = CrossEntropyHead(width, vocabulary, bias=False).double()
    head.weight.requires_grad_(learns)
    hidden = torch.randn(positions, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (positions,))
    weights = torch.rand(positions)
    loss = head(hidden, targets, weights)
    (3 * loss).backward()
    ours = [hidden.grad.clone()] + ([head.weight.grad.clone()] if learns else [])
    hidden.grad = head.weight.grad = None
    losses = functional.cross_entropy(functional.linear(hidden, head.weight), targets, reduction="none")
    expected = (weights.double() * losses).sum()
    (3 * expected).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = [hidden.grad] + ([head.weight.grad] if learns else [])
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-4, atol=1e-6)
    assert torch.equal(head(hidden), functional.linear(hidden, head.weight))


def test_the_loss_of_half_precision_is_computed_in_float32():
    """2,000 positions of loss near 4: a sum in bfloat16 would be off by whole units."""
    torch.manual_seed(0)
    head = CrossEntropyHead(8, 50, bias=False).bfloat16()
    hidden, targets = torch.randn(2000, 8, dtype=torch.bfloat16), torch.randint(50, (2000,))
    logits = functional.linear(hidden, head.weight).float()
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    assert head(hidden, targets, torch.ones(2000)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_sure_answer_still_has_its_gradient_in_half_precision(monkeypatch):
    """The target's probability is 0.9998, which bfloat16 rounds to 1: its own part of the slope must not vanish."""
    monkeypatch.setattr(cross_entropy_head, "LOGITS_ON_CPU", 128)
    head = CrossEntropyHead(2, 256, bias=False).bfloat16().requires_grad_(False)
    head.weight.zero_()
    head.weight[200, 0], head.weight[3, 1] = 14, 1
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    head(hidden, torch.tensor([200]), torch.ones(1)).backward()
    others = 255 / (255 + 2.718281828**14)  # 2.12e-4
    expected = [-14 * others, 1 / (255 + 2.718281828**14)]
    assert hidden.grad[0].tolist() == pytest.approx(expected, rel=1e-2)


def test_a_head_that_learns_in_half_precision(monkeypatch):
    """Under autocast: gradients as near to those of float32 as bfloat16 allows."""
    monkeypatch.setattr(cross_entropy_head, "LOGITS_ON_CPU", 20 * 130)
    torch.manual_seed(0)
    head, targets = CrossEntropyHead(8, 300, bias=False), torch.randint(300, (20,))
    hidden, gradients = torch.randn(20, 8, requires_grad=True), []
    for half in (True, False):
        hidden.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            (3 * head(hidden, targets, torch.ones(20))).backward()
        gradients.append((hidden.grad, head.weight.grad))
    for near, exact in zip(*gradients, strict=True):
        assert near.dtype == torch.float32 and (near - exact).norm() < 1e-2 * exact.norm()


def test_without_gradients_only_the_loss_is_computed():
    head = CrossEntropyHead(8, 300, bias=False)  # learns
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(torch.randn(20, 8), torch.randint(300, (20,)), torch.ones(20))
    assert counter.get_total_flops() == 2 * 20 * 8 * 300


def test_a_batch_without_supervised_positions():
    head = CrossEntropyHead(8, 300, bias=False)
    hidden = torch.empty(0, 8, requires_grad=True)
    loss = head(hidden, torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 8) and not head.weight.grad.any()
