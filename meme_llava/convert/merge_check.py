"""The proof that a merged model answers like base + adapter, also where memory is short."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from meme_llava import DATA
from meme_llava.convert.merge import MAGNITUDES, TrainedWeights
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.images import MAX_PIXELS, open_image, resolve_image_path
from meme_llava.dataset.records import iterate_values, parse_record
from meme_llava.errors import UserError
from meme_llava.model.four_bit import find_problem, round_to_four_bit
from meme_llava.model.llava import (
    LANGUAGE_MODEL,
    Processing,
    fill_weights,
    find_stored,
    list_linears,
    load_llava,
    load_processing,
    make_empty_model,
    open_llava_tensors,
    to_disk_name,
)
from meme_llava.model.loading import load_strictly
from meme_llava.model.offloading import IN_MEMORY, OFFLOADED, fits_in_memory, offload_weights, report_layers
from meme_llava.model.trainable import PEFT_PREFIX, add_adapter, apply_trained_weights
from meme_llava.storage.run_record import ADAPTER_CONFIG, LANGUAGE_LORA
from meme_llava.storage.tensor_files import StoredTensor
from meme_llava.terminal import show_count

# Merged and unmerged weights round differently; in float32 a model of any size stays below, measured in units of its
# largest logit where that is above 1.
MAX_LOGIT_DIFFERENCE = 1e-4
# In peft's name of a parameter that learned in full; the adapter's file leaves it out.
MODULES_TO_SAVE = ".modules_to_save.default."
MAX_STORED_DIFFERENCE = 0.1  # of the largest logit
VERIFIED_RECORDS = 2
VERIFIED_NEW_TOKENS = 32
# Offloaded, each token reads the whole model from the disk again.
OFFLOADED_NEW_TOKENS = 4
SAMPLES = DATA / "annotations.json"


@dataclass(frozen=True)
class Generation:
    """A prompt, a greedy answer to it, and the logits (tokens, vocabulary) that each of its tokens was chosen from."""

    prompt: dict[str, torch.Tensor]
    tokens: torch.Tensor  # (tokens,)
    logits: torch.Tensor


@torch.inference_mode()
def verify_merged(base_folder: Path, trained: TrainedWeights, folder: Path) -> list[tuple[str, str]]:
    """Compare base + trained weights with the merged ones, in float32 and as stored, on records with images.

    Rounding to the stored dtype may turn a close choice of a token: how many answers stay the same is only shown. So is
    how far base + trained weights are from it with the base in four bits, where that is what learned: the merged model
    is made of the base as it is stored.

    Returns:
        (check, finding) rows.

    Raises:
        UserError: in float32 a logit differs by more than 1e-4 of the largest one, or a greedy answer differs; or as
            stored a logit differs by more than a tenth of the largest one.
    """
    processing = load_processing(base_folder)
    prompts, prompts_source = _load_prompts(trained.run_record, processing)
    fits = fits_in_memory(open_llava_tensors(base_folder), torch.float32)
    # Each token of an answer is a pass of the unmerged model; the others are given the answer and take one each.
    problem = find_problem(torch.device("cpu")) if trained.learned_on_four_bits else ""
    rounds = trained.learned_on_four_bits and not problem
    passes = OFFLOADED_NEW_TOKENS + 2 + rounds
    passed_layers = len(prompts) * passes * processing.config.text_config.num_hidden_layers
    ignore, findings = contextlib.nullcontext(lambda count: None), []
    with ignore if fits else show_count("comparing layers", passed_layers) as advance:
        sources = (base_folder, trained, folder)
        models = _load_models(*sources) if fits else _offload_models(*sources, advance)
        unmerged, new_tokens = next(models), VERIFIED_NEW_TOKENS if fits else OFFLOADED_NEW_TOKENS
        expected = [_reply(unmerged, prompt, new_tokens, processing) for prompt in prompts]
        del unmerged
        for _ in range(2 + rounds):
            gc.collect()
            findings.append(_compare(next(models), expected))
    (difference, same), (stored_difference, stored_same), *rounded = findings
    largest = max(reply.logits.abs().max().item() for reply in expected)
    limit, stored_limit = MAX_LOGIT_DIFFERENCE * max(1.0, largest), MAX_STORED_DIFFERENCE * largest
    if not difference <= limit or same < len(prompts):
        raise UserError(
            f"merged weights answer differently from base + {trained.folder}: logits differ by {difference:g} (limit "
            f"{limit:.2g}), greedy answers {'agree' if same == len(prompts) else 'differ'}"
        )
    if not stored_difference <= stored_limit:
        raise UserError(
            f"the weights as they are stored answer differently from base + {trained.folder}: logits of up to "
            f"{largest:.3g} differ by {stored_difference:.3g} (limit {stored_limit:.2g}), {stored_same} of "
            f"{len(prompts)} answers are the same. Store them with --dtype bfloat16 or float32."
        )
    rows = [("base in four bits", f"not compared: bitsandbytes cannot be used here ({problem})")] if problem else []
    for rounded_difference, rounded_same in rounded:
        rows += [
            ("base in four bits: largest logit difference", f"{rounded_difference:.2e} of {largest:.3g} (no limit)"),
            ("base in four bits: greedy answers", f"{rounded_same} of {len(prompts)} the same"),
        ]
    return [
        ("compared on", prompts_source),
        ("the models ran", IN_MEMORY if fits else OFFLOADED),
        ("answer tokens compared", str(sum(len(reply.tokens) for reply in expected))),
        ("float32: largest logit difference", f"{difference:.2e} (limit {limit:.2g})"),
        ("float32: greedy answers", "same"),
        ("as stored: largest logit difference", f"{stored_difference:.2e} (limit {stored_limit:.2g})"),
        ("as stored: greedy answers", f"{stored_same} of {len(prompts)} the same"),
        *rows,
    ]


def _load_models(base_folder: Path, trained: TrainedWeights, folder: Path) -> Iterator[nn.Module]:
    """Base + adapter, merged in float32, as stored, and base in four bits + adapter, each loaded when the one before is
    gone."""
    base = open_llava_tensors(base_folder)
    yield apply_trained_weights(load_llava(base_folder, torch.float32), trained.folder).eval()
    yield fill_weights(_make_empty(base_folder), lambda name: _merge_whole(trained, base[find_stored(base, name)]))
    yield _load_as_stored(folder)
    read_rounded = _read_in_four_bits(base_folder)
    rounded = fill_weights(_make_empty(base_folder), lambda name: read_rounded(base[find_stored(base, name)]))
    yield apply_trained_weights(rounded, trained.folder).eval()


def _load_as_stored(folder: Path) -> nn.Module:
    """What was written, loaded as its readers will load it."""
    # Not in the generator, whose variables would keep it while the next one is made.
    stored = load_strictly(LlavaForConditionalGeneration, folder, dtype=torch.float32)
    apart = folder / LANGUAGE_LORA
    return apply_trained_weights(stored, apart).eval() if apart.is_dir() else stored


def _offload_models(
    base_folder: Path, trained: TrainedWeights, folder: Path, advance: Callable[[int], None]
) -> Iterator[nn.Module]:
    """The same models, their weights read module by module."""
    base, stored = open_llava_tensors(base_folder), open_llava_tensors(folder)

    def offload(model: nn.Module, tensors: dict[str, StoredTensor], load: Callable) -> nn.Module:
        def read(name: str) -> torch.Tensor:
            if ".lora_" in name:
                # What is kept apart has the same names and, bit for bit, the same values.
                # peft writes DoRA's magnitudes without an ending.
                name = name.replace(".default.", ".").replace(f"{MAGNITUDES}.weight", MAGNITUDES)
                return trained.tensors[name].load(torch.float32)
            # peft moves parameters into wrappers.
            name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(MODULES_TO_SAVE, ".")
            return load(tensors[find_stored(tensors, name)])

        report_layers(model, advance)
        # DoRA reads the weights of its parts itself.
        return offload_weights(model, read, [module for module in model.modules() if isinstance(module, LoraLayer)])

    def load(tensor: StoredTensor) -> torch.Tensor:
        return tensor.load(torch.float32)

    def make_unmerged(adapter: Path = trained.folder) -> nn.Module:
        empty = _make_empty(base_folder)
        return add_adapter(empty, adapter).eval() if (adapter / ADAPTER_CONFIG).is_file() else empty

    yield offload(make_unmerged(), base, lambda tensor: load(trained.replaced.get(tensor.name, tensor)))
    yield offload(_make_empty(base_folder), base, lambda tensor: _merge_whole(trained, tensor))
    yield offload(make_unmerged(folder / LANGUAGE_LORA), stored, load)
    read_rounded = _read_in_four_bits(base_folder)
    yield offload(make_unmerged(), base, lambda tensor: read_rounded(trained.replaced.get(tensor.name, tensor)))


def _read_in_four_bits(base_folder: Path) -> Callable[[StoredTensor], torch.Tensor]:
    """What reads a tensor of the base as it is, in float32, after those that --load_in_4bit quantises were."""
    linears = list_linears(_make_empty(base_folder), LANGUAGE_MODEL)
    quantised = {to_disk_name(f"{name}.weight") for name in linears}

    def read(stored: StoredTensor) -> torch.Tensor:
        weight = stored.load(torch.float32)
        return round_to_four_bit(weight) if stored.name in quantised else weight

    return read


def _make_empty(base_folder: Path) -> nn.Module:
    config = LlavaConfig.from_pretrained(base_folder, local_files_only=True)
    return make_empty_model(LlavaForConditionalGeneration, config)


def _merge_whole(trained: TrainedWeights, stored: StoredTensor) -> torch.Tensor:
    merged, start = torch.empty(stored.shape), 0
    for piece in trained.merge(stored):
        merged[start : start + len(piece)] = piece
        start += len(piece)
    return merged


def _load_prompts(training: dict, processing: Processing) -> tuple[list[dict], str]:
    """First questions of the training data, or of the sample memes where that data is not at hand, and what they are
    of. A merge is not to fail for want of data: it needs none."""
    data, settings = training["data"], training["settings"]
    files, limits = (data["annotations"], data["image_folder"]), (settings["max_pixels"], settings["model_max_length"])
    try:
        prompts, source = _read_prompts(*map(Path, files), *limits, processing), data["annotations"]
    except UserError as error:
        prompts = _read_prompts(SAMPLES, SAMPLES.parent, MAX_PIXELS, None, processing)
        source = f"{SAMPLES}\n(not of the training data: {error})"
    return prompts, f"{len(prompts)} records of {source}"


def _read_prompts(
    annotations: Path, image_folder: Path, max_pixels: int, max_length: int | None, processing: Processing
) -> list[dict]:
    """Inputs of the first records whose first question can be asked; no other image is opened. Raises UserError where
    the file cannot be read, or there is no such record."""
    encoder, policy, prompts = processing.encoder, processing.image_policy, []
    for place, value in iterate_values(annotations):
        try:
            record = parse_record(value, place)
            question = list(takewhile(lambda turn: turn.role != "assistant", record.turns))
            input_ids = torch.tensor([encoder.encode_prompt(question)])  # (1, prompt)
            if max_length is not None and input_ids.shape[1] >= max_length:
                continue
            # A later turn's images are not part of the first question.
            shown = record.images[: int((input_ids == encoder.image_token_id).sum()) // processing.tokens_per_image]
            images = [open_image(resolve_image_path(image, image_folder), policy, max_pixels) for image in shown]
        except RecordFault:
            continue
        # (images, 3, size, size)
        pixel_values = torch.stack([to_pixel_values(image, policy) for image in images]) if images else None
        prompts.append({"input_ids": input_ids, "pixel_values": pixel_values})
        if len(prompts) == VERIFIED_RECORDS:
            break
    if not prompts:
        raise UserError(f"{annotations}: no record can be asked about with the images of {image_folder}")
    return prompts


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
