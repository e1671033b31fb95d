"""Conversations about an image with one model or two: answers that grow, and a sentence for what cannot be done.

Nothing about pages: messages are dictionaries, as gradio.ChatInterface has them.
"""

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, is_blank
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.images import MAX_PIXELS, open_image
from meme_llava.inference.generation import Answerer, PromptTooLong
from meme_llava.inference.questions import Prediction
from meme_llava.inference.settings import DEFAULT_QUESTION

# A page that is sent every token of a fast model lags behind it.
SECONDS_BETWEEN_UPDATES = 0.1

WAITING = "…"
NO_IMAGE = "请先放一张图片。Add an image first."
HOLDS_PLACEHOLDER = f"问题里不能有 {IMAGE_PLACEHOLDER}。The question may not hold {IMAGE_PLACEHOLDER}."
CUT_OFF = "（到达长度上限 cut off at --max_new_tokens）"
TOO_LONG = "对话太长，请开始新对话。The conversation is too long; begin a new one."
OUT_OF_MEMORY = "内存或显存不足，请开始新对话再试。Out of memory; begin a new conversation."
FAILED = "出错了，原因见服务器的终端。Something went wrong; the server's terminal says what."
# By the kinds of `open_image`; none names a path of the server.
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
# What may stand behind an answer, or in place of one, and is no part of it.
REMARKS = (WAITING, NO_IMAGE, HOLDS_PLACEHOLDER, CUT_OFF, TOO_LONG, OUT_OF_MEMORY, FAILED, *IMAGE_PROBLEMS.values())


def stream_answer(
    answerer: Answerer,
    image: Image.Image,
    question: str,
    system: str | None = None,
    max_new_tokens: int = 512,
    earlier: Sequence[tuple[str, str]] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Prediction]:
    """The greedy answer as it grows; the last one is what `Answerer.answer` gives.

    The model asks `should_stop` after every token, whether anybody iterates or not. Closing the iterator ends its
    work, too. Its errors are raised here.
    """
    streamer = TextIteratorStreamer(answerer.processing.tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_closed = threading.Event()

    def check_stop(ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(ids),), is_closed.is_set() or should_stop(), device=ids.device)

    with ThreadPoolExecutor(1, thread_name_prefix="answer") as pool:
        arguments = (image, question, system, max_new_tokens, streamer, earlier, StoppingCriteriaList([check_stop]))
        work = pool.submit(answerer.answer, *arguments)
        work.add_done_callback(lambda _: streamer.end())  # an error must not leave this loop waiting
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield Prediction(None, text.strip())
        finally:
            is_closed.set()
        yield work.result()


class Chat:
    """The models, and how they are asked one after the other.

    Only one visitor may be inside `reply` at a time; the page's queue sees to that.
    """

    def __init__(self, answerers: Sequence[Answerer], system: str | None, max_new_tokens: int):
        self._answerers = answerers
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._is_closing = threading.Event()

    def close(self) -> None:
        """End whatever answer is growing."""
        self._is_closing.set()

    def reply(self, message: dict, history: Sequence[dict]) -> Iterator[list[dict]]:
        """The models' replies as they grow, one message each, or one that says why there is none.

        Args:
            message: "text", the question, and "files", of which the last becomes the image of a new conversation.
            history: the earlier messages, with these replies among them.
        """
        path, earlier = self._read_history(history)
        if message["files"]:
            path, earlier = Path(message["files"][-1]), [[] for _ in self._answerers]
        question = _read_question(message["text"])
        problem = NO_IMAGE if path is None else HOLDS_PLACEHOLDER if IMAGE_PLACEHOLDER in question else None
        try:
            # Each model opens it for its own square, as infer.py does.
            images = [] if problem else [open_image(path, one.processing.image_policy) for one in self._answerers]
        except RecordFault as fault:
            problem = IMAGE_PROBLEMS[fault.kind]
        if problem:
            yield [make_reply(problem)]
            return
        texts = [WAITING] * len(images)
        for place, (answerer, image, exchanges) in enumerate(zip(self._answerers, images, earlier, strict=True)):
            for texts[place] in self._answer(answerer, image, question, exchanges):
                yield [make_reply(text) for text in texts]

    def _answer(
        self, answerer: Answerer, image: Image.Image, question: str, earlier: Sequence[tuple[str, str]]
    ) -> Iterator[str]:
        """One model's answer as it grows, at last with a remark where there is no more of it."""
        text, remark, shown_at = "", "", 0.0
        arguments = (image, question, self._system, self._max_new_tokens, earlier, self._is_closing.is_set)
        try:
            with contextlib.closing(stream_answer(answerer, *arguments)) as answers:
                for answer in answers:
                    text, remark = answer.text, "" if answer.stopped else CUT_OFF
                    if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                        yield text or WAITING
                        shown_at = time.monotonic()
        except PromptTooLong:
            remark = TOO_LONG
        except torch.OutOfMemoryError:
            remark = OUT_OF_MEMORY
        except Exception:  # whatever it is: gradio would leave the page locked
            traceback.print_exc()
            remark = FAILED
        yield "\n".join(filter(None, (text, remark)))

    def _read_history(self, history: Sequence[dict]) -> tuple[Path | None, list[list[tuple[str, str]]]]:
        """The present image, and what each model was asked and answered about it."""
        turns = []  # image, question, replies
        for message in history:
            parts = message["content"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if message["role"] == "user":
                paths = [part["file"]["path"] for part in parts if part["type"] == "file"]
                turns.append((paths[-1] if paths else None, _read_question(text), []))
            elif turns:
                turns[-1][2].append(text)
        path, earlier = None, [[] for _ in self._answerers]
        for image, question, replies in turns:
            if replies and replies[0] in IMAGE_PROBLEMS.values():
                continue
            if image is not None:
                path, earlier = Path(image), [[] for _ in self._answerers]
            for exchanges, reply in zip(earlier, replies, strict=False):
                for remark in REMARKS:
                    reply = reply.removesuffix(remark).rstrip("\n")
                # What gave no answer is not a turn that a model was trained to go on from.
                if reply:
                    exchanges.append((question, reply))
        return path, earlier


def make_reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _read_question(text: str) -> str:
    return DEFAULT_QUESTION if is_blank(text) else text.strip()
