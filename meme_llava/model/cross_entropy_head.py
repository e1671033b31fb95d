"""An LM head that computes the loss of supervised positions without ever holding all of their logits.

Nothing about batches, images or LoRA.
"""

import torch
from torch import nn
from torch.nn import functional

# Logits that exist at the same time, positions times words. On CPUs they stay in the cache, which is worth a third of
# the time; GPUs want large matrix products: up to 340 MB with their probabilities.
LOGITS_ON_CPU = 3 * 2**20
LOGITS = 2**25
# Words at a time are a multiple of this: matrix products like round numbers.
WORDS_STEP = 128


class CrossEntropyHead(nn.Linear):
    """An LM head without bias that turns hidden states straight into a loss. Called with them alone it gives logits.

    The loss is computed inside the module's own forward pass, where engines that split weights have them at hand.
    """

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of weight times cross entropy, a float32 scalar.

        Args:
            hidden: (positions, width).
            targets: int64 (positions,).
            weights: float32 (positions,), wherever targets are given; `PackingCollator` sets them.
        """
        if targets is None:
            return super().forward(hidden)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        return TiledCrossEntropy.apply(hidden, self.weight, targets, weights, dtype, torch.is_grad_enabled())


class TiledCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy of a linear layer, some of its words at a time; gradients are made where the logits are.

    The gradient of log(sum(exp(hidden @ matrix.T))) is softmax(hidden @ matrix.T) @ matrix: attention of the hidden
    states over the words. So it is built as flash attention builds it (Dao et al., 2022, arXiv:2205.14135): each tile
    of words gives its mean and the logarithm of its sum, and means are joined by the shares of their sums. A position's
    target stays out of the means; its part, softmax minus one, is added from float32. A matrix that learns needs the
    sum of all words first: its gradient takes a second pass.

    Logits are computed in `dtype` and become float32 in the softmax. torch's own linear_cross_entropy has no weight per
    position, and gives the loss in bfloat16 for hidden states in bfloat16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, dtype, makes_gradients):
        """hidden (positions, width), weight (vocabulary, width), targets and weights (positions,) → scalar"""
        # What needs a gradient by itself needs none under no_grad, which is not seen from here.
        needs_hidden, needs_weight = (makes_gradients and needs for needs in ctx.needs_input_grad[:2])
        positions = len(hidden)
        states, targets, weights = hidden.to(dtype), targets[:, None], weights[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            # Each (positions, 1), but for the means: (positions, width).
            log_totals = torch.full_like(weights, -torch.inf)
            target_logits = torch.zeros_like(weights)
            means = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            for words in _divide_words(positions, weight):
                rows = weight[words].to(dtype)  # (tile, width)
                logits = functional.linear(states, rows)  # (positions, tile)
                place, is_here = _find_targets(targets, words)
                target_logits = torch.where(is_here, logits.gather(1, place).float(), target_logits)
                probabilities = logits.softmax(dim=1, dtype=torch.float32)
                # Where a probability is largest its logarithm is most exact.
                tile_totals = logits.amax(1, keepdim=True).float() - probabilities.amax(1, keepdim=True).log()
                if needs_hidden:
                    probabilities.scatter_(1, place, probabilities.gather(1, place) * ~is_here)
                    means.lerp_((probabilities.to(dtype) @ rows).float(), torch.sigmoid(tile_totals - log_totals))
                log_totals = torch.logaddexp(log_totals, tile_totals)
                # The next tile takes the place of this one, not another one beside it.
                del logits, probabilities
            loss = (weights * (log_totals - target_logits)).sum()
            grad_hidden = grad_weight = None
            if needs_hidden:
                excess = (target_logits - log_totals).expm1()
                grad_hidden = (weights * (means + excess * weight[targets[:, 0]])).to(hidden.dtype)
            if needs_weight:
                weighted = (weights * hidden).to(dtype)
                grad_weight = torch.empty_like(weight)
                for words in _divide_words(positions, weight):
                    slope = (functional.linear(states, weight[words].to(dtype)) - log_totals).exp()
                    place, is_here = _find_targets(targets, words)
                    slope.scatter_add_(1, place, -is_here.to(slope.dtype))
                    grad_weight[words] = slope.to(dtype).T @ weighted
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # In place: the matrix's gradient may be gigabytes, and nobody else reads it.
        gradients = [None if made is None else made.mul_(grad_loss) for made in ctx.saved_tensors]
        return *gradients, None, None, None, None


def _divide_words(positions: int, weight: torch.Tensor) -> list[slice]:
    """The rows of weight (vocabulary, width) that are looked at together."""
    logits = LOGITS_ON_CPU if weight.device.type == "cpu" else LOGITS
    step = max(logits // max(positions, 1) // WORDS_STEP, 1) * WORDS_STEP
    return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def _find_targets(targets: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's place among these words, any where it is not one of them, and whether it is one: (positions, 1)"""
    is_here = (targets >= words.start) & (targets < words.stop)
    return (targets - words.start).clamp(0, words.stop - words.start - 1), is_here
