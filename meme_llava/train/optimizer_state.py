"""The state of training tensor by tensor: float32 trainable weights and Adam's two moments, or Muon's one.

Whatever the engine and however it divides them, each is handed out whole, and taken back whole. So a checkpoint depends
on neither the engine nor the number of processes, and holds no pickle. All processes must make every call together.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from meme_llava.distributed.engines import DEEPSPEED, FSDP, Engine
from meme_llava.errors import CheckpointError
from meme_llava.model.trainable import ParameterGroup
from meme_llava.storage.tensor_writer import PlannedTensor, write_file
from meme_llava.train.prepared_run import MOMENTUM_BUFFER

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER_PREFIX = "optimizer-"
MUON_MOMENTS = (MOMENTUM_BUFFER,)
FLOAT32_BYTES = 4


class TrainingState:
    """What a running engine has learned.

    Args:
        groups: what learns, as it was before the engine took it.
        optimizer: torch's AdamW, or DeepSpeed's ZeRO optimizer around it, or a MuonWithAdamW.
    """

    def __init__(self, engine: Engine, groups: Sequence[ParameterGroup], optimizer):
        self._engine = engine
        self._optimizer = optimizer
        self._shapes = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for group in groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }
        self._moments = {name: MUON_MOMENTS if group.uses_muon else MOMENTS for group in groups for name in group.names}
        self._parameters = dict(zip(self._shapes, self._list_parameters(groups), strict=True))

    @property
    def nbytes(self) -> int:
        """What a checkpoint's tensors take on disk."""
        return FLOAT32_BYTES * sum(
            (1 + len(self._moments[name])) * torch.Size(shape).numel() for name, shape in self._shapes.items()
        )

    def gather_weights(self) -> dict[str, torch.Tensor]:
        """Every weight that learns, float32, by its name before the engine took it; empty but in the main process."""
        is_main = not distributed.is_initialized() or distributed.get_rank() == 0
        weights = {}
        for name in self._shapes:
            weight = self._gather(name, None)
            if is_main:
                weights[name] = weight.cpu()
        return weights

    def write_moments(self, folder: Path) -> list[Path]:
        """Write the moments, each process its share of them; returns the files that this process wrote.

        Raises:
            OSError: a file cannot be written; after all processes have taken part.
        """
        self._create_moments()
        rank, processes = 0, 1
        if distributed.is_initialized():
            rank, processes = distributed.get_rank(), distributed.get_world_size()
        keys = self._list_moments()
        stream = ((key, self._gather(*key)) for key in keys)
        planned = {
            _to_file_name(*key): PlannedTensor(torch.float32, self._shapes[key[0]], _take(stream, key))
            for key in keys[rank::processes]
        }
        path = folder / f"{OPTIMIZER_PREFIX}{rank + 1:05d}-of-{processes:05d}.safetensors"
        try:
            if planned:
                write_file(path, planned)
        finally:
            # The others need this process to gather what is theirs.
            for _ in stream:
                pass
        return [path] if planned else []

    def count_updates(self) -> int:
        """Updates that Adam has made. Raises CheckpointError when tensors do not agree."""
        counts = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        if len(counts) > 1:
            raise CheckpointError(f"the optimizer's tensors were updated {sorted(counts)} times; expected one number")
        return counts.pop() if counts else 0

    def load(self, folder: Path, weights: dict[str, torch.Tensor] | None, updates: int) -> None:
        """Take up what a checkpoint holds.

        Args:
            folder: with the files of `write_moments`, of however many processes.
            weights: every weight that learns, float32, as `gather_weights` gave them; None where the engine already has
                them to the last bit.
            updates: what `count_updates` gave.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape.
        """
        self._create_moments()
        for state in self._adam.state.values():
            if "step" in state:
                state["step"].fill_(updates)
        files = {}
        for path in sorted(folder.glob(f"{OPTIMIZER_PREFIX}*.safetensors")):
            with safe_open(path, "pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        expected = {_to_file_name(name, moment) for name, moment in self._list_moments()}
        if wrong := sorted(expected ^ set(files)):
            raise CheckpointError(f"{folder}: {len(wrong)} optimizer tensors are missing or too many, e.g. {wrong[0]}")
        for path in sorted(set(files.values())):
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    moment, name = key.split("/", 1)
                    self._scatter(name, moment, file.get_tensor(key))
        for name, weight in (weights or {}).items():
            self._scatter(name, None, weight)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer if self._engine.kind == DEEPSPEED else self._optimizer

    def _list_parameters(self, groups: Sequence[ParameterGroup]) -> list[nn.Parameter]:
        if self._engine.kind == FSDP:
            # It put others in the place of the parameters that the groups name, in the same order.
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return [parameter for group in groups for parameter in group.parameters]

    def _list_moments(self) -> list[tuple[str, str]]:
        return [(name, moment) for name in self._shapes for moment in self._moments[name]]

    def _list_held(self) -> list[torch.Tensor]:
        """What Adam updates: the parameters, or the flat float32 pieces that ZeRO made of them."""
        if self._engine.kind != DEEPSPEED:
            return list(self._parameters.values())
        if self._engine.zero_stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _create_moments(self) -> None:
        """Give the optimizer zeros where it has not made an update yet, as it would itself."""
        moments_of = {id(self._parameters[name]): moments for name, moments in self._moments.items()}
        for held in self._list_held():
            state = self._adam.state[held]
            if not state:
                # ZeRO's flat pieces are not parameters of ours; only Adam comes with it.
                moments = moments_of.get(id(held), MOMENTS)
                if moments == MOMENTS:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
                for moment in moments:
                    state[moment] = torch.zeros_like(held, memory_format=torch.preserve_format).detach()
        if self._engine.kind == DEEPSPEED and self._engine.zero_stage != 3:
            # DeepSpeed links every group's moments when it has updated the first group, and so misses the others'.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _gather(self, name: str, moment: str | None) -> torch.Tensor:
        parameter = self._parameters[name]
        if self._engine.kind == DEEPSPEED:
            if self._engine.zero_stage == 3:
                return self._optimizer.get_full_hp_param(parameter, moment)
            return parameter.get_full_hp_param(moment)
        tensor = parameter.detach() if moment is None else self._adam.state[parameter][moment]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _scatter(self, name: str, moment: str | None, value: torch.Tensor) -> None:
        parameter, shape = self._parameters[name], self._shapes[name]
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{name}: is {tuple(value.shape)} in the checkpoint, {shape} in the model")
        value = value.float()
        if self._engine.kind == DEEPSPEED:
            if self._engine.zero_stage == 3:
                self._optimizer.set_local_hp_param(_cut_partition(value, parameter), parameter, moment)
            else:
                parameter.set_full_hp_param(value, moment)
            return
        tensor = parameter.data if moment is None else self._adam.state[parameter][moment]
        if isinstance(tensor, DTensor):
            value = value.to(tensor.to_local().device)
            tensor.to_local().copy_(
                distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            )
        else:
            tensor.copy_(value)


def _take(stream: Iterator, wanted: tuple):
    """A maker of pieces that goes on in the shared stream until it comes to the wanted tensor."""

    def make_pieces() -> Iterator[torch.Tensor]:
        for key, tensor in stream:
            if key == wanted:
                yield tensor.detach().float().cpu().contiguous()
                return

    return make_pieces


def _cut_partition(value: torch.Tensor, parameter) -> torch.Tensor:
    """The piece of a flattened tensor that ZeRO-3 keeps in this process; the last one is filled up with zeros."""
    size = parameter.ds_tensor.numel()
    start = distributed.get_rank() * size
    piece = value.new_zeros(size)
    own = value.flatten()[start : start + size]
    piece[: len(own)] = own
    return piece


def _to_file_name(name: str, moment: str) -> str:
    return f"{moment}/{name}"
