"""Knows how Muon and AdamW share a model's parameters behind one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal before
it becomes an update, so that it changes all directions alike. A matrix trained from nothing learns from fewer examples;
the rate is another one than AdamW's, about 2e-2.
"""

from collections.abc import Sequence

import torch

from meme_llava.trainable import ParameterGroup

MOMENTUM = "momentum_buffer"


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups that use it, torch's AdamW for the others; one list of groups, one state.

    Raises:
        ValueError: from torch, for a Muon group with anything but matrices.
    """

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
        self._parts = {True: torch.optim.Muon(self._list_groups(True))}
        if others := self._list_groups(False):
            self._parts[False] = torch.optim.AdamW(others, fused=True)

    def _list_groups(self, uses_muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group["uses_muon"] == uses_muon]

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        assert closure is None
        for uses_muon, part in self._parts.items():
            # Schedules change our groups, and load_state_dict puts others in the place of groups and state.
            part.param_groups, part.state = self._list_groups(uses_muon), self.state
            part.step()
