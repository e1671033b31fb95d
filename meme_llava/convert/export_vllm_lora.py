"""The language model's LoRA beside the rest merged, as `vllm serve --enable-lora` takes a LLaVA and its adapter.

vLLM refuses adapters with LoRA of a vision tower or with a whole projector. So these are merged into the base that is
served, whose language model is the original one, and the adapter holds the language model's LoRA alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from meme_llava.convert.merge import LoraPair, TrainedWeights
from meme_llava.errors import UserError
from meme_llava.model.llava import LANGUAGE_MODEL, role_of
from meme_llava.model.trainable import PEFT_PREFIX
from meme_llava.storage.files import write_json
from meme_llava.storage.json_files import read_json
from meme_llava.storage.run_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LANGUAGE_LORA
from meme_llava.storage.tensor_files import StoredTensor, read_tensors
from meme_llava.storage.tensor_writer import count_bytes, write_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank of vLLM 0.32 takes


def leave_out_language_lora(trained: TrainedWeights) -> TrainedWeights:
    """What is merged into the base that is served. Raises UserError where vLLM could not take the rest."""
    language, rest = _divide(trained.lora)
    instead = "merge it into the model in place of that: leave --export out, or take --export clip for vLLM"
    if not language:
        raise UserError(f"--export vllm_lora: {trained.folder} holds no LoRA of the language model; {instead}")
    if any(pair.magnitudes is not None for pair in language.values()):
        raise UserError(
            f"--export vllm_lora: {trained.folder} holds DoRA (--lora_variant dora), expected lora or rslora, as vLLM "
            f"takes no other; {instead}"
        )
    if (rank := _find_rank(language)) > RANKS[-1]:
        raise UserError(
            f"--export vllm_lora: LoRA of {trained.folder} has rank {rank}, vLLM takes up to {RANKS[-1]}; {instead}"
        )
    _, tensors = _divide(trained.tensors)
    return replace(trained, tensors=tensors, lora=rest, used=Counter(), relative_change={})


def count_adapter_bytes(trained: TrainedWeights) -> int:
    """What the adapter's tensors take on disk."""
    return count_bytes(_divide(trained.tensors)[0])


def write_adapter(folder: Path, trained: TrainedWeights) -> None:
    """Write the adapter into the folder of the base. Its tensors stay as they learned."""
    language, _ = _divide(trained.tensors)
    adapter = folder / LANGUAGE_LORA
    adapter.mkdir()
    write_file(adapter / ADAPTER_WEIGHTS, language)
    # vLLM looks modules_to_save up whatever the weights hold, and compiles target_modules where they are one text.
    changes = {"modules_to_save": None, "target_modules": _list_modules(language), "base_model_name_or_path": None}
    write_json(adapter / ADAPTER_CONFIG, read_json(trained.folder / ADAPTER_CONFIG) | changes)


def verify_adapter(folder: Path, trained: TrainedWeights) -> list[tuple[str, str]]:
    """Read the adapter back and compare every bit with what learned; (check, finding) rows. Raises UserError."""
    path = folder / LANGUAGE_LORA / ADAPTER_WEIGHTS
    language, _ = _divide(trained.tensors)
    found = read_tensors([path])
    if found.keys() != language.keys() or not all(
        torch.equal(found[name].map(), stored.map()) for name, stored in language.items()
    ):
        raise UserError(f"{path}: its tensors are not those of {trained.folder}; report this as a bug")
    modules = len(_list_modules(language))
    return [
        ("export: language model's LoRA", f"{len(found)} tensors of {modules} modules read back, same bits"),
        ("export: --max-lora-rank for vLLM", str(choose_rank(_find_rank(_divide(trained.lora)[0])))),
    ]


def choose_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds LoRA of this rank."""
    return next(one for one in RANKS if one >= rank)


def _divide(learned: Mapping) -> tuple[dict, dict]:
    """(what belongs to the language model, all else) of LoRA pairs or of tensors, by name."""
    language, rest = {}, {}
    for name, value in learned.items():
        (language if role_of(name) == LANGUAGE_MODEL else rest)[name] = value
    return language, rest


def _find_rank(pairs: Mapping[str, LoraPair]) -> int:
    return max(pair.first.shape[0] for pair in pairs.values())


def _list_modules(language: dict[str, StoredTensor]) -> list[str]:
    return sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in language})
