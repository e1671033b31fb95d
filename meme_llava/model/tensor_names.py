"""Names of a LLaVA's tensors, in memory and on disk.

Files use the classic LLaVA layout, which old and new transformers read:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.*`.
Modules in memory are named as transformers 5 names them: `model.vision_tower.*`, … and `lm_head.*`.
"""

from collections.abc import Iterable

from meme_llava.errors import UserError
from meme_llava.storage.tensor_reader import TensorReader

# (in memory, on disk); the first match wins.
_PREFIXES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def to_disk_name(name: str) -> str:
    """`model.vision_tower.x` → `vision_tower.vision_model.x`, and so on for every part of a LLaVA."""
    for in_memory, on_disk in _PREFIXES:
        if name.startswith(in_memory):
            return on_disk + name.removeprefix(in_memory)
    raise ValueError(f"tensor {name!r} belongs to no part of a LLaVA")


def to_memory_name(name: str) -> str:
    """The inverse of `to_disk_name`."""
    for in_memory, on_disk in _PREFIXES:
        if name.startswith(on_disk):
            return in_memory + name.removeprefix(on_disk)
    raise ValueError(f"tensor {name!r} is not in the classic LLaVA layout")


def find_stored(tensors: TensorReader, name: str) -> str:
    """The name on disk of a LLaVA's parameter in memory; a tied head is stored as the embedding."""
    disk_name = to_disk_name(name)
    if disk_name not in tensors and name == "lm_head.weight":
        return to_disk_name("model.language_model.embed_tokens.weight")
    return disk_name


def check_same_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Raise UserError unless both name the same tensors."""
    expected, found = set(expected), set(found)
    if missing := sorted(expected - found):
        raise UserError(f"{source}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}")
    if unexpected := sorted(found - expected):
        raise UserError(f"{source}: {len(unexpected)} tensors are unexpected, e.g. {', '.join(unexpected[:3])}")
