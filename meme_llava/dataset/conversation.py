"""Prompt format and labels: which tokens a conversation becomes, and which of them carry loss. Training and inference
both build token ids here.

The format is ChatML, as Qwen2 uses it. The prompt for an answer is, token for token, the beginning of the training
example with that answer. Nothing about files, images or batches: an image is a run of image tokens.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from meme_llava.errors import UserError

IMAGE_PLACEHOLDER = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# What Qwen2-Instruct was trained with when a conversation brings no system turn.
DEFAULT_SYSTEM = "You are a helpful assistant."
CONTROL_TOKENS = (TURN_START, TURN_END, "<|endoftext|>", IMAGE_PLACEHOLDER)  # of every model that we build
HALF_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes that are no whole character
IGNORED_LABEL = -100
CONVERSATIONS_AT_ONCE = 4096  # bounds the memory of what the tokenizer returns
# Categories of characters that show nothing by themselves, and letters without ink (fillers of Hangul and Braille).
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800"
# Texts are encoded by threads. Data loaders fork later, and the tokenizers library would warn of that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

# The same format for programs that use the saved directory through `apply_chat_template`; a test holds both together.
# Content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} as other tools send it.
_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is system, user or assistant. In a user turn every `<image>` stands for an image."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a whole conversation, one image token for all of an image.

    Args:
        ids: int32 (tokens,).
        supervised: bool (tokens,), which of them carry loss.
        positions: how many it takes, image tokens counted.
        cut_tokens: left out to respect the length limit; images are never cut.
    """

    ids: np.ndarray
    supervised: np.ndarray
    positions: int
    cut_tokens: int

    def spread(self, image_token_id: int, tokens_per_image: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, image tokens repeated: int64 (positions,) each. A label is -100 where there is no loss."""
        times = np.where(self.ids == image_token_id, tokens_per_image, 1)
        labels = np.where(self.supervised, self.ids, IGNORED_LABEL)
        return np.repeat(self.ids, times).astype(np.int64), np.repeat(labels, times).astype(np.int64)


class DoesNotFit(ValueError):
    """A conversation whose prompt and images leave no room for an answer."""


class ConversationEncoder:
    """Turns conversations into token ids.

    Args:
        tokenizer: a transformers tokenizer with ChatML's tokens and `<image>`.
        tokens_per_image: how many positions one image takes.
        source: names the model folder in errors.
    """

    def __init__(self, tokenizer, tokens_per_image: int, source: str):
        self.tokens_per_image = tokens_per_image
        self.turn_start_id = find_token_id(tokenizer, TURN_START, source)
        self.turn_end_id = find_token_id(tokenizer, TURN_END, source)
        self.image_token_id = find_token_id(tokenizer, IMAGE_PLACEHOLDER, source)
        self.control_tokens = tuple(sorted(tokenizer.get_added_vocab()))
        self._text_tokenizer = _without_added_tokens(tokenizer, source)
        newline = self.encode_text("\n")
        self._headers = {
            role: [self.turn_start_id, *self.encode_text(role), *newline] for role in ("system", "user", "assistant")
        }
        # The end token and a line break; the line break is the template's, not the answer's.
        self._footer = [self.turn_end_id, *newline]
        self._prefix_ids = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []

    def encode_text(self, text: str) -> list[int]:
        """Ids of a user's string. Whatever it spells, it never becomes a control token."""
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to the place where the assistant's answer begins."""
        ids = list(self._prefix_ids)
        for turn in _with_system(turns):
            ids += self._headers[turn.role] + self._encode_content(turn, self.encode_text) + self._footer
        ids += self._headers["assistant"]
        return [token for token in ids for _ in range(self.tokens_per_image if token == self.image_token_id else 1)]

    def encode_many(
        self, conversations: Sequence[Sequence[Turn]], max_length: int | None
    ) -> Iterator["Tokens | DoesNotFit"]:
        """What `encode_tokens` returns or raises for many conversations; their texts are encoded in parallel."""
        for start in range(0, len(conversations), CONVERSATIONS_AT_ONCE):
            some = conversations[start : start + CONVERSATIONS_AT_ONCE]
            # The same question stands in many.
            texts = list(dict.fromkeys(text for turns in some for turn in _with_system(turns) for text in _split(turn)))
            encoded = self._text_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = {text: encoding.ids for text, encoding in zip(texts, encoded, strict=True)}
            for turns in some:
                try:
                    yield self.encode_tokens(turns, max_length, ids.__getitem__)
                except DoesNotFit as error:
                    yield error

    def encode_tokens(
        self, turns: Sequence[Turn], max_length: int | None = None, encode: Callable[[str], list[int]] | None = None
    ) -> Tokens:
        """Tokens of a conversation: every assistant text and the end token after it carries loss.

        Longer than `max_length` positions (image tokens counted), it ends with the last answer that can begin within
        the limit; that answer's tail is cut, its end token stands. Image tokens are never cut.

        Args:
            encode: in place of `encode_text`.

        Raises:
            DoesNotFit: no answer can begin within `max_length`, or an image comes after the last one that can.
        """
        ids: list[int] = list(self._prefix_ids)
        supervised: list[bool] = [False] * len(ids)
        answers: list[tuple[int, int]] = []  # place in `ids` and length of every answer, end token excluded
        for turn in _with_system(turns):
            header, content = self._headers[turn.role], self._encode_content(turn, encode or self.encode_text)
            is_answer = turn.role == "assistant"
            if is_answer:
                answers.append((len(ids) + len(header), len(content)))
            ids += header + content + self._footer
            supervised += [False] * len(header) + [is_answer] * (len(content) + 1) + [False] * (len(self._footer) - 1)
        last_start, last_length = answers[-1]
        end = whole = last_start + last_length + 1
        positions = self.count_positions(ids[:whole])
        if max_length is not None and positions > max_length:
            end = self._find_cut(ids, answers, max_length)
            ids[end - 1], supervised[end - 1] = self.turn_end_id, True
            positions = self.count_positions(ids[:end])
        return Tokens(np.array(ids[:end], np.int32), np.array(supervised[:end]), positions, whole - end)

    def count_positions(self, ids: list[int]) -> int:
        """Positions that tokens take, where one image token stands for all of an image."""
        return len(ids) + ids.count(self.image_token_id) * (self.tokens_per_image - 1)

    def _find_cut(self, ids: list[int], answers: list[tuple[int, int]], max_length: int) -> int:
        """Where a conversation that is too long ends: after the end token of its last answer that can begin."""
        starts = [self.count_positions(ids[:start]) for start, _ in answers]
        possible = [
            number for number, (_, length) in enumerate(answers) if starts[number] + min(length, 1) < max_length
        ]
        if not possible:
            raise DoesNotFit(
                f"needs {starts[0] + 2} positions to begin its first answer, model_max_length is {max_length}"
            )
        start, length = answers[possible[-1]]
        if self.image_token_id in ids[start + length :]:
            raise DoesNotFit(f"an image lies beyond model_max_length {max_length}; images are never cut")
        kept = min(length, max_length - starts[possible[-1]] - 1)
        # An end token between the tokens of one character would teach to end there.
        while 1 < kept < length and self._text_tokenizer.decode(ids[start : start + kept]).endswith(HALF_CHARACTER):
            kept -= 1
        return start + kept + 1

    def _encode_content(self, turn: Turn, encode: Callable[[str], list[int]]) -> list[int]:
        first, *rest = map(encode, _split(turn))
        return first + [token for ids in rest for token in (self.image_token_id, *ids)]


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, zero-width characters, fillers, marks without a letter."""
    return all(character in _FILLERS or unicodedata.category(character) in _INVISIBLE for character in text)


def find_token_id(tokenizer, token: str, source: str) -> int:
    """The id of a control token, which must be one added token of the tokenizer."""
    token_id = tokenizer.get_added_vocab().get(token)
    if token_id is None:
        raise UserError(f"{source}: the tokenizer has no token {token!r}. Build the model with build_base_model.py.")
    return token_id


def make_chat_template(tokenizer) -> str:
    """The Jinja form of this module's prompt, for the saved directory."""
    return ("{{ bos_token }}" if starts_with_bos(tokenizer) else "") + _CHAT_TEMPLATE


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer's own convention puts a begin-of-text token first (Llama's does, Qwen2's does not)."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _with_system(turns: Sequence[Turn]) -> list[Turn]:
    has_system = bool(turns) and turns[0].role == "system"
    return [*turns] if has_system else [Turn("system", DEFAULT_SYSTEM), *turns]


def _split(turn: Turn) -> list[str]:
    """The texts between the images of a turn; only a user shows images."""
    return turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "user" else [turn.text]


def _without_added_tokens(tokenizer, source: str) -> Tokenizer:
    # transformers' split_special_tokens=True still turns the text "<tool_call>" into Qwen2.5's control token, because
    # that one is added but not flagged special. A tokenizer that knows no added token cannot be talked into any.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{source}: needs a fast tokenizer (a tokenizer.json), found {type(tokenizer).__name__}")
    cleared = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | cleared))
