"""Token ids of all records, each conversation encoded once, and the prefixes that they share. Nothing about batches."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from meme_llava import count_own_cores
from meme_llava.dataset.conversation import IGNORED_LABEL, ConversationEncoder, DoesNotFit, Turn
from meme_llava.dataset.prefix_sharing import PrefixSharing, count_common_prefix

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
