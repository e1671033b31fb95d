"""Prompt format and labels: which tokens a conversation becomes, and which of them carry loss. Training and inference
both build token ids here.

The format is ChatML, as Qwen2 uses it. The prompt for an answer is, token for token, the beginning of the training
example with that answer. Nothing about files, images or batches: an image is a run of image tokens.
"""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from meme_llava import count_own_cores
from meme_llava.dataset.sampling import PrefixSharing, count_common_prefix
from meme_llava.errors import UserError

IMAGE_PLACEHOLDER = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# What Qwen2-Instruct was trained with when a conversation brings no system turn.
DEFAULT_SYSTEM = "You are a helpful assistant."
CONTROL_TOKENS = (TURN_START, TURN_END, "<|endoftext|>", IMAGE_PLACEHOLDER)  # of every model that we build
IGNORED_LABEL = -100

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


@dataclass(frozen=True)
class Example:
    """Token ids of a whole conversation. A label is the token's own id where it carries loss, else -100."""

    input_ids: list[int]
    labels: list[int]
    cut_tokens: int  # positions left out to respect the length limit


@dataclass(frozen=True)
class Tokens:
    """Tokens of a whole conversation, one image token for every image; which of them carry loss."""

    ids: list[int]
    supervised: list[bool]
    cut_tokens: int  # left out to respect the length limit; images are never cut


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
        self._newline_ids = self.encode_text("\n")
        # The same in every conversation, so encoded once.
        self._headers = {role: self._encode_header(role) for role in ("system", "user", "assistant")}
        self._default_system_ids = self.encode_text(DEFAULT_SYSTEM)
        self._prefix_ids = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []

    def encode_text(self, text: str) -> list[int]:
        """Ids of a user's string. Whatever it spells, it never becomes a control token."""
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, turns: list[Turn]) -> list[int]:
        """Ids up to the place where the assistant's answer begins."""
        ids = list(self._prefix_ids)
        for turn in _with_system(turns):
            ids += self._open_turn(turn.role) + self._encode_content(turn) + self._close_turn()
        ids += self._open_turn("assistant")
        return [token for token in ids for _ in range(self.tokens_per_image if token == self.image_token_id else 1)]

    def encode_example(self, turns: list[Turn], max_length: int | None = None) -> Example:
        """Ids and labels of a conversation, as `encode_tokens` finds them, with every image token repeated."""
        tokens = self.encode_tokens(turns, max_length)
        input_ids, labels = [], []
        for token, carries_loss in zip(tokens.ids, tokens.supervised, strict=True):
            times = self.tokens_per_image if token == self.image_token_id else 1
            input_ids += [token] * times
            labels += [token if carries_loss else IGNORED_LABEL] * times
        return Example(input_ids, labels, tokens.cut_tokens)

    def encode_tokens(self, turns: list[Turn], max_length: int | None = None) -> Tokens:
        """Tokens of a conversation: every assistant text and the end token after it carries loss.

        Longer than `max_length` positions (image tokens counted), it ends with the last answer that can begin within
        the limit; that answer's tail is cut, its end token stands. Image tokens are never cut.

        Raises:
            DoesNotFit: no answer can begin within `max_length`, or an image comes after the last one that can.
        """
        ids: list[int] = list(self._prefix_ids)
        supervised: list[bool] = [False] * len(ids)
        answers: list[tuple[int, int]] = []  # place in `ids` and length of every answer, end token excluded
        for turn in _with_system(turns):
            header, content, footer = self._open_turn(turn.role), self._encode_content(turn), self._close_turn()
            is_answer = turn.role == "assistant"
            if is_answer:
                answers.append((len(ids) + len(header), len(content)))
            ids += header + content + footer
            # The footer is the end token and a line break; the line break is the template's, not the answer's.
            supervised += [False] * len(header) + [is_answer] * (len(content) + 1) + [False] * (len(footer) - 1)
        last_start, last_length = answers[-1]
        end = whole = last_start + last_length + 1
        if max_length is not None and self.count_positions(ids[:whole]) > max_length:
            end = self._find_cut(ids, answers, max_length)
            ids[end - 1], supervised[end - 1] = self.turn_end_id, True
        return Tokens(ids[:end], supervised[:end], cut_tokens=whole - end)

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
        return start + min(length + 1, max_length - starts[possible[-1]])

    def _encode_content(self, turn: Turn) -> list[int]:
        if turn.role == "system" and turn.text == DEFAULT_SYSTEM:
            return self._default_system_ids
        if turn.role != "user":
            return self.encode_text(turn.text)
        first, *rest = turn.text.split(IMAGE_PLACEHOLDER)
        ids = self.encode_text(first)
        for text in rest:
            ids += [self.image_token_id, *self.encode_text(text)]
        return ids

    def _open_turn(self, role: str) -> list[int]:
        return self._headers[role]

    def _encode_header(self, role: str) -> list[int]:
        return [self.turn_start_id] + self.encode_text(role) + self._newline_ids

    def _close_turn(self) -> list[int]:
        return [self.turn_end_id] + self._newline_ids


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


def _with_system(turns: list[Turn]) -> list[Turn]:
    if turns and turns[0].role == "system":
        return turns
    return [Turn("system", DEFAULT_SYSTEM), *turns]


def _without_added_tokens(tokenizer, source: str) -> Tokenizer:
    # transformers' split_special_tokens=True still turns the text "<tool_call>" into Qwen2.5's control token, because
    # that one is added but not flagged special. A tokenizer that knows no added token cannot be talked into any.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{source}: needs a fast tokenizer (a tokenizer.json), found {type(tokenizer).__name__}")
    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    description["truncation"] = description["padding"] = None
    return Tokenizer.from_str(json.dumps(description))


RECORDS_PER_TASK = 512
# In sort keys images are numbered from here, beyond every token id.
FIRST_IMAGE = 1 << 31


@dataclass(frozen=True)
class Tokenization:
    """How conversations become token ids: by which encoder, and how many positions (image tokens counted) of each."""

    encoder: ConversationEncoder
    max_length: int | None = None


@dataclass(frozen=True)
class Conversation:
    """What the tokens of a record depend on. `image_paths` has one file for every `<image>`, or is empty."""

    turns: tuple[Turn, ...]
    image_paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class RecordLengths:
    """Positions of one record, image tokens counted; all 0 where `misfit` says why it does not fit."""

    positions: int
    supervised: int  # of them carry loss
    cut_tokens: int  # positions left out to respect the length limit
    misfit: str | None = None


@dataclass(frozen=True, eq=False)
class TokenizedRecords:
    """Token ids of records, without copies of the image token: one stands for all of an image.

    Args:
        lengths: of every record.
        sharing: which of them begin alike.
        spans: int64 (records, 2), where each record's tokens begin and end in `ids`.
        ids: int32 (tokens,).
        supervised: bool (tokens,), which of them carry loss.
    """

    lengths: list[RecordLengths]
    sharing: PrefixSharing
    spans: np.ndarray
    ids: np.ndarray
    supervised: np.ndarray
    image_token_id: int
    tokens_per_image: int

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a record, image tokens repeated: int64 (positions,) each."""
        start, end = self.spans[number]
        ids = self.ids[start:end]
        times = np.where(ids == self.image_token_id, self.tokens_per_image, 1)
        labels = np.where(self.supervised[start:end], ids, IGNORED_LABEL)
        return np.repeat(ids, times).astype(np.int64), np.repeat(labels, times).astype(np.int64)

    def select(self, numbers: Sequence[int]) -> "TokenizedRecords":
        """Some of the records, in the order given; the ids are shared with these."""
        rows = np.array(numbers, np.int64)
        lengths = [self.lengths[number] for number in numbers]
        return replace(self, lengths=lengths, sharing=self.sharing.select(rows), spans=self.spans[rows])


def tokenize_records(
    conversations: Sequence[Conversation], tokens: Tokenization, workers: int | None = None
) -> TokenizedRecords:
    """Encode every conversation, in parallel.

    Args:
        workers: processes; None takes this process's share of the CPUs.
    """
    encoder = tokens.encoder
    in_order = _encode_all(_GroupEncoder(conversations, tokens), workers or count_own_cores())
    count = len(conversations)
    encoded: list = [None] * count
    groups, order, prefix_lengths = (np.empty(count, np.int64) for _ in range(3))
    for place, (group, record) in enumerate(in_order):
        number = record.number
        encoded[number], groups[number], order[number] = record, group, place
        prefix_lengths[number] = record.prefix_length
    ends = np.cumsum([0, *(len(record.ids) for record in encoded)])
    return TokenizedRecords(
        [record.lengths for record in encoded],
        PrefixSharing(groups, order, prefix_lengths),
        np.stack([ends[:-1], ends[1:]], axis=1),
        np.concatenate([np.empty(0, np.int32), *(record.ids for record in encoded)]),
        np.concatenate([np.empty(0, bool), *(record.supervised for record in encoded)]),
        encoder.image_token_id,
        encoder.tokens_per_image,
    )


@dataclass(frozen=True, slots=True)
class _EncodedRecord:
    """One record of a group; `prefix_length` is what it shares with the one before it."""

    number: int
    lengths: RecordLengths
    ids: np.ndarray  # int32 (tokens,), one image token an image
    supervised: np.ndarray  # bool (tokens,)
    sort_key: bytes
    prefix_length: int = 0


class _GroupEncoder:
    """Encodes the records of one group after another."""

    def __init__(self, conversations: Sequence[Conversation], tokens: Tokenization):
        self._conversations, self._tokens = conversations, tokens

    def group_records(self) -> list[list[int]]:
        """The numbers of records with the same first image; a record without images is alone."""
        groups: dict = {}
        for number, conversation in enumerate(self._conversations):
            first = conversation.image_paths[0] if conversation.image_paths else number
            groups.setdefault(first, []).append(number)
        return list(groups.values())

    def encode_group(self, group: list[int]) -> list[_EncodedRecord]:
        """The records of a group, those side by side that begin alike."""
        images: dict[Path, int] = {}
        by_key = sorted((self._encode(number, images) for number in group), key=lambda record: record.sort_key)
        result, previous = [], np.empty(0, ">u4")
        for record in by_key:
            key = np.frombuffer(record.sort_key, ">u4")
            alike = key[: count_common_prefix(previous, key)]
            prefix_length = len(alike) + int((alike >= FIRST_IMAGE).sum()) * (self._tokens.encoder.tokens_per_image - 1)
            result.append(replace(record, sort_key=b"", prefix_length=prefix_length))
            previous = key
        return result

    def _encode(self, number: int, images: dict[Path, int]) -> _EncodedRecord:
        conversation, encoder = self._conversations[number], self._tokens.encoder
        try:
            tokens = encoder.encode_tokens(list(conversation.turns), self._tokens.max_length)
        except DoesNotFit as error:
            nothing = RecordLengths(0, 0, 0, str(error))
            return _EncodedRecord(number, nothing, np.empty(0, np.int32), np.empty(0, bool), b"")
        positions = encoder.count_positions(tokens.ids)
        lengths = RecordLengths(positions, sum(tokens.supervised), tokens.cut_tokens)
        ids, supervised = np.array(tokens.ids, np.int32), np.array(tokens.supervised)
        if not conversation.image_paths:
            return _EncodedRecord(number, lengths, ids, supervised, b"")
        key = ids.astype(">u4")
        key[ids == encoder.image_token_id] = [
            FIRST_IMAGE + images.setdefault(path, len(images)) for path in conversation.image_paths
        ]
        return _EncodedRecord(number, lengths, ids, supervised, key.tobytes())


# What forked processes inherit: sent through a pipe, the tokenizer alone would take longer than its work.
_inherited: _GroupEncoder | None = None


def _inherit(group_encoder: _GroupEncoder) -> None:
    global _inherited
    _inherited = group_encoder


def _encode_groups(groups: list[list[int]]) -> list[list[_EncodedRecord]]:
    return [_inherited.encode_group(group) for group in groups]


def _encode_all(group_encoder: _GroupEncoder, workers: int) -> list[tuple[int, _EncodedRecord]]:
    """Every record with the number of its group, group by group."""
    tasks: list[list[list[int]]] = []
    room = 0
    for group in group_encoder.group_records():
        if room <= 0:
            tasks.append([])
            room = RECORDS_PER_TASK
        tasks[-1].append(group)
        room -= len(group)
    if workers > 1 and len(tasks) > 1:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _inherit, (group_encoder,)) as pool:
            encoded = [group for task in pool.map(_encode_groups, tasks) for group in task]
    else:
        encoded = [group_encoder.encode_group(group) for task in tasks for group in task]
    return [(number, record) for number, group in enumerate(encoded) for record in group]
