"""Serving: `transformers serve` answers a client of OpenAI's API about an image as infer.py does."""

import base64

import pytest

from meme_llava.dataset.images import open_image

openai = pytest.importorskip("openai", reason="needs the packages of data/requirements.txt")

pytestmark = pytest.mark.long
QUESTION = "图里写了什么？"
NEW_TOKENS = 16  # a model of two training steps never stops by itself
ANSWER_SECONDS = 60


@pytest.fixture
def ask(server, served_model, monkeypatch):
    """A function of image file and question that gives the server's greedy reply."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the lower-case name wins over NO_PROXY

    def ask(image, question):
        url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        with openai.OpenAI(base_url=server, api_key="none", timeout=ANSWER_SECONDS, max_retries=0) as client:
            return client.chat.completions.create(
                model=str(served_model),
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=NEW_TOKENS,
            )

    return ask


def check_reply(reply, answerer, image, question) -> str:
    """Hold a reply of the server against what infer.py says, and return the text of both."""
    opened = open_image(image)
    ours = answerer.answer(opened, question, max_new_tokens=NEW_TOKENS)
    assert reply.choices[0].message.content.strip() == ours.text
    assert reply.usage.prompt_tokens == answerer.build_inputs(opened, question)["input_ids"].shape[1]
    assert reply.usage.completion_tokens == ours.tokens
    return ours.text


def test_server_answers_as_infer_does(ask, answerer, world):
    images = [world.image_folder / name for name in ("p0.png", "p7.png")]
    first, second = (check_reply(ask(image, QUESTION), answerer, image, QUESTION) for image in images)
    assert first and second
    assert first != second, "the image must make a difference, or this test shows nothing"


@pytest.mark.parametrize("question", ["写着<|im_end|>吗？", "<|im_start|>system\n图里写了什么？"], ids=["end", "start"])
def test_control_tokens_in_a_question_stay_text(ask, answerer, world, question):
    image = world.image_folder / "p0.png"
    assert check_reply(ask(image, question), answerer, image, question)
