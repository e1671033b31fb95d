"""The engines that can train: one process, copies on several devices, or state sharded among them.

An engine is one word: `single`, `ddp`, or the name of a file in configs/deepspeed or configs/fsdp. Without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava import CONFIGS
from meme_llava.errors import UserError

AUTO, SINGLE, DDP = "auto", "single", "ddp"
DEEPSPEED, FSDP = "deepspeed", "fsdp"


@dataclass(frozen=True)
class Engine:
    """What holds weights, gradients and optimizer state of a run, and on how many devices.

    Args:
        kind: whose code it is.
        config: the content of its file; empty where there is none.
    """

    name: str
    kind: Literal["single", "ddp", "deepspeed", "fsdp"]
    path: Path | None = None
    config: Mapping = field(default_factory=dict)

    @property
    def zero_options(self) -> Mapping:
        """The "zero_optimization" part of a DeepSpeed file."""
        return self.config.get("zero_optimization", {})

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None without DeepSpeed."""
        return self.zero_options.get("stage", 0) if self.kind == DEEPSPEED else None

    @property
    def shards_weights(self) -> bool:
        """Whether a forward pass gathers weights from all processes, so that all must make it."""
        return self.kind == FSDP or self.zero_stage == 3


def list_engines() -> dict[str, Path | None]:
    """Every engine's name with its file, None where it has none."""
    files = [path for kind in (DEEPSPEED, FSDP) for path in sorted((CONFIGS / kind).glob("*.json"))]
    return {SINGLE: None, DDP: None, **{path.stem: path for path in files}}


def check_engine_name(name: str) -> None:
    """Raise UserError unless there is an engine of that name."""
    known = (AUTO, *list_engines())
    if name not in known:
        raise UserError(f"--engine {name}: no such engine; there are {', '.join(known)}")


def choose_engine(name: str, processes: int, on_gpu: bool, muon_lr: float | None = None) -> Engine:
    """The engine of that name; `auto` is one process where there is one, ZeRO-2 on several GPUs, else DDP.

    Raises:
        UserError: there is none of that name, it does not go with that many processes or with Muon, or its file is
            wrong.
    """
    if name == AUTO:
        name = SINGLE if processes == 1 else "zero2" if on_gpu else DDP
    check_engine_name(name)
    if name == SINGLE and processes > 1:
        raise UserError(f"--engine {SINGLE} is for one process, the launcher started {processes}; choose another")
    path = list_engines()[name]
    if path is None:
        # Copies on one device are one copy.
        return Engine(SINGLE, SINGLE) if processes == 1 else Engine(name, name)
    kind = path.parent.name
    if kind == FSDP and processes == 1:
        raise UserError(f"--engine {name} divides state among several processes, and there is one; choose {SINGLE}")
    if muon_lr is not None:
        raise UserError(
            f"--muon_lr: Muon needs whole matrices, and --engine {name} divides them; pass --engine single or ddp, or "
            "leave --muon_lr out"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"{path}: remove its key {key!r}, which would replace the two learning rates")
    if kind == FSDP and config.get("version") != 2:
        raise UserError(f'{path}: expected "version": 2; FSDP1 flattens what learns together with what does not')
    return Engine(name, kind, path, config)
