"""Muon and AdamW behind one optimizer, sharing a model's parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal before
it becomes an update, so that it changes all directions alike. A matrix trained from nothing learns from fewer examples;
the rate is another one than AdamW's, about 2e-2.
"""

from collections.abc import Sequence

import torch

from meme_llava.model.trainable import ParameterGroup

MOMENTUM_BUFFER = "momentum_buffer"
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (rows, columns) with all its singular values brought to between about 0.7 and 1.2.

    Jordan's Newton-Schulz iteration. He and torch.optim.Muon calculate in bfloat16; a CPU without instructions for that
    takes sixty times as long over it, so there it is float32.
    """
    first, third, fifth = NEWTON_SCHULZ_COEFFICIENTS
    result = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = result.T if is_tall else result
    result = result / result.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), result, beta=first)
    return (result.T if is_tall else result).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that use it, torch's AdamW for the others; one list of groups, one state."""

    def __init__(self, groups: Sequence[ParameterGroup]):
        settings = [
            {
                "params": list(group.parameters),
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
                "uses_muon": group.uses_muon,
            }
            for group in groups
        ]
        super().__init__(settings, {})
        others = [group for group in self.param_groups if not group["uses_muon"]]
        self._adamw = torch.optim.AdamW(others, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            if group["uses_muon"]:
                self._step_muon(group)
        if self._adamw:
            # Schedules change our groups, and load_state_dict puts others in the place of groups and state.
            self._adamw.param_groups = [group for group in self.param_groups if not group["uses_muon"]]
            self._adamw.state = self.state
            self._adamw.step()

    def _step_muon(self, group: dict) -> None:
        """With Nesterov's momentum; a tall matrix takes larger steps, as in Jordan's own code."""
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            momentum = self.state[matrix].setdefault(MOMENTUM_BUFFER, torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            update = orthogonalize(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)
