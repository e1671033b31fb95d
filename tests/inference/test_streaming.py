"""Answers as they grow: the same at the end as infer.py's, several turns as in training, and an end when asked."""

import contextlib
import threading

import pytest
from conftest import encode_example
from PIL import Image

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.inference.chat import stream_answer
from meme_llava.inference.generation import PromptTooLong

QUESTION = "图里写了什么？"
LONG = 3000  # tokens; a model of two training steps never stops by itself
EARLIER = [("你好", "写着“收到”。"), ("什么意思？", "很开心。")]


@pytest.fixture
def image(world):
    return open_image(world.image_folder / "p0.png")


def is_answering() -> bool:
    return any(thread.name.startswith("answer") for thread in threading.enumerate())


@pytest.mark.parametrize("earlier", [[], EARLIER], ids=["first turn", "third turn"])
def test_the_last_of_a_stream_is_the_answer_and_the_others_grow_to_it(answerer, image, earlier):
    answer = answerer.answer(image, QUESTION, max_new_tokens=12, earlier=earlier)
    grown = list(stream_answer(answerer, image, QUESTION, max_new_tokens=12, earlier=earlier))
    assert grown[-1] == answer and len(grown) > 3
    assert all(answer.text.startswith(partial.text) for partial in grown)
    assert [len(partial.text) for partial in grown] == sorted(len(partial.text) for partial in grown)


def test_a_question_after_others_has_the_prompt_of_training(answerer, image):
    inputs = answerer.build_inputs(image, QUESTION, "你是一只猫", EARLIER)
    turns = [
        Turn("system", "你是一只猫"),
        Turn("user", f"{IMAGE_PLACEHOLDER}\n你好"),
        Turn("assistant", "写着“收到”。"),
        Turn("user", "什么意思？"),
        Turn("assistant", "很开心。"),
        Turn("user", QUESTION),
    ]
    ids = inputs["input_ids"][0].tolist()
    example = encode_example(answerer.processing.encoder, [*turns, Turn("assistant", "困")]).input_ids
    assert example[: len(ids)] == ids
    # Behind the prompt stand the answer's characters and the end token, nothing of the template.
    encoder = answerer.processing.encoder
    assert example[len(ids) :] == [*encoder.encode_text("困"), encoder.turn_end_id]


def test_earlier_turns_change_the_answer(answerer, image):
    alone = answerer.answer(image, QUESTION, max_new_tokens=12)
    assert answerer.answer(image, QUESTION, max_new_tokens=12, earlier=EARLIER) != alone


def test_closing_a_stream_ends_the_models_work(answerer, image):
    with contextlib.closing(stream_answer(answerer, image, QUESTION, max_new_tokens=LONG)) as answers:
        next(answers)
        assert is_answering()
    assert not is_answering()


def test_a_model_that_is_told_to_stop_does_so(answerer, image):
    told = threading.Event()
    answers = stream_answer(answerer, image, QUESTION, max_new_tokens=LONG, should_stop=told.is_set)
    next(answers)
    told.set()
    *_, last = answers
    assert 1 <= last.tokens < LONG and last.stopped is False and not is_answering()


def test_errors_of_the_model_reach_who_waits(answerer, image):
    with pytest.raises(UserError, match="the question holds <image>"):
        list(stream_answer(answerer, image, "看<image>"))
    with pytest.raises(UserError, match="the question holds <image>"):
        answerer.build_inputs(image, QUESTION, earlier=[("看<image>", "好")])
    with pytest.raises(PromptTooLong, match="the model has 4096"):
        list(stream_answer(answerer, Image.new("RGB", (9, 9)), "困" * 5000))
    assert not is_answering()
