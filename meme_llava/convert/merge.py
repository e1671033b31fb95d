"""Merging of a base and trained weights into one standalone model, tensor by tensor."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from meme_llava.convert.rounding import Rounding, plan_rounded
from meme_llava.errors import UserError
from meme_llava.model.llava import PROJECTOR, to_disk_name
from meme_llava.storage.files import hash_file, write_json
from meme_llava.storage.run_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS, read_run_record
from meme_llava.storage.tensor_reader import WEIGHTS, WEIGHTS_INDEX, TensorReader, open_model_tensors
from meme_llava.storage.tensor_writer import PlannedTensor, count_bytes, write_tensors

PEFT_PREFIX = "base_model.model."
# float32 elements of a piece: a few such pieces fit in a processor's cache.
PIECE_ELEMENTS = 4_000_000
# What peft can store and a plain W + scale * B A would get wrong.
UNMERGED_KINDS = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
)
# Ways to start LoRA that change the base's weights, so the stored base is not what the adapter belongs to.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")
COPIED_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class LoraPair:
    """Names of the two matrices in the adapter's file, A (r, in) and B (out, r), and the factor of their product."""

    first: str
    second: str
    scale: float


@dataclass(frozen=True)
class TrainedWeights:
    """What training changed, by names on disk: LoRA pairs, and tensors that replace the base's (names in `tensors`)."""

    tensors: TensorReader
    lora: dict[str, LoraPair]
    replaced: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "TrainedWeights":
        """Read an output or checkpoint of train.py; the tensors themselves stay on disk.

        Raises:
            UserError: the adapter uses a kind of LoRA that is not merged here, or a tensor is missing or fits nowhere.
        """
        learned = sum(group["tensors"] for group in read_run_record(folder)["parameter_groups"])
        if not (folder / ADAPTER_CONFIG).is_file():
            tensors = _open_counted(folder / TRAINED_WEIGHTS, learned)
            return cls(tensors, {}, {name: name for name in tensors})
        config = PeftConfig.from_pretrained(folder)
        _check_lora_kind(config, folder)
        path = folder / ADAPTER_WEIGHTS
        tensors = _open_counted(path, learned)
        lora, replaced = {}, {}
        for name in tensors:
            module = name.removeprefix(PEFT_PREFIX)
            if module.endswith(".lora_A.weight"):
                module = module.removesuffix(".lora_A.weight")
                second = name.replace(".lora_A.", ".lora_B.")
                if second not in tensors:
                    raise UserError(f"{path}: {module} has lora_A but no lora_B")
                scale = _find_scale(config, module, tensors.stored[name].shape[0], path)
                lora[to_disk_name(f"{module}.weight")] = LoraPair(name, second, scale)
            elif module.endswith(".lora_B.weight"):
                if name.replace(".lora_B.", ".lora_A.") not in tensors:
                    raise UserError(f"{path}: {name} has no lora_A")
            elif PROJECTOR in module.split("."):
                replaced[to_disk_name(module)] = name
            else:
                raise UserError(f"{path}: tensor {name} is neither LoRA nor projector")
        return cls(tensors, lora, replaced)

    def __enter__(self) -> "TrainedWeights":
        return self

    def __exit__(self, *error) -> None:
        self.tensors.__exit__(*error)

    def check_fits(self, base: TensorReader, folder: Path) -> None:
        """Raise UserError unless every trained tensor has its counterpart of the same shape in the base."""
        unknown = sorted((self.lora.keys() | self.replaced.keys()) - set(base))
        if unknown:
            raise UserError(f"{folder}: has no tensor for {len(unknown)} trained ones, e.g. {unknown[0]}")
        stored = self.tensors.stored
        for name, pair in self.lora.items():
            first, second = stored[pair.first].shape, stored[pair.second].shape
            if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
                raise UserError(f"{name}: lora_A is {first}, lora_B {second}; expected (r, in) and (out, r)")
            _check_shape(name, base.stored[name].shape, (second[0], first[1]))
        for name, own_name in self.replaced.items():
            _check_shape(name, base.stored[name].shape, stored[own_name].shape)

    def merge(self, base: TensorReader, name: str, tally: "MergeTally | None" = None) -> Iterator[torch.Tensor]:
        """One tensor of the merged model as float32 pieces in order: W + scale * B A, or what replaces it, or W."""
        if name in self.replaced:
            yield from (piece.float() for piece in self.tensors.read_pieces(self.replaced[name], reuse=True))
            used = [self.replaced[name]]
        elif name in self.lora:
            yield from self._merge_lora(base, name, tally)
            used = [self.lora[name].first, self.lora[name].second]
        else:
            yield from (piece.float() for piece in base.read_pieces(name, reuse=True))
            used = []
        if tally is not None:
            tally.written[name] += 1
            tally.used.update(used)

    def _merge_lora(self, base: TensorReader, name: str, tally: "MergeTally | None") -> Iterator[torch.Tensor]:
        pair = self.lora[name]
        first, second = self.tensors.read(pair.first).float(), self.tensors.read(pair.second).float()
        rows, columns = base.stored[name].shape
        before, change = 0.0, 0.0  # squared norms
        # Equal shares: a last piece of up to three rows would be multiplied by another routine, with other last bits.
        count = max(1, math.ceil(rows * columns / PIECE_ELEMENTS))
        for index in range(count):
            start, stop = rows * index // count, rows * (index + 1) // count
            weight = base.read_rows(name, start, stop).float()  # (stop - start, in)
            update = (second[start:stop] @ first).mul_(pair.scale)  # (stop - start, in)
            if tally is not None:
                before += torch.linalg.vector_norm(weight).item() ** 2
                change += torch.linalg.vector_norm(update).item() ** 2
            yield update.add_(weight)
        if tally is not None:
            tally.relative_change[name] = math.sqrt(change / max(before, 1e-24))


@dataclass
class MergeTally:
    """What was written and used, to be held against what there was."""

    written: Counter = field(default_factory=Counter)  # names on disk
    used: Counter = field(default_factory=Counter)  # names in the adapter
    relative_change: dict[str, float] = field(default_factory=dict)  # |scale * B A| / |W|, Frobenius norms

    def check(self, base: TensorReader, trained: TrainedWeights) -> None:
        """Raise RuntimeError unless every tensor of both was used exactly once."""
        for title, counts, names in (("base", self.written, set(base)), ("trained", self.used, set(trained.tensors))):
            wrong = {name: counts[name] for name in names | set(counts) if counts[name] != (name in names)}
            if wrong:
                raise RuntimeError(f"{len(wrong)} {title} tensors were not used exactly once, e.g. {min(wrong)}")


def plan_merged(
    base: TensorReader, trained: TrainedWeights, rounding: Rounding, tally: MergeTally
) -> dict[str, PlannedTensor]:
    """All tensors of the merged model, in the order in which the base's files hold them."""

    def plan(name: str) -> PlannedTensor:
        return plan_rounded(name, base.stored[name].shape, rounding, lambda: trained.merge(base, name, tally))

    return {name: plan(name) for name in base.list_in_file_order()}


def write_merged(
    base_folder: Path,
    trained: TrainedWeights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str,
    show_progress: Callable,
) -> dict:
    """Write the merged model to `folder`, computed in float32 and rounded once to `dtype`.

    Args:
        show_progress: `terminal.show_bytes`.

    Returns:
        The summary for the run record.

    Raises:
        UserError: a trained tensor has no counterpart, a value would not be finite in `dtype`, or the disk is full.
    """
    rounding, tally = Rounding(dtype), MergeTally()
    with open_model_tensors(base_folder) as base:
        trained.check_fits(base, base_folder)
        planned = plan_merged(base, trained, rounding, tally)
        with show_progress("merging", count_bytes(planned)) as advance:
            write_tensors(planned, folder, max_shard_size, advance)
        rounding.check()
        tally.check(base, trained)
    for file_name in COPIED_FILES:
        shutil.copyfile(base_folder / file_name, folder / file_name)
    _set_config_dtype(folder / "config.json", dtype)
    most_changed = max(tally.relative_change, key=tally.relative_change.get, default=None)
    identity = folder / (WEIGHTS_INDEX if (folder / WEIGHTS_INDEX).is_file() else WEIGHTS)
    return {
        "tensors": len(planned),
        "bytes": count_bytes(planned),
        "lora_merged": len(trained.lora),
        "replaced": len(trained.replaced),
        "largest_relative_lora_change": round(tally.relative_change.get(most_changed, 0.0), 4),
        "most_changed": most_changed,
        "overflow_count": sum(rounding.overflow.values()),
        f"sha256 of {identity.name}": hash_file(identity),
    }


def _check_lora_kind(config: PeftConfig, folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: is a {config.peft_type} adapter, expected LoRA")
    used = [name for name in UNMERGED_KINDS if getattr(config, name, None)]
    if config.bias != "none":
        used.append("bias")
    if str(config.init_lora_weights).lower().startswith(BASE_CHANGING_STARTS):
        used.append(f"init_lora_weights={config.init_lora_weights}")
    if used:
        raise UserError(
            f"{path}: uses {', '.join(used)}, which is not merged here; expected LoRA as train.py writes it"
        )


def _find_scale(config: LoraConfig, module: str, rank: int, path: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732); alpha and r are the module's own."""
    configured = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    if rank != configured:
        raise UserError(f"{path}: {module} has rank {rank}, {ADAPTER_CONFIG} says {configured}; copy or train it again")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _open_counted(path: Path, learned: int) -> TensorReader:
    tensors = TensorReader([path])
    if len(tensors) != learned:
        raise UserError(f"{path}: holds {len(tensors)} tensors, but {learned} learned; copy or train it again")
    return tensors


def _check_shape(name: str, base: tuple[int, ...], trained: tuple[int, ...]) -> None:
    if base != trained:
        raise UserError(f"{name}: is {base} in the base, {trained} in the trained weights")


def _set_config_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = name
    write_json(config_file, config)
