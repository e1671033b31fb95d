"""The loss: cross entropy at the supervised positions, without the logits of all of them at once."""

import torch
from torch import nn
from torch.nn import functional

# Positions whose logits exist at the same time: 156 MB in float32 with Qwen2's vocabulary of 152,064.
CHUNK = 256


class CrossEntropyHead(nn.Linear):
    """An LM head that turns hidden states straight into a loss. Called with hidden states alone it gives logits.

    The loss is computed inside the module's own forward pass, where engines that split weights have them at hand.
    """

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of weight times cross entropy, a float32 scalar.

        Args:
            hidden: (positions, width).
            targets: int64 (positions,).
            weights: float32 (positions,).
        """
        if targets is None:
            return super().forward(hidden)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        return ChunkedCrossEntropy.apply(hidden, self.weight, targets, weights, dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy of a linear layer, chunk by chunk; gradients are made where the logits are.

    Logits are computed once, in `dtype`, and become float32 for the softmax. torch's own linear_cross_entropy has no
    weight per position, and gives the loss in bfloat16 for hidden states in bfloat16.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, weights, dtype
    ):  # (positions, width), (vocabulary, width), 2 x (positions,)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)  # (vocabulary, width)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            for start in range(0, len(hidden), CHUNK):
                chunk = slice(start, start + CHUNK)
                states, chosen = hidden[chunk].to(dtype), targets[chunk, None]
                logits = functional.linear(states, matrix).float()  # (chunk, vocabulary)
                chosen_logits, largest = logits.gather(1, chosen), logits.amax(dim=-1, keepdim=True)
                exponentials = logits.sub_(largest).exp_()
                totals = exponentials.sum(dim=-1, keepdim=True)  # (chunk, 1)
                losses = totals.log() + largest - chosen_logits  # (chunk, 1)
                loss += (weights[chunk, None] * losses).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # The gradient of the logits: softmax minus one at the target.
                slope = exponentials.mul_(weights[chunk, None] / totals)
                slope = slope.scatter_add_(1, chosen, -weights[chunk, None]).to(dtype)
                if needs_hidden:
                    grad_hidden[chunk] = slope @ matrix
                if needs_weight:
                    grad_weight += slope.T @ states
                # The next chunk's logits take the place of these, not another one beside them.
                del logits, exponentials, slope
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
