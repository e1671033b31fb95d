"""The optimizer of a run: torch's AdamW, and its Muon beside it where a group asks for that."""

from collections.abc import Sequence

import torch

from meme_llava.model.trainable import ParameterGroup

MOMENTUM_BUFFER = "momentum_buffer"  # torch.optim.Muon's name for its only moment


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """AdamW with each group's rate and decay; Muon beside it where a group uses it."""
    if any(group.uses_muon for group in groups):
        return MuonWithAdamW(groups)
    options = [
        {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return torch.optim.AdamW(options, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that use it, AdamW for the others; one list of groups, one state."""

    def __init__(self, groups: Sequence[ParameterGroup]):
        self._parts: dict[bool, torch.optim.Optimizer] = {}  # by uses_muon
        settings = []
        for group in groups:
            own = {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
            if group.uses_muon not in self._parts:
                options = {} if group.uses_muon else {"fused": True}
                make = torch.optim.Muon if group.uses_muon else torch.optim.AdamW
                self._parts[group.uses_muon] = make([own], **options)
            settings.append({**self._parts[group.uses_muon].defaults, **own, "uses_muon": group.uses_muon})
        super().__init__(settings, {})

    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        assert closure is None
        for uses_muon, part in self._parts.items():
            # Schedules change our groups, and load_state_dict puts others in the place of groups and state.
            part.param_groups = [group for group in self.param_groups if group["uses_muon"] is uses_muon]
            part.state = self.state
            part.step()
