"""Merging of a base and trained weights into one standalone model, tensor by tensor."""

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from meme_llava.errors import CheckpointError, UserError
from meme_llava.model.llava import PADDING_SIDE, PROJECTOR, open_llava_tensors, to_disk_name
from meme_llava.model.trainable import PEFT_PREFIX, read_adapter_config
from meme_llava.storage.files import hash_file, write_json
from meme_llava.storage.json_files import check_fields, read_json
from meme_llava.storage.run_record import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_RECORD,
    TRAINED_WEIGHTS,
    read_run_record,
)
from meme_llava.storage.tensor_files import WEIGHTS, WEIGHTS_INDEX, StoredTensor, read_tensors
from meme_llava.storage.tensor_writer import PlannedTensor, Rounding, count_bytes, write_tensors
from meme_llava.terminal import show_bytes

# float32 elements of a piece: a few such pieces fit in a processor's cache.
PIECE_ELEMENTS = 4_000_000
MAGNITUDES = "lora_magnitude_vector"  # as peft ends the names of what DoRA adds
SMALLEST = torch.finfo(torch.float32).tiny  # so that a row of zeros stays one
# What peft can store and a plain W + scale * B A would get wrong.
UNMERGED_KINDS = (
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
# Of a base that we built all but the last two lines, of another LLaVA those that it has; the configurations are edited.
COPIED_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "chat_template.json",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class LoraPair:
    """The two matrices in the adapter's file, A (r, in) and B (out, r), the factor of their product, and for DoRA the
    lengths (out,) that the rows of W + scale * B A get (https://arxiv.org/abs/2402.09353)."""

    first: StoredTensor
    second: StoredTensor
    scale: float
    magnitudes: StoredTensor | None = None


@dataclass
class TrainedWeights:
    """What training changed, by names on disk: LoRA pairs, and tensors that replace the base's.

    What was merged is counted, to be held against what there is.
    """

    folder: Path  # output or checkpoint of train.py
    run_record: dict
    tensors: dict[str, StoredTensor]  # by their names in its file
    lora: dict[str, LoraPair]
    replaced: dict[str, StoredTensor]
    used: Counter = field(default_factory=Counter)  # tensors of base and adapter
    relative_change: dict[str, float] = field(default_factory=dict)  # |merged - W| / |W|, Frobenius norms

    @property
    def learned_on_four_bits(self) -> bool:
        """Whether the base's language model stood in four bits while this was learned."""
        return self.run_record["settings"].get("load_in_4bit") is True

    @classmethod
    def read(cls, folder: Path) -> "TrainedWeights":
        """Read an output or checkpoint of train.py; the tensors themselves stay on disk.

        Raises UserError for a kind of LoRA that is not merged here, and where a tensor is missing or fits nowhere.
        """
        has_adapter = (folder / ADAPTER_CONFIG).is_file()
        path = folder / (ADAPTER_WEIGHTS if has_adapter else TRAINED_WEIGHTS)
        tensors = read_tensors([path])
        run_record = read_run_record(folder)
        for group in run_record["parameter_groups"]:
            check_fields(folder / RUN_RECORD, group, {"tensors": int}, error=CheckpointError)
        learned = sum(group["tensors"] for group in run_record["parameter_groups"])
        if len(tensors) != learned:
            raise UserError(f"{path}: holds {len(tensors)} tensors, but {learned} learned; copy or train it again")
        if not has_adapter:
            return cls(folder, run_record, tensors, {}, dict(tensors))
        config = read_adapter_config(folder)
        _check_lora_kind(config, folder)
        lora, replaced = {}, {}
        for name, stored in tensors.items():
            module = name.removeprefix(PEFT_PREFIX)
            if module.endswith(".lora_A.weight"):
                module = module.removesuffix(".lora_A.weight")
                second = tensors.get(name.replace(".lora_A.", ".lora_B."))
                if second is None:
                    raise UserError(f"{path}: {module} has lora_A but no lora_B")
                scale = _find_scale(config, module, stored.shape[0], path)
                magnitudes = tensors.get(name.removesuffix("lora_A.weight") + MAGNITUDES)
                if config.use_dora and magnitudes is None:
                    raise UserError(f"{path}: {module} has lora_A but no {MAGNITUDES}, and {ADAPTER_CONFIG} says DoRA")
                lora[to_disk_name(f"{module}.weight")] = LoraPair(stored, second, scale, magnitudes)
            elif config.use_dora and module.endswith(f".{MAGNITUDES}"):
                if name.removesuffix(MAGNITUDES) + "lora_A.weight" not in tensors:
                    raise UserError(f"{path}: {name} has no lora_A")
            elif module.endswith(".lora_B.weight"):
                if name.replace(".lora_B.", ".lora_A.") not in tensors:
                    raise UserError(f"{path}: {name} has no lora_A")
            elif PROJECTOR in module.split("."):
                replaced[to_disk_name(module)] = stored
            else:
                raise UserError(f"{path}: tensor {name} is neither LoRA nor projector")
        return cls(folder, run_record, tensors, lora, replaced)

    def check_fits(self, base: dict[str, StoredTensor], folder: Path) -> None:
        """Raise UserError unless every trained tensor has its counterpart of the same shape in the base."""
        if unknown := sorted((self.lora.keys() | self.replaced.keys()) - base.keys()):
            raise UserError(f"{folder}: has no tensor for {len(unknown)} trained ones, e.g. {unknown[0]}")
        shapes = {name: stored.shape for name, stored in self.replaced.items()}
        for name, pair in self.lora.items():
            first, second = pair.first.shape, pair.second.shape
            if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
                raise UserError(f"{name}: lora_A is {first}, lora_B {second}; expected (r, in) and (out, r)")
            shapes[name] = (second[0], first[1])
            if pair.magnitudes is not None and pair.magnitudes.shape != second[:1]:
                raise UserError(f"{name}: {MAGNITUDES} is {pair.magnitudes.shape}, expected {second[:1]}")
        for name, shape in shapes.items():
            if base[name].shape != shape:
                raise UserError(f"{name}: is {base[name].shape} in the base, {shape} in the trained weights")

    def merge(self, stored: StoredTensor) -> Iterator[torch.Tensor]:
        """A tensor of the merged model as float32 pieces in order: W + scale * B A (for DoRA with other lengths of its
        rows), or what replaces W, or W."""
        self.used[stored] += 1
        if stored.name in self.lora:
            yield from self._merge_lora(stored, self.lora[stored.name])
            return
        if stored.name in self.replaced:
            stored = self.replaced[stored.name]
            self.used[stored] += 1
        yield from (piece.float() for piece in stored.make_pieces())

    def _merge_lora(self, stored: StoredTensor, pair: LoraPair) -> Iterator[torch.Tensor]:
        parts = [part for part in (pair.first, pair.second, pair.magnitudes) if part is not None]
        self.used.update(parts)
        first, second, *magnitudes = (part.load(torch.float32) for part in parts)
        rows, columns = stored.shape
        before, change = 0.0, 0.0  # squared norms
        # Equal shares: a last piece of up to three rows would be multiplied by another routine, with other last bits.
        count = max(1, math.ceil(rows * columns / PIECE_ELEMENTS))
        for index in range(count):
            piece = slice(rows * index // count, rows * (index + 1) // count)
            weight = stored.map()[piece].float()  # (rows of the piece, in)
            merged = (second[piece] @ first).mul_(pair.scale)  # (rows of the piece, in)
            before += torch.linalg.vector_norm(weight).item() ** 2
            if magnitudes:
                merged.add_(weight)
                lengths = torch.linalg.vector_norm(merged, dim=1, keepdim=True).clamp_min(SMALLEST)
                merged.mul_(magnitudes[0][piece, None] / lengths)
                change += torch.linalg.vector_norm(merged - weight).item() ** 2
            else:
                change += torch.linalg.vector_norm(merged).item() ** 2
                merged.add_(weight)
            yield merged
        self.relative_change[stored.name] = math.sqrt(change / max(before, 1e-24))

    def check_used(self, base: dict[str, StoredTensor]) -> None:
        """Raise RuntimeError unless every tensor of both was used exactly once."""
        for title, tensors in (("base", base), ("trained", self.tensors)):
            if wrong := sorted(name for name, stored in tensors.items() if self.used[stored] != 1):
                raise RuntimeError(f"{len(wrong)} {title} tensors were not used exactly once, e.g. {wrong[0]}")


def plan_merged(
    base: dict[str, StoredTensor], trained: TrainedWeights, rounding: Rounding
) -> dict[str, PlannedTensor | StoredTensor]:
    """All tensors of the merged model, in the order in which the base's files hold them."""
    return {
        name: rounding.plan(name, PlannedTensor(torch.float32, stored.shape, partial(trained.merge, stored)))
        for name, stored in base.items()
    }


def count_merged_bytes(base_folder: Path, dtype: torch.dtype) -> int:
    """What the tensors of the merged model take on disk, headers aside."""
    return sum(math.prod(stored.shape) for stored in open_llava_tensors(base_folder).values()) * dtype.itemsize


def write_merged(
    base_folder: Path, trained: TrainedWeights, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> dict:
    """Write the merged model to `folder`, computed in float32 and rounded once to `dtype`; the run record's summary.

    Raises UserError where a trained tensor has no counterpart, a value would not be finite in `dtype`, or the disk is
    full.
    """
    rounding, base = Rounding(dtype), open_llava_tensors(base_folder)
    trained.check_fits(base, base_folder)
    planned = plan_merged(base, trained, rounding)
    with show_bytes("merging", count_bytes(planned)) as advance:
        write_tensors(planned, folder, max_shard_size, advance)
    rounding.check()
    trained.check_used(base)
    for file_name in COPIED_FILES:
        if (base_folder / file_name).is_file():
            shutil.copyfile(base_folder / file_name, folder / file_name)
    config = read_json(base_folder / "config.json")
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    tokenizer = read_json(base_folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", tokenizer | {"padding_side": PADDING_SIDE})
    most_changed = max(trained.relative_change, key=trained.relative_change.get, default=None)
    identity = folder / (WEIGHTS_INDEX if (folder / WEIGHTS_INDEX).is_file() else WEIGHTS)
    return {
        "tensors": len(planned),
        "bytes": count_bytes(planned),
        "lora_merged": len(trained.lora),
        "replaced": len(trained.replaced),
        "largest_relative_lora_change": round(trained.relative_change.get(most_changed, 0.0), 4),
        "most_changed": most_changed,
        "overflow_count": rounding.overflow.total(),
        "underflow_count": rounding.underflow.total(),
        f"sha256 of {identity.name}": hash_file(identity),
    }


def _check_lora_kind(config: LoraConfig, folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
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
