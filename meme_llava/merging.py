"""Knows how base and trained weights become one standalone model, and how to prove that it answers the same."""

import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import nn

from meme_llava.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS, read_run_record
from meme_llava.dataset import load_dataset
from meme_llava.errors import UserError
from meme_llava.model import PROJECTOR, Processing, load_llava, load_processing
from meme_llava.trainable import apply_trained_weights
from meme_llava.weights import TensorFolder, find_overflow, save_tensors, to_disk_name, to_memory_name

PEFT_PREFIX = "base_model.model."
# Merged and unmerged weights round differently; in float32 a model of any size stays far below.
MAX_LOGIT_DIFFERENCE = 1e-4
SAMPLE_MEMES = Path(__file__).resolve().parent.parent / "data"
VERIFIED_RECORDS = 2
VERIFIED_NEW_TOKENS = 32
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
class TrainedWeights:
    """What training changed, by names on disk: LoRA pairs (A, B, scale) and tensors that replace the base's."""

    lora: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    replaced: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "TrainedWeights":
        """Read an output or checkpoint of train.py.

        Raises:
            UserError: the adapter uses a kind of LoRA that is not merged here, or a tensor is missing or fits nowhere.
        """
        learned = sum(group["tensors"] for group in read_run_record(folder)["parameter_groups"])
        if not (folder / ADAPTER_CONFIG).is_file():
            replaced = load_file(folder / TRAINED_WEIGHTS)
            _check_count(folder / TRAINED_WEIGHTS, replaced, learned)
            return cls({}, replaced)
        config = PeftConfig.from_pretrained(folder)
        _check_plain_lora(config, folder)
        tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(folder / ADAPTER_WEIGHTS).items()}
        _check_count(folder / ADAPTER_WEIGHTS, tensors, learned)
        lora, replaced = {}, {}
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                second = tensors.get(f"{module}.lora_B.weight")
                if second is None:
                    raise UserError(f"{folder / ADAPTER_WEIGHTS}: {module} has lora_A but no lora_B")
                lora[to_disk_name(f"{module}.weight")] = (tensors[name], second, config.lora_alpha / config.r)
            elif name.endswith(".lora_B.weight"):
                if name.replace(".lora_B.", ".lora_A.") not in tensors:
                    raise UserError(f"{folder / ADAPTER_WEIGHTS}: {name} has no lora_A")
            elif PROJECTOR in name.split("."):
                replaced[to_disk_name(name)] = tensors[name]
            else:
                raise UserError(f"{folder / ADAPTER_WEIGHTS}: tensor {name} is neither LoRA nor projector")
        return cls(lora, replaced)

    def merge(self, base: TensorFolder) -> Iterator[tuple[str, torch.Tensor]]:
        """Every base tensor, merged, as (name on disk, float32 tensor), each trained tensor used exactly once.

        Raises:
            UserError: a trained tensor has no counterpart in the base, or another shape.
        """
        unknown = sorted((set(self.lora) | set(self.replaced)) - set(base))
        if unknown:
            raise UserError(f"{base.folder}: has no tensor for {len(unknown)} trained ones, e.g. {unknown[0]}")
        for name in base:
            tensor = base.read(name).float()
            if name in self.lora:
                first, second, scale = self.lora[name]  # (r, in), (out, r)
                update = (second.float() @ first.float()) * scale  # (out, in)
                _check_shape(name, tensor, update)
                tensor = tensor + update
            elif name in self.replaced:
                _check_shape(name, tensor, self.replaced[name])
                tensor = self.replaced[name].float()
            yield name, tensor


def write_merged(base_folder: Path, trained: TrainedWeights, folder: Path, dtype: torch.dtype) -> dict:
    """Write the merged model to `folder`, rounded once to `dtype`. Returns the summary for the run record.

    Raises:
        UserError: a value is not finite, or would not be in `dtype`.
    """
    merged, largest_change = {}, 0.0
    with TensorFolder(base_folder) as base:
        for name, tensor in trained.merge(base):
            if problem := find_overflow(name, tensor, dtype):
                raise UserError(f"{problem}. Train with a lower learning rate, or store it with --dtype bfloat16.")
            if name in trained.lora:
                before = base.read(name).float()
                largest_change = max(largest_change, ((tensor - before).norm() / before.norm().clamp_min(1e-12)).item())
            merged[name] = tensor.to(dtype)
    save_tensors(merged, folder)
    for file_name in COPIED_FILES:
        shutil.copyfile(base_folder / file_name, folder / file_name)
    _set_config_dtype(folder / "config.json", dtype)
    return {
        "tensors": len(merged),
        "lora_merged": len(trained.lora),
        "replaced": len(trained.replaced),
        "largest_relative_lora_change": round(largest_change, 4),
    }


def verify_merged(
    base_folder: Path, adapter: Path, trained: TrainedWeights, folder: Path, training: dict
) -> list[tuple[str, str]]:
    """Compare base + adapter with the merged weights, in float32 and as stored, on records with pictures.

    Args:
        trained: what `adapter` holds, as it was merged.
        training: the adapter's run record, which names annotations, image folder and length limit.

    Returns:
        (check, finding) rows.

    Raises:
        UserError: in float32 a logit differs by more than 1e-4, or a greedy answer differs.
    """
    processing = load_processing(base_folder)
    examples, annotations = _load_examples(training, processing)
    model = apply_trained_weights(load_llava(base_folder, torch.float32), adapter)
    expected_logits, expected_answers = _run(model, examples, processing)
    del model
    gc.collect()

    model = load_llava(base_folder, torch.float32)
    _assign(model, trained, base_folder)
    logits, answers = _run(model, examples, processing)
    del model
    gc.collect()
    difference = _largest_difference(logits, expected_logits)
    if difference > MAX_LOGIT_DIFFERENCE or answers != expected_answers:
        raise UserError(
            f"merged weights answer differently from base + {adapter}: logits differ by {difference:g} (limit "
            f"{MAX_LOGIT_DIFFERENCE:g}), greedy answers {'agree' if answers == expected_answers else 'differ'}"
        )

    model = load_llava(folder, torch.float32)
    stored_logits, stored_answers = _run(model, examples, processing)
    same = sum(found == expected for found, expected in zip(stored_answers, expected_answers, strict=True))
    return [
        ("compared on", f"{len(examples)} records of {annotations}"),
        ("float32: largest logit difference", f"{difference:.2e} (limit {MAX_LOGIT_DIFFERENCE:g})"),
        ("float32: greedy answers", "same"),
        ("as stored: largest logit difference", f"{_largest_difference(stored_logits, expected_logits):.2e}"),
        ("as stored: greedy answers", f"{same} of {len(examples)} the same"),
    ]


def _load_examples(training: dict, processing: Processing) -> tuple[list[dict], Path]:
    """A few records of the training data, or of the sample memes where that data is not at hand, and their file."""
    annotations, image_folder = Path(training["data"]["annotations"]), Path(training["data"]["image_folder"])
    max_length = training["settings"]["model_max_length"]
    if not annotations.is_file():
        annotations, image_folder = SAMPLE_MEMES / "annotations.json", SAMPLE_MEMES
    encoder, policy = processing.encoder, processing.image_policy
    dataset = load_dataset(annotations, image_folder, encoder, policy, max_length, "quarantine").dataset
    return [dataset[index] for index in range(min(VERIFIED_RECORDS, len(dataset)))], annotations


@torch.inference_mode()
def _run(model: nn.Module, examples: list[dict], processing: Processing) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits (length, vocabulary) over every whole example, and the greedy answer to its first question."""
    model.eval()
    logits, answers = [], []
    for example in examples:
        input_ids = example["input_ids"][None]  # (1, length)
        pixel_values = example["pixel_values"]  # (images, 3, size, size)
        logits.append(model(input_ids=input_ids, pixel_values=pixel_values if len(pixel_values) else None).logits[0])
        prompt = input_ids[:, : int((example["labels"] >= 0).nonzero()[0])]  # (1, prompt)
        images = int((prompt == processing.encoder.image_token_id).sum()) // processing.tokens_per_image
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixel_values[:images] if images else None,
            max_new_tokens=VERIFIED_NEW_TOKENS,
            do_sample=False,
        )
        answers.append(output[0, prompt.shape[1] :].tolist())
    return logits, answers


def _assign(model: nn.Module, trained: TrainedWeights, base_folder: Path) -> None:
    parameters = model.state_dict()
    with TensorFolder(base_folder) as base:
        for name, tensor in trained.merge(base):
            parameters[to_memory_name(name)].copy_(tensor)


def _largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def _check_plain_lora(config: PeftConfig, folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: is a {config.peft_type} adapter, expected LoRA")
    special = {
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": config.bias != "none",
    }
    for name, is_used in special.items():
        if is_used:
            raise UserError(f"{path}: uses {name}, which is not merged here; expected LoRA as train.py writes it")


def _check_count(path: Path, tensors: dict, learned: int) -> None:
    if len(tensors) != learned:
        raise UserError(f"{path}: holds {len(tensors)} tensors, but {learned} learned; copy or train it again")


def _check_shape(name: str, base: torch.Tensor, trained: torch.Tensor) -> None:
    if base.shape != trained.shape:
        raise UserError(f"{name}: is {tuple(base.shape)} in the base, {tuple(trained.shape)} in the trained weights")


def _set_config_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = name
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
