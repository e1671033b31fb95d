"""Any image-text-to-text model of transformers, such as the original LLaVA-1.5, asked about images.

Our own models are asked through `generation`, which knows their prompt; these bring a chat template.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from meme_llava.errors import UserError
from meme_llava.inference.generation import choose_device, choose_dtype, read_answer
from meme_llava.inference.questions import Prediction, Question
from meme_llava.model.llava import quiet_transformers


@dataclass(frozen=True)
class TransformersModel:
    """A model and its processor."""

    model: torch.nn.Module
    processor: object

    @torch.inference_mode()
    def answer_together(
        self, images: list[Image.Image], questions: list[Question], max_new_tokens: int = 512
    ) -> list[Prediction]:
        """The greedy answers about several RGB images at once; shorter prompts are padded on the left."""
        inputs = self.build_inputs(images, questions).to(self.model.device, self.model.dtype)
        generation_config = copy.copy(self.model.generation_config)
        generation_config.max_new_tokens = max_new_tokens
        generation_config.do_sample = False
        # A recipe for sampling has no meaning for the likeliest answer.
        for name in ("temperature", "top_p", "top_k"):
            setattr(generation_config, name, None)
        stops = _list_stops(generation_config, self.processor.tokenizer)
        generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, generation_config=generation_config)
        prompt_length = inputs["input_ids"].shape[1]
        return [
            replace(read_answer(ids, stops, self.processor.tokenizer), question=question)
            for ids, question in zip(output[:, prompt_length:].tolist(), questions, strict=True)
        ]

    def build_inputs(self, images: list[Image.Image], questions: list[Question]):
        """What the processor makes of images and prompts; input_ids (questions, longest), padded on the left."""
        prompts = [self._make_prompt(question) for question in questions]
        start = self.processor.tokenizer.bos_token
        # Some templates write it themselves; the tokenizer would add another.
        has_start = bool(start) and all(prompt.startswith(start) for prompt in prompts)
        options = {"add_special_tokens": False} if has_start else {}
        return self.processor(
            images=[[image] for image in images],
            text=prompts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        )

    def _make_prompt(self, question: Question) -> str:
        messages = [] if question.system is None else [{"role": "system", "content": _make_text(question.system)}]
        messages.append({"role": "user", "content": [{"type": "image"}, *_make_text(question.text)]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


def _make_text(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


def _list_stops(generation_config, tokenizer) -> list[int]:
    stops = generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    return stops or [tokenizer.eos_token_id]


def load_transformers_model(folder: Path, device: str, dtype: str) -> TransformersModel:
    """Load a model folder, without any code of its own.

    Raises:
        UserError: transformers knows no such model, or its processor has no chat template.
    """
    chosen_device = choose_device(device)
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=choose_dtype(dtype, chosen_device)
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder}: cannot be loaded as an image-text-to-text model of transformers: {reason}"
        ) from error
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{folder}: has no chat template, so how to ask it is not known; take a release of the model with one, "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return TransformersModel(model.to(chosen_device).eval(), processor)
