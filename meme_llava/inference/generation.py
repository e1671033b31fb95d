"""Answers of models that run here: ours, by the prompt of training, and others of transformers, by chat templates."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.images import ImagePolicy, open_image
from meme_llava.errors import UserError, first_line, printable
from meme_llava.inference.questions import Prediction, Question
from meme_llava.model.llava import PROJECTOR, Processing, load_llava, load_processing
from meme_llava.model.loading import LOCALLY, explain_unloadable
from meme_llava.model.packed_attention import gpu_multiplies_bf16
from meme_llava.model.trainable import apply_trained_weights
from meme_llava.storage.fingerprint import check_weights, find_base
from meme_llava.storage.run_record import check_is_whole, holds_trained_weights


class PromptTooLong(UserError):
    """A prompt that leaves the model no position for an answer."""


class PrintableStreamer(TextStreamer):
    """Prints an answer as it grows, as a terminal may show it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


@dataclass(frozen=True)
class Answerer:
    """A LLaVA of ours with everything needed to ask it."""

    model: torch.nn.Module
    processing: Processing
    generation_config: GenerationConfig
    options: Mapping = field(default_factory=dict)  # what `generate` takes besides inputs and generation_config
    device: torch.device | None = None  # where inputs go, if not to the model's weights: an engine may keep those away

    def build_inputs(
        self, image: Image.Image, question: str, system: str | None = None, earlier: Sequence[tuple[str, str]] = ()
    ) -> dict[str, torch.Tensor]:
        """Inputs of one question: input_ids and attention_mask (1, length), pixel_values (1, 3, size, size).

        The image stands in front of the first question, as in the sample memes. `earlier` holds the questions and
        answers about it so far.
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
        """The greedy answer about one image; `stopping` may end it before the model does. Raises PromptTooLong."""
        inputs = self.build_inputs(image, question, system, earlier)
        if (length := inputs["input_ids"].shape[1]) >= self.positions:
            raise PromptTooLong(
                f"the prompt takes {length} positions, the model has {self.positions}; ask less at once"
            )
        return self._generate(inputs, [None], max_new_tokens, streamer=streamer, stopping_criteria=stopping)[0]

    def answer_together(self, questions: Sequence[Question], max_new_tokens: int = 512) -> list[Prediction]:
        """The greedy answers to several questions at once; shorter prompts are padded on the left.

        Files often ask several things about an image; the vision tower sees it once. Raises PromptTooLong, and
        RecordFault for an image that cannot be read.
        """
        images = _open_images(questions, self.processing.image_policy)
        batch = [self.build_inputs(images[one.image], one.text, one.system) for one in questions]
        lengths = [inputs["input_ids"].shape[1] for inputs in batch]
        if (longest := max(lengths)) >= self.positions:
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
            return self._generate(padded, questions, max_new_tokens)

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

    # Not inference mode: what engines gather of a model that trains must be fit for a backward pass later.
    @torch.no_grad()
    def _generate(
        self, inputs: dict[str, torch.Tensor], questions: Sequence, max_new_tokens: int, **options
    ) -> list[Prediction]:
        """The answer to every prompt of the inputs."""
        config = copy.copy(self.generation_config)
        config.max_new_tokens = max_new_tokens
        config.pad_token_id = self.padding_id
        output = self.model.generate(**inputs, generation_config=config, **{**options, **self.options})
        return _read_answers(output, inputs, config.eos_token_id, self.processing.tokenizer, questions)


def _open_images(questions: Sequence[Question], policy: ImagePolicy | None) -> dict[Path, Image.Image]:
    """Each image once, however many questions are about it."""
    return {path: open_image(path, policy) for path in dict.fromkeys(question.image for question in questions)}


def _read_answers(
    output: torch.Tensor, inputs: Mapping, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, questions: Sequence
) -> list[Prediction]:
    """What stands in `output`, (questions, positions), behind each prompt, up to the first of the `ends`."""
    predictions = []
    for ids, question in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), questions, strict=True):
        ids = ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        predictions.append(Prediction(question, text, len(ids), ids[-1] in ends))
    return predictions


def load_answerer(folder: Path, base_model: Path | None = None, device: str = "auto", dtype: str = "auto") -> Answerer:
    """Load a merged or base model, or base + trained weights. Raises UserError for other folders or another base, and
    CheckpointError for weights that are not those of their run record."""
    chosen_device = choose_device(device)
    is_adapter = holds_trained_weights(folder)
    if base_model is not None and not is_adapter:
        raise UserError(f"{folder}: is a whole model, so --base_model has no use; leave it out")
    model_folder = find_base(folder, base_model) if is_adapter else folder
    processing = load_processing(model_folder)
    model = load_llava(model_folder, choose_dtype(dtype, chosen_device))
    generation_config = choose_stops(model.generation_config, processing)
    if is_adapter:
        model = apply_trained_weights(model, folder)
    else:
        check_weights(folder)
    return Answerer(model.to(chosen_device).eval(), processing, generation_config)


def choose_stops(generation_config: GenerationConfig, processing: Processing) -> GenerationConfig:
    """The same, with the end of a turn among the tokens that end an answer."""
    generation_config = copy.copy(generation_config)
    # Our directories say so themselves; another LLaVA's folder may not.
    stops = [processing.encoder.turn_end_id, *_list_stops(generation_config)]
    generation_config.eos_token_id = list(dict.fromkeys(stops))
    return generation_config


def _list_stops(generation_config: GenerationConfig) -> list[int]:
    stops = generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


def choose_device(device: str) -> torch.device:
    """ "auto" gives the GPU if there is one, else the CPU; anything else is spelled as torch does."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # which "meta", a device without contents, cannot give
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: cannot be used here ({first_line(error)})") from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" gives bfloat16 on a GPU that has it and float32 elsewhere: float16 overflows with Qwen2-7B."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if device.type == "cuda" and gpu_multiplies_bf16() else torch.float32


@dataclass(frozen=True)
class TransformersModel:
    """Any image-text-to-text model of transformers, such as the original LLaVA-1.5, and its processor."""

    model: torch.nn.Module
    processor: object

    @torch.inference_mode()
    def answer_together(self, questions: Sequence[Question], max_new_tokens: int = 512) -> list[Prediction]:
        """The greedy answers to several questions at once; shorter prompts are padded on the left. Raises RecordFault
        for an image that cannot be read."""
        opened = _open_images(questions, None)
        images = [opened[question.image] for question in questions]
        inputs = self.build_inputs(images, questions).to(self.model.device, self.model.dtype)
        tokenizer = self.processor.tokenizer
        config = copy.copy(self.model.generation_config)
        # A recipe for sampling has no meaning for the likeliest answer.
        config.update(max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None)
        config.pad_token_id = tokenizer.pad_token_id
        output = self.model.generate(**inputs, generation_config=config)
        return _read_answers(output, inputs, _list_stops(config) or [tokenizer.eos_token_id], tokenizer, questions)

    def build_inputs(self, images: Sequence[Image.Image], questions: Sequence[Question]):
        """What the processor makes of images and prompts; input_ids (questions, longest), padded on the left."""
        conversations = []
        for image, question in zip(images, questions, strict=True):
            user = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
            conversations.append([{"role": "user", "content": user}])
            if question.system is not None:
                system = [{"type": "text", "text": question.system}]
                conversations[-1].insert(0, {"role": "system", "content": system})
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )


def load_transformers_model(folder: Path, device: str, dtype: str) -> TransformersModel:
    """Load a model folder, without any code of its own. Raises UserError where that or the chat template is missing."""
    check_is_whole(folder)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    with explain_unloadable(folder, "cannot be loaded as an image-text-to-text model of transformers"):
        processor = AutoProcessor.from_pretrained(folder, **LOCALLY)
        if getattr(processor, "image_processor", None) is not None:
            # By Pillow, so that answers do not depend on whether torchvision is installed.
            processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCALLY)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=chosen_dtype, **LOCALLY)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{folder}: has no chat template, so how to ask it is not known; take a release of the model with one, "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return TransformersModel(model.to(chosen_device).eval(), processor)
