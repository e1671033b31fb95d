"""A visitor's conversation about an image with one model or two, and the notices for what cannot be done. Nothing about
pages.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER
from meme_llava.dataset.images import MAX_PIXELS, ImagePolicy, open_image
from meme_llava.dataset.records import RecordFault
from meme_llava.inference.generation import Answerer, PromptTooLong
from meme_llava.inference.streaming import stream_answer

# A page that is sent every token of a fast model lags behind it.
SECONDS_BETWEEN_UPDATES = 0.1
PREVIEW_SIDE = 1024  # pixels

NO_IMAGE = "请先放一张图片。Add an image first."
NO_QUESTION = "请先写一个问题。Write a question first."
HOLDS_PLACEHOLDER = f"问题里不能有 {IMAGE_PLACEHOLDER}。The question may not hold {IMAGE_PLACEHOLDER}."
IMAGE_PROBLEMS = {
    "empty_file": "这个文件是空的。The file is empty.",
    "not_an_image": "这个文件不是图片。The file is not an image.",
    "unaccepted_format": "不支持这种图片格式，请转成 JPEG 或 PNG。Convert it to JPEG or PNG first.",
    "damaged_image": "图片已损坏或不完整，请换一张。The image is damaged; try another.",
    "too_many_pixels": f"图片太大，最多 {MAX_PIXELS // 1_000_000} 百万像素。The image has more than "
    f"{MAX_PIXELS // 1_000_000} million pixels.",
    "missing_image": "图片已经从服务器上删除，请重新放一次。The image is gone from the server; add it again.",
    "unreadable_file": "服务器读不了这个文件，请换一张。The file cannot be read; try another.",
}
STOPPED = "已停止 stopped"
CUT_OFF = "到达长度上限 cut off at --max_new_tokens"
TOO_LONG = "对话太长，请开始新对话。The conversation is too long; begin a new one."
OUT_OF_MEMORY = "内存或显存不足，请开始新对话再试。Out of memory; begin a new conversation."


class ChatProblem(Exception):
    """Why something cannot be done, as a visitor is told it."""


@dataclass
class Reply:
    """One model's answer to one question; `remark` says why there is no more of it."""

    question: str
    text: str = ""
    remark: str = ""


class Conversation:
    """A visitor's image, and for each model what was asked and answered about it."""

    # No dataclass: gradio would turn one into a dictionary.
    def __init__(self) -> None:
        self.image: Path | None = None
        self.columns: list[list[Reply]] = []
        self.stop_asked = False

    def begin(self, image: Path | None) -> None:
        """Forget what was said, and end what is being said."""
        self.stop_asked = True
        self.image = image
        self.columns = []


class Chat:
    """The models, and how they are asked one after the other.

    Only one visitor may be inside `ask` at a time; the page's queue sees to that.
    """

    def __init__(self, answerers: list[Answerer], system: str | None, max_new_tokens: int):
        self._answerers = answerers
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._is_closing = threading.Event()

    def close(self) -> None:
        """End whatever answer is growing."""
        self._is_closing.set()

    def take_image(self, conversation: Conversation, path: Path) -> Image.Image:
        """Begin a conversation about another image. Returns it to be shown, at most 1024 pixels a side.

        Raises:
            ChatProblem: the file is not an image that can be opened; the conversation stays as it is.
        """
        image = open_for_visitor(path)
        conversation.begin(path)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return image

    def ask(self, conversation: Conversation, question: str) -> Iterator[None]:
        """Put a question to every model. The answers grow in `conversation`; iterates whenever they have grown.

        Raises:
            ChatProblem: it cannot be asked; the conversation stays as it is.
        """
        question = question.strip()
        if conversation.image is None:
            raise ChatProblem(NO_IMAGE)
        if not question:
            raise ChatProblem(NO_QUESTION)
        if IMAGE_PLACEHOLDER in question:
            raise ChatProblem(HOLDS_PLACEHOLDER)
        # Each model opens it for its own square, as infer.py does.
        images = [
            open_for_visitor(conversation.image, answerer.processing.image_policy) for answerer in self._answerers
        ]
        conversation.stop_asked = False
        if not conversation.columns:
            conversation.columns = [[] for _ in self._answerers]
        columns = conversation.columns
        for column in columns:
            column.append(Reply(question))
        yield
        for answerer, image, column in zip(self._answerers, images, columns, strict=True):
            yield from self._answer(conversation, answerer, image, column)

    def _answer(
        self, conversation: Conversation, answerer: Answerer, image: Image.Image, column: list[Reply]
    ) -> Iterator[None]:
        """Let one model answer the last question of its column."""

        def should_stop() -> bool:
            return conversation.stop_asked or self._is_closing.is_set()

        reply = column[-1]
        # What gave no answer is not a turn that a model was trained to go on from.
        earlier = [(earlier.question, earlier.text) for earlier in column[:-1] if earlier.text]
        arguments = (image, reply.question, self._system, self._max_new_tokens, earlier, should_stop)
        is_whole = False
        shown_at = 0.0
        try:
            if not should_stop():
                with contextlib.closing(stream_answer(answerer, *arguments)) as answers:
                    for answer in answers:
                        reply.text, is_whole = answer.text, answer.stopped
                        if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                            yield
                            shown_at = time.monotonic()
            if not is_whole:
                reply.remark = STOPPED if should_stop() else CUT_OFF
        except PromptTooLong:
            reply.remark = TOO_LONG
        except torch.OutOfMemoryError:
            reply.remark = OUT_OF_MEMORY
        yield


def open_for_visitor(path: Path, policy: ImagePolicy | None = None) -> Image.Image:
    """Like `open_image`; raises ChatProblem, which names no path of the server."""
    try:
        return open_image(path, policy)
    except RecordFault as fault:
        raise ChatProblem(IMAGE_PROBLEMS[fault.kind]) from fault
