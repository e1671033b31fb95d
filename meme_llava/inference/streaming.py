"""Answers handed out while they grow, and ended before their time.

Nothing about prompts or pages.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from meme_llava.inference.generation import Answerer
from meme_llava.inference.questions import Prediction

HALF_CHARACTER = "\ufffd"


def stream_answer(
    answerer: Answerer,
    image: Image.Image,
    question: str,
    system: str | None = None,
    max_new_tokens: int = 512,
    earlier: Sequence[tuple[str, str]] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Prediction]:
    """The greedy answer as it grows, token by token; the last one is what `Answerer.answer` gives.

    The model asks `should_stop` after every token, whether anybody iterates or not. Closing the iterator ends its
    work, too. Its errors are raised here.
    """
    tokens = _TokenQueue()
    is_closed = threading.Event()
    outcome: list[Prediction | BaseException] = []

    def work() -> None:
        try:
            stopping = StoppingCriteriaList([_StopWhen(lambda: is_closed.is_set() or should_stop())])
            outcome.append(answerer.answer(image, question, system, max_new_tokens, tokens, earlier, stopping))
        except BaseException as error:  # whatever it is, it belongs to who waits for the answer
            outcome.append(error)
        finally:
            tokens.end()

    worker = threading.Thread(target=work, name="answer")
    worker.start()
    try:
        token_ids: list[int] = []
        for token_id in tokens:
            token_ids.append(token_id)
            partial = answerer.read_answer(token_ids)
            # A character of several tokens is shown when its last one is there.
            yield dataclasses.replace(partial, text=partial.text.rstrip(HALF_CHARACTER))
    finally:
        is_closed.set()
        worker.join()
    (last,) = outcome
    if isinstance(last, BaseException):
        raise last
    yield last


class _TokenQueue(BaseStreamer):
    """Takes tokens from the thread that generates and gives them, one by one, to the one that iterates."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        # transformers hands over the prompt first, (1, length), then every new token, (1,).
        if self._has_prompt:
            self._tokens.put(value.item())
        self._has_prompt = True

    def end(self) -> None:
        self._tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens.get, None)


class _StopWhen(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]):
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), device=input_ids.device, dtype=torch.bool)
