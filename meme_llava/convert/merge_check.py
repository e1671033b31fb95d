"""The proof that a merged model answers like base + adapter, also where memory is short."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from meme_llava import DATA
from meme_llava.convert.merge import PEFT_PREFIX, TrainedWeights
from meme_llava.convert.offloading import IN_MEMORY, OFFLOADED, fits_in_memory, offload_weights
from meme_llava.convert.towers import HEAD
from meme_llava.dataset.check import RecordPolicy, RecordSource
from meme_llava.dataset.collator import normalise
from meme_llava.dataset.conversation import Tokenization
from meme_llava.dataset.dataset import load_records
from meme_llava.errors import UserError
from meme_llava.model.llava import (
    LANGUAGE_MODEL,
    Processing,
    find_stored,
    load_llava,
    load_processing,
    load_strictly,
    make_empty_model,
    to_disk_name,
    to_memory_name,
)
from meme_llava.model.trainable import add_adapter, apply_trained_weights
from meme_llava.storage.run_record import ADAPTER_CONFIG
from meme_llava.storage.tensor_reader import TensorReader, open_model_tensors

# Merged and unmerged weights round differently; in float32 a model of any size stays below, measured in units of its
# largest logit where that is above 1.
MAX_LOGIT_DIFFERENCE = 1e-4
# In peft's name of a parameter that learned in full; the adapter's file leaves it out.
MODULES_TO_SAVE = ".modules_to_save.default."
VERIFIED_RECORDS = 2
VERIFIED_NEW_TOKENS = 32
# Offloaded, each token reads the whole model from the disk again.
OFFLOADED_NEW_TOKENS = 4


@dataclass(frozen=True)
class Generation:
    """A prompt, a greedy answer to it, and the logits (tokens, vocabulary) that each of its tokens was chosen from."""

    prompt: dict[str, torch.Tensor]
    tokens: torch.Tensor  # (tokens,)
    logits: torch.Tensor


@torch.inference_mode()
def verify_merged(
    base_folder: Path,
    adapter: Path,
    trained: TrainedWeights,
    folder: Path,
    training: dict,
    show_progress: Callable,
) -> list[tuple[str, str]]:
    """Compare base + adapter with the merged weights, in float32 and as stored, on records with images.

    The float32 comparison can fail. What rounding to the stored dtype changes is measured and shown, without a limit.

    Args:
        trained: what `adapter` holds, as it was merged.
        training: the adapter's run record, which names annotations, image folder and length limit.
        show_progress: `terminal.show_bytes`.

    Returns:
        (check, finding) rows.

    Raises:
        UserError: in float32 a logit differs by more than 1e-4 of the largest one, or a greedy answer differs.
    """
    processing = load_processing(base_folder)
    prompts, annotations = _load_prompts(training, processing)
    with open_model_tensors(base_folder) as base, open_model_tensors(folder) as stored:
        if fits_in_memory(base, torch.float32):
            way = IN_MEMORY
            models = _load_models(base_folder, adapter, trained, base, folder)
            findings, compared, largest = _compare_models(models, prompts, VERIFIED_NEW_TOKENS, processing)
        else:
            way = OFFLOADED
            with show_progress("comparing", _count_read_bytes(base, stored, prompts)) as advance:
                models = _offload_models(base_folder, adapter, trained, base, stored, advance)
                findings, compared, largest = _compare_models(models, prompts, OFFLOADED_NEW_TOKENS, processing)
    (difference, same), (stored_difference, stored_same) = findings
    limit = MAX_LOGIT_DIFFERENCE * max(1.0, largest)
    if not difference <= limit or same < len(prompts):
        raise UserError(
            f"merged weights answer differently from base + {adapter}: logits differ by {difference:g} (limit "
            f"{limit:.2g}), greedy answers {'agree' if same == len(prompts) else 'differ'}"
        )
    return [
        ("compared on", f"{len(prompts)} records of {annotations}"),
        ("the models ran", way),
        ("answer tokens compared", str(compared)),
        ("float32: largest logit difference", f"{difference:.2e} (limit {limit:.2g})"),
        ("float32: greedy answers", "same"),
        ("as stored: largest logit difference", f"{stored_difference:.2e}"),
        ("as stored: greedy answers", f"{stored_same} of {len(prompts)} the same"),
    ]


def _compare_models(
    models: Iterator[nn.Module], prompts: list[dict], new_tokens: int, processing: Processing
) -> tuple[list[tuple[float, int]], int, float]:
    """What `_compare` finds for every model after the first; the answer tokens compared; the largest logit."""
    unmerged = next(models)
    expected = [_reply(unmerged, prompt, new_tokens, processing) for prompt in prompts]
    del unmerged
    findings = []
    for _ in range(2):
        gc.collect()
        findings.append(_compare(next(models), expected))
    largest = max(reply.logits.abs().max().item() for reply in expected)
    return findings, sum(len(reply.tokens) for reply in expected), largest


def _count_read_bytes(base: TensorReader, stored: TensorReader, prompts: list[dict]) -> int:
    """What the offloaded models read if every answer takes all its tokens; vision only where there is an image."""
    total = 0
    for tensors, later_passes in ((base, OFFLOADED_NEW_TOKENS - 1), (base, 0), (stored, 0)):
        # A tied head is the embedding, read a second time.
        head = 0 if to_disk_name(HEAD) in tensors else tensors.stored[find_stored(tensors, HEAD)].nbytes
        whole = head + sum(tensor.nbytes for tensor in tensors.stored.values())
        language = head + sum(
            tensor.nbytes for name, tensor in tensors.stored.items() if name.startswith(LANGUAGE_MODEL)
        )
        for prompt in prompts:
            total += (language if prompt["pixel_values"] is None else whole) + later_passes * language
    return total


def _load_models(
    base_folder: Path, adapter: Path, trained: TrainedWeights, base: TensorReader, folder: Path
) -> Iterator[nn.Module]:
    """Base + adapter, merged in float32, and as stored, each loaded when the one before is gone."""
    yield apply_trained_weights(load_llava(base_folder, torch.float32), adapter).eval()
    model = load_llava(base_folder, torch.float32)
    parameters = model.state_dict()
    for name in base:
        parameters[to_memory_name(name)].copy_(_merge_whole(trained, base, name))
    del parameters
    yield model.eval()
    del model
    # What was written is loaded as its readers will load it.
    yield load_strictly(LlavaForConditionalGeneration, folder, dtype=torch.float32)


def _offload_models(
    base_folder: Path,
    adapter: Path,
    trained: TrainedWeights,
    base: TensorReader,
    stored: TensorReader,
    advance: Callable[[int], None],
) -> Iterator[nn.Module]:
    """The same three models, their weights read module by module."""
    config = LlavaConfig.from_pretrained(base_folder, local_files_only=True)

    def offload(model: nn.Module, tensors: TensorReader, read: Callable[[str], torch.Tensor]) -> nn.Module:
        def read_and_count(name: str) -> torch.Tensor:
            weight = read(name)
            disk_name = None if ".lora_" in name else _find_in_base(tensors, name)
            advance(0 if disk_name is None else tensors.stored[disk_name].nbytes)
            return weight

        return offload_weights(model, read_and_count)

    def make() -> nn.Module:
        return make_empty_model(LlavaForConditionalGeneration, config)

    yield offload(_add_adapter(make(), adapter), base, lambda name: _read_unmerged(trained, base, name))
    yield offload(make(), base, lambda name: _merge_whole(trained, base, find_stored(base, name)))
    yield offload(make(), stored, lambda name: stored.read_as(find_stored(stored, name), torch.float32))


def _add_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    if not (adapter / ADAPTER_CONFIG).is_file():
        return model
    return add_adapter(model, adapter).eval()


def _read_unmerged(trained: TrainedWeights, base: TensorReader, name: str) -> torch.Tensor:
    """A parameter of base + adapter by peft's name for it."""
    if ".lora_" in name or MODULES_TO_SAVE in name:
        saved = name.replace(MODULES_TO_SAVE, ".").replace(".default.", ".")
        return trained.tensors.read_as(saved, torch.float32)
    disk_name = _find_in_base(base, name)
    if disk_name in trained.replaced:
        return trained.tensors.read_as(trained.replaced[disk_name], torch.float32)
    return base.read_as(disk_name, torch.float32)


def _find_in_base(base: TensorReader, name: str) -> str:
    """The name on disk of a parameter that peft may have moved into a wrapper."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(MODULES_TO_SAVE, ".")
    return find_stored(base, name)


def _merge_whole(trained: TrainedWeights, base: TensorReader, name: str) -> torch.Tensor:
    merged = torch.empty(base.stored[name].shape)
    flat, start = merged.view(-1), 0
    for piece in trained.merge(base, name):
        flat[start : start + piece.numel()] = piece.reshape(-1)
        start += piece.numel()
    return merged


def _load_prompts(training: dict, processing: Processing) -> tuple[list[dict], Path]:
    """First questions of the training data, or of the sample memes where that data is not at hand, and their file."""
    source = RecordSource(Path(training["data"]["annotations"]), Path(training["data"]["image_folder"]))
    if not source.annotations.is_file():
        source = RecordSource(DATA / "annotations.json", DATA)
    encoder, policy = processing.encoder, processing.image_policy
    tokens = Tokenization(encoder, training["settings"]["model_max_length"])
    dataset = load_records(source, RecordPolicy(bad_records="quarantine"), tokens, policy).dataset
    prompts = []
    for index in range(min(VERIFIED_RECORDS, len(dataset))):
        example = dataset[index]
        input_ids = example["input_ids"][None, : int((example["labels"] >= 0).nonzero()[0])]  # (1, prompt)
        images = int((input_ids == encoder.image_token_id).sum()) // processing.tokens_per_image
        # (images, 3, size, size); a later turn's images are not part of the first question.
        pixel_values = normalise(torch.stack(example["pixel_values"][:images]), policy) if images else None
        prompts.append({"input_ids": input_ids, "pixel_values": pixel_values})
    return prompts, source.annotations


def _reply(model: nn.Module, prompt: dict[str, torch.Tensor], new_tokens: int, processing: Processing) -> Generation:
    # generate encodes whatever images it is given, None too.
    given = {name: tensor for name, tensor in prompt.items() if tensor is not None}
    output = model.generate(
        **given,
        attention_mask=torch.ones_like(prompt["input_ids"]),
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, prompt["input_ids"].shape[1] :]
    # An untrained model may say <image>; given back to it, that would ask for an image. The last token is not given.
    images = (tokens == processing.encoder.image_token_id).nonzero()
    kept = int(images[0]) + 1 if len(images) else len(tokens)
    return Generation(prompt, tokens[:kept], torch.cat(output.logits[:kept]).float())


def _compare(model: nn.Module, expected: list[Generation]) -> tuple[float, int]:
    """Largest logit difference, and how many greedy answers are the same.

    The answer is given to the model, and each of its tokens must be the model's own choice: then it would have said
    the same, and one pass shows it.
    """
    difference, same = 0.0, 0
    for reply in expected:
        input_ids = torch.cat([reply.prompt["input_ids"], reply.tokens[None, :-1]], dim=1)  # (1, prompt + tokens - 1)
        logits = model(
            input_ids=input_ids, pixel_values=reply.prompt["pixel_values"], logits_to_keep=len(reply.tokens)
        ).logits[0]  # (tokens, vocabulary)
        difference = max(difference, (logits.float() - reply.logits).abs().max().item())
        same += torch.equal(logits.argmax(dim=-1), reply.tokens)
    return difference, same
