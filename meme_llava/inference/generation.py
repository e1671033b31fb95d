"""Answers of our models to questions about an image. The prompt comes from `conversation`, as in training."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.errors import UserError
from meme_llava.inference.questions import Prediction, Question
from meme_llava.model.llava import PROJECTOR, Processing, load_llava, load_processing
from meme_llava.model.packed_attention import gpu_multiplies_bf16
from meme_llava.model.trainable import apply_trained_weights
from meme_llava.storage.fingerprint import find_base
from meme_llava.storage.run_record import holds_trained_weights


class PromptTooLong(UserError):
    """A prompt that leaves the model no position for an answer."""


@dataclass(frozen=True)
class Answerer:
    """A model with everything needed to ask it.

    Args:
        options: what `generate` takes besides inputs and generation_config.
        device: where inputs go; that of the model's weights, unless an engine keeps those elsewhere.
    """

    model: torch.nn.Module
    processing: Processing
    generation_config: GenerationConfig
    options: Mapping = field(default_factory=dict)
    device: torch.device | None = None

    def build_inputs(
        self, image: Image.Image, question: str, system: str | None = None, earlier: Sequence[tuple[str, str]] = ()
    ) -> dict[str, torch.Tensor]:
        """Inputs of one question: input_ids and attention_mask (1, length), pixel_values (1, 3, size, size).

        The image stands in front of the first question, as in the sample memes. `earlier` holds the
        questions and answers about it so far.
        """
        turns = [Turn("system", system)] if system is not None else []
        for asked, answered in earlier:
            turns += [Turn("user", asked), Turn("assistant", answered)]
        turns.append(Turn("user", question))
        if any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "user"):
            raise UserError(f"the question holds {IMAGE_PLACEHOLDER}; the image is put in front of it by itself")
        first = 0 if system is None else 1
        turns[first] = Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns[first].text}")
        input_ids = torch.tensor([self.processing.encoder.encode_prompt(turns)])
        pixel_values = to_pixel_values(image, self.processing.image_policy)[None]
        device, dtype = self.device or self.model.device, self.model.dtype
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": torch.ones_like(input_ids).to(device),
            "pixel_values": pixel_values.to(device, dtype),
        }

    # Not inference mode: what engines gather of a model that trains must be fit for a backward pass later.
    @torch.no_grad()
    def answer(
        self,
        image: Image.Image,
        question: str,
        system: str | None = None,
        max_new_tokens: int = 512,
        streamer: BaseStreamer | None = None,
        earlier: Sequence[tuple[str, str]] = (),
        stopping: StoppingCriteriaList | None = None,
    ) -> Prediction:
        """The greedy answer about one image; `stopping` may end it before the model does.

        Raises:
            PromptTooLong: the model has no more positions than the prompt takes.
        """
        inputs = self.build_inputs(image, question, system, earlier)
        if (length := inputs["input_ids"].shape[1]) >= self.positions:
            raise PromptTooLong(
                f"the prompt takes {length} positions, the model has {self.positions}; ask less at once"
            )
        return self._generate(inputs, max_new_tokens, streamer, stopping)[0]

    @torch.no_grad()
    def answer_together(
        self, images: list[Image.Image], questions: list[Question], max_new_tokens: int = 512
    ) -> list[Prediction]:
        """The greedy answers to several questions at once; shorter prompts are padded on the left.

        Files often ask several things about an image; the vision tower sees it once.

        Raises:
            PromptTooLong: the model has no more positions than one of the prompts takes.
        """
        batch = [
            self.build_inputs(image, question.text, question.system)
            for image, question in zip(images, questions, strict=True)
        ]
        lengths = [inputs["input_ids"].shape[1] for inputs in batch]
        longest = max(lengths)
        if longest >= self.positions:
            image = questions[lengths.index(longest)].image
            raise PromptTooLong(
                f"a question about {image} takes {longest} positions, the model has {self.positions}; leave it out"
            )
        padded = {
            name: torch.cat(
                [functional.pad(inputs[name], (longest - inputs[name].shape[1], 0), value=value) for inputs in batch]
            )  # (questions, longest)
            for name, value in (("input_ids", self.padding_id), ("attention_mask", 0))
        }
        pixels = {question.image: inputs["pixel_values"] for question, inputs in zip(questions, batch, strict=True)}
        padded["pixel_values"] = torch.cat(list(pixels.values()))  # (images, 3, size, size)
        places = {path: place for place, path in enumerate(pixels)}
        with self._repeat_features([places[question.image] for question in questions]):
            predictions = self._generate(padded, max_new_tokens)
        return [replace(one, question=question) for one, question in zip(predictions, questions, strict=True)]

    @contextlib.contextmanager
    def _repeat_features(self, of_image: list[int]) -> Iterator[None]:
        """While the block lasts, the projector gives (questions, tokens, width) in place of (images, …)."""
        # In generate, since engines gather the weights for that.
        projector = next(module for name, module in self.model.named_modules() if name.endswith(PROJECTOR))
        handle = projector.register_forward_hook(lambda module, inputs, features: features[of_image])
        try:
            yield
        finally:
            handle.remove()

    @property
    def positions(self) -> int:
        """How many the model has for a prompt and its answer together."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def padding_id(self) -> int:
        """What fills up prompts and ended answers; the attention mask hides it."""
        return self.generation_config.eos_token_id[0]

    def _generate(
        self,
        inputs: dict[str, torch.Tensor],
        max_new_tokens: int,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> list[Prediction]:
        """The answer to every prompt of the inputs."""
        generation_config = copy.copy(self.generation_config)
        generation_config.max_new_tokens = max_new_tokens
        generation_config.pad_token_id = self.padding_id
        options = {"streamer": streamer, "stopping_criteria": stopping, **self.options}
        output = self.model.generate(**inputs, generation_config=generation_config, **options)
        return [self.read_answer(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def read_answer(self, new_ids: list[int]) -> Prediction:
        """The answer that ends at the first end token, if there is one."""
        return read_answer(new_ids, self.generation_config.eos_token_id, self.processing.tokenizer)

    def make_streamer(self) -> TextStreamer:
        """Prints the answer to standard output while it grows."""
        return TextStreamer(self.processing.tokenizer, skip_prompt=True, skip_special_tokens=True)


def read_answer(new_ids: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Prediction:
    """The answer that ends at the first of the `ends`, if one is there; the padding after it is left out."""
    length = next((place + 1 for place, token in enumerate(new_ids) if token in ends), len(new_ids))
    new_ids = new_ids[:length]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return Prediction(None, text.strip(), len(new_ids), new_ids[-1] in ends, token_ids=tuple(new_ids))


def load_answerer(folder: Path, base_model: Path | None = None, device: str = "auto", dtype: str = "auto") -> Answerer:
    """Load a merged or base model, or base + trained weights, ready to be asked.

    Raises:
        UserError: the folder is neither, or the base is missing or another one.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    is_adapter = holds_trained_weights(folder)
    if base_model is not None and not is_adapter:
        raise UserError(f"{folder}: is a whole model, so --base_model has no use; leave it out")
    model_folder = find_base(folder, base_model) if is_adapter else folder
    processing = load_processing(model_folder)
    model = load_llava(model_folder, chosen_dtype)
    generation_config = choose_stops(model.generation_config, processing)
    if is_adapter:
        model = apply_trained_weights(model, folder)
    return Answerer(model.to(chosen_device).eval(), processing, generation_config)


def choose_stops(generation_config: GenerationConfig, processing: Processing) -> GenerationConfig:
    """The same, with the end of a turn among the tokens that end an answer."""
    generation_config = copy.copy(generation_config)
    # Our directories say so themselves; another LLaVA's folder may not.
    stops = generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    generation_config.eos_token_id = list(dict.fromkeys([processing.encoder.turn_end_id, *stops]))
    return generation_config


def choose_device(device: str) -> torch.device:
    """ "auto" gives the GPU if there is one, else the CPU; anything else is spelled as torch does."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here ({error})") from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" gives bfloat16 on a GPU that has it and float32 elsewhere: float16 overflows with Qwen2-7B."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if device.type == "cuda" and gpu_multiplies_bf16() else torch.float32
