"""The state of training tensor by tensor: float32 trainable weights and Adam's two moments.

Whatever the engine and however it divides them, each is handed out whole, and taken back whole. So a checkpoint depends
on neither the engine nor the number of processes, and holds no pickle. All processes must make every call together.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from meme_llava.distributed.environment import DEEPSPEED, FSDP, Engine, count_processes, find_rank, is_main_process
from meme_llava.errors import CheckpointError
from meme_llava.model.trainable import ParameterGroup
from meme_llava.storage.tensor_writer import PlannedTensor, write_file

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER_PREFIX = "optimizer-"


class TrainingState:
    """What a running engine has learned.

    Args:
        groups: what learns, as it was before the engine took it.
        optimizer: torch's AdamW, or DeepSpeed's ZeRO optimizer around it.
    """

    def __init__(self, engine: Engine, groups: Sequence[ParameterGroup], optimizer):
        self._uses_deepspeed, self._zero_stage = engine.kind == DEEPSPEED, engine.zero_stage
        self._optimizer = optimizer
        self._adam: torch.optim.Optimizer = optimizer.optimizer if self._uses_deepspeed else optimizer
        held = [parameter for group in groups for parameter in group.parameters]
        names = [name for group in groups for name in group.names]
        shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in held]
        self._shapes = dict(zip(names, shapes, strict=True))
        # Every moment as (name of the weight, name of the moment).
        self._keys = [(name, moment) for name in names for moment in MOMENTS]
        if engine.kind == FSDP:
            # It put others in the place of the parameters that the groups name, in the same order.
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._parameters = dict(zip(names, held, strict=True))

    @property
    def nbytes(self) -> int:
        """What a checkpoint's tensors, all float32, take on disk."""
        return sum(4 * (1 + len(MOMENTS)) * torch.Size(shape).numel() for shape in self._shapes.values())

    def gather_weights(self) -> dict[str, torch.Tensor]:
        """Every weight that learns, float32, by its name before the engine took it; empty but in the main process."""
        gathered = ((name, self._gather(name, None)) for name in self._shapes)
        return {name: weight.cpu() for name, weight in gathered if is_main_process()}

    def write_moments(self, folder: Path) -> list[Path]:
        """Write the moments, each process its share of them; returns the files that this process wrote. Raises OSError
        where one cannot be written, after all processes have taken part."""
        self._create_moments()
        rank, processes = find_rank(), count_processes()
        stream = ((key, self._gather(*key)) for key in self._keys)
        planned = {
            f"{key[1]}/{key[0]}": PlannedTensor(torch.float32, self._shapes[key[0]], _take(stream, key))
            for key in self._keys[rank::processes]
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
        """Take up what a checkpoint holds. Raises CheckpointError where a tensor is missing, unexpected or of another
        shape.

        Args:
            folder: with the files of `write_moments`, of however many processes.
            weights: every weight that learns, float32, as `gather_weights` gave them; None where the engine already has
                them to the last bit.
            updates: what `count_updates` gave.
        """
        self._create_moments()
        for state in self._adam.state.values():
            state["step"].fill_(updates)
        missing = {f"{moment}/{name}": (name, moment) for name, moment in self._keys}
        for path in sorted(folder.glob(f"{OPTIMIZER_PREFIX}*.safetensors")):
            with safe_open(path, "pt") as file:
                for stored in file.keys():
                    if stored not in missing:
                        raise CheckpointError(f"{path}: the optimizer tensor {stored} is not of this model")
                    self._scatter(*missing.pop(stored), file.get_tensor(stored))
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} optimizer tensors are missing, e.g. {min(missing)}")
        for name, weight in (weights or {}).items():
            self._scatter(name, None, weight)

    def _create_moments(self) -> None:
        """Give Adam zeros where it has not made an update yet, as it would itself."""
        held = list(self._parameters.values())
        if self._uses_deepspeed:
            # The flat float32 pieces that ZeRO made of the parameters.
            stage_3 = self._zero_stage == 3
            attribute = "fp32_partitioned_groups_flat" if stage_3 else "single_partition_of_fp32_groups"
            held = list(getattr(self._optimizer, attribute))
        for tensor in held:
            state = self._adam.state[tensor]
            if state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format).detach()
        if self._uses_deepspeed and self._zero_stage != 3:
            # DeepSpeed links every group's moments when it has updated the first group, and so misses the others'.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _gather(self, name: str, moment: str | None) -> torch.Tensor:
        """The whole of a moment, or of the weight itself."""
        parameter = self._parameters[name]
        if self._zero_stage == 3:
            return self._optimizer.get_full_hp_param(parameter, moment)
        if self._uses_deepspeed:
            return parameter.get_full_hp_param(moment)
        tensor = parameter.detach() if moment is None else self._adam.state[parameter][moment]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _scatter(self, name: str, moment: str | None, value: torch.Tensor) -> None:
        """Put a whole moment, or weight, into what this process holds of it."""
        parameter, shape, value = self._parameters[name], self._shapes[name], value.float()
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{name}: is {tuple(value.shape)} in the checkpoint, {shape} in the model")
        if self._zero_stage == 3:
            # The piece of the flattened tensor that ZeRO-3 keeps here; the last process's is filled up with zeros.
            size = parameter.ds_tensor.numel()
            own = value.flatten()[find_rank() * size :][:size]
            self._optimizer.set_local_hp_param(functional.pad(own, (0, size - len(own))), parameter, moment)
        elif self._uses_deepspeed:
            parameter.set_full_hp_param(value, moment)
        else:
            tensor = parameter.data if moment is None else self._adam.state[parameter][moment]
            if isinstance(tensor, DTensor):
                value = value.to(tensor.to_local().device)
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
                tensor = tensor.to_local()
            tensor.copy_(value)


def _take(stream: Iterator, wanted: tuple):
    """A maker of pieces that goes on in the shared stream until it comes to the wanted tensor."""

    def make_pieces() -> Iterator[torch.Tensor]:
        for key, tensor in stream:
            if key == wanted:
                yield tensor.detach().float().cpu().contiguous()
                return

    return make_pieces
