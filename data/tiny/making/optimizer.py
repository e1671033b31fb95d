"""Muon for the matrices of layers, all of a shape at once, and AdamW for everything else."""

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, for five Newton-Schulz steps
MOMENTUM = 0.95


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Matrices (count, rows, columns) with all their singular values brought near 1, computed in `dtype`."""
    first, third, fifth = COEFFICIENTS
    result = matrices.to(dtype)
    is_tall = result.shape[1] > result.shape[2]
    result = result.transpose(1, 2) if is_tall else result
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = result @ result.transpose(1, 2)
        result = first * result + (third * gram + fifth * gram @ gram) @ result
    return (result.transpose(1, 2) if is_tall else result).to(matrices.dtype)


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates it: matrices inside of layers, no embeddings, no heads."""
    return parameter.dim() == 2 and ".layers." in name


class Optimizer:
    """Both, for the parameters of some modules, with the peak rates of a stage. Muon computes in `dtype`."""

    def __init__(
        self, modules: nn.ModuleDict, names: tuple[str, ...], muon_rate: float, rate: float, dtype=torch.float32
    ):
        named = [(f"{key}.{name}", parameter) for key in names for name, parameter in modules[key].named_parameters()]
        self.muon_rate, self.rate, self.dtype = muon_rate, rate, dtype
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for name, parameter in named:
            if is_layer_matrix(name, parameter):
                shapes.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(shapes.values())
        self.momenta = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        others = [parameter for name, parameter in named if not is_layer_matrix(name, parameter)]
        self.adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
        self.parameters = [parameter for _, parameter in named]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update at this share of the peak rates; gradients are forgotten."""
        if not share:
            for parameter in self.parameters:
                parameter.grad = None
            return
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradients = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonalize(gradients.lerp(momentum, MOMENTUM), self.dtype)
            rate = share * self.muon_rate
            scale = rate * max(1, momentum.shape[1] / momentum.shape[2]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * 0.1)
            torch._foreach_add_(group, list(updates.unbind(0)), alpha=-scale)
        for settings in self.adamw.param_groups:
            settings["lr"] = share * self.rate
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
