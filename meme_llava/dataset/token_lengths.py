"""How many positions every record takes, and how many of them it shares with others about the same image.

Tokenising a hundred thousand records takes minutes, so what was counted is kept in a file. Nothing about batches.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from meme_llava.dataset.conversation import ConversationEncoder, DoesNotFit, Turn
from meme_llava.storage.cache import find_default_cache

# Raise it when the same conversation is counted otherwise than before: results of older code are then counted anew.
CACHE_VERSION = 1
RECORDS_PER_TASK = 512
# In sort keys images are numbered from here, beyond every token id.
FIRST_IMAGE = 1 << 31
COUNTS = ("positions", "supervised", "cut_tokens", "groups", "order", "prefix_lengths")
# What NumPy and zipfile were seen to raise, or may, on damaged files.
DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Conversation:
    """What the positions of a record depend on. `image_paths` has one file for every `<image>`, or is empty."""

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
class PrefixSharing:
    """Which records begin alike: all of one group have the same first image. int64 (records,) each.

    `order` puts the records of every group one after another, and inside it those side by side that begin alike.
    `prefix_lengths` counts the positions at a record's beginning that are also those of the record before it in that
    order, 0 for the first of a group. Two records of a group share the least of the prefix lengths after the first, up
    to the second.
    """

    groups: np.ndarray
    order: np.ndarray
    prefix_lengths: np.ndarray

    def select(self, records: np.ndarray) -> "PrefixSharing":
        """The sharing among some of the records, given by their numbers (int64), in the order given."""
        by_rank = np.argsort(self.order[records])
        kept = self.order[records][by_rank]  # increasing
        prefix_lengths_by_rank = np.empty_like(self.prefix_lengths)
        prefix_lengths_by_rank[self.order] = self.prefix_lengths
        prefix_lengths = np.zeros(len(records), np.int64)
        if len(records):
            # From behind the rank kept before up to the own one.
            starts = np.concatenate([[0], kept[:-1] + 1])
            prefix_lengths[by_rank] = np.minimum.reduceat(prefix_lengths_by_rank[: kept[-1] + 1], starts)
        order = np.empty(len(records), np.int64)
        order[by_rank] = np.arange(len(records))
        return PrefixSharing(self.groups[records], order, prefix_lengths)


@dataclass(frozen=True, eq=False)
class TokenLengths:
    """What is known of all records."""

    records: list[RecordLengths]
    sharing: PrefixSharing


def measure_tokens(
    conversations: Sequence[Conversation],
    encoder: ConversationEncoder,
    max_length: int | None,
    cache_folder: Path | None = None,
    workers: int | None = None,
) -> TokenLengths:
    """Count the positions of every conversation, in parallel, unless they were counted before.

    Args:
        max_length: positions a record may take.
        cache_folder: made when missing; None keeps nothing.
        workers: processes; None takes this process's share of the CPUs.
    """
    key = make_key(conversations, encoder, max_length)
    file = cache_folder / f"{key}.npz" if cache_folder is not None else None
    known = _read(file, key, len(conversations)) if file is not None else None
    if known is not None:
        return known
    counter = _Counter(conversations, encoder, max_length)
    lengths = _count_all(counter, workers or _share_of_cpus())
    if file is not None:
        _write(file, key, lengths)
    return lengths


def find_default_folder() -> Path:
    """Where counted lengths are kept unless the user says otherwise."""
    return find_default_cache().parent / "token_lengths"


def make_key(conversations: Sequence[Conversation], encoder: ConversationEncoder, max_length: int | None) -> str:
    """A name for everything that the counts depend on."""
    template = encoder.encode_prompt([Turn("user", "")])
    described = [CACHE_VERSION, version("tokenizers"), encoder.tokens_per_image, max_length, template]
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(encoder.tokenizer_description.encode())
    for conversation in conversations:
        turns = [(turn.role, turn.text) for turn in conversation.turns]
        paths = [os.fsencode(path).hex() for path in conversation.image_paths]
        digest.update(json.dumps([turns, paths]).encode())
    return digest.hexdigest()


class _Counter:
    """Counts the positions of one group after another."""

    def __init__(self, conversations: Sequence[Conversation], encoder: ConversationEncoder, max_length: int | None):
        self._conversations, self._encoder, self._max_length = conversations, encoder, max_length

    def group_records(self) -> list[list[int]]:
        """The numbers of records with the same first image; a record without images is alone."""
        groups: dict = {}
        for number, conversation in enumerate(self._conversations):
            first = conversation.image_paths[0] if conversation.image_paths else number
            groups.setdefault(first, []).append(number)
        return list(groups.values())

    def count_group(self, group: list[int]) -> list[tuple[int, RecordLengths, int]]:
        """Number, lengths and prefix_lengths positions of every record, by rank."""
        images: dict[Path, int] = {}
        counted = sorted((self._count(number, images) for number in group), key=lambda found: found[0])
        result, previous = [], np.empty(0, ">u4")
        for key, number, lengths in counted:
            ids = np.frombuffer(key, ">u4")
            result.append((number, lengths, count_common_prefix(previous, ids)))
            previous = ids
        return result

    def _count(self, number: int, images: dict[Path, int]) -> tuple[bytes, int, RecordLengths]:
        conversation = self._conversations[number]
        try:
            example = self._encoder.encode_example(list(conversation.turns), self._max_length)
        except DoesNotFit as error:
            return b"", number, RecordLengths(0, 0, 0, str(error))
        labels = np.array(example.labels)
        lengths = RecordLengths(len(labels), int((labels >= 0).sum()), example.cut_tokens)
        if not conversation.image_paths:
            return b"", number, lengths
        ids = np.array(example.input_ids, ">u4")
        shown = [FIRST_IMAGE + images.setdefault(path, len(images)) for path in conversation.image_paths]
        ids[ids == self._encoder.image_token_id] = np.repeat(shown, self._encoder.tokens_per_image)
        return ids.tobytes(), number, lengths


def count_common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many entries two arrays have in common before they differ or one ends."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


# What forked processes inherit: sent through a pipe, the tokenizer alone would take longer than its work.
_inherited: _Counter | None = None


def _inherit(counter: _Counter) -> None:
    global _inherited
    _inherited = counter


def _count_groups(groups: list[list[int]]) -> list[list[tuple[int, RecordLengths, int]]]:
    return [_inherited.count_group(group) for group in groups]


def _count_all(counter: _Counter, workers: int) -> TokenLengths:
    tasks: list[list[list[int]]] = []
    total = room = 0
    for group in counter.group_records():
        if room <= 0:
            tasks.append([])
            room = RECORDS_PER_TASK
        tasks[-1].append(group)
        total, room = total + len(group), room - len(group)
    if workers > 1 and len(tasks) > 1:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _inherit, (counter,)) as pool:
            counted = [group for task in pool.map(_count_groups, tasks) for group in task]
    else:
        counted = [counter.count_group(group) for task in tasks for group in task]
    records: list = [None] * total
    groups, order, prefix_lengths = (np.empty(total, np.int64) for _ in range(3))
    in_order = ((group, *found) for group, members in enumerate(counted) for found in members)
    for rank, (group, number, lengths, common) in enumerate(in_order):
        records[number], groups[number], order[number], prefix_lengths[number] = lengths, group, rank, common
    return TokenLengths(records, PrefixSharing(groups, order, prefix_lengths))


def _share_of_cpus() -> int:
    # Every process of a run counts; where one has written the file, those behind read it.
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _read(file: Path, key: str, records: int) -> TokenLengths | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in COUNTS}
            misfits = dict(zip(stored["misfit_records"].tolist(), stored["misfits"].tolist(), strict=True))
            is_ours = str(stored["key"]) == key
    except DAMAGE:
        return None
    if not is_ours or any(column.shape != (records,) or column.dtype != np.int64 for column in columns.values()):
        return None
    counts = zip(*(columns[name].tolist() for name in ("positions", "supervised", "cut_tokens")), strict=True)
    lengths = [RecordLengths(*count, misfits.get(number)) for number, count in enumerate(counts)]
    return TokenLengths(lengths, PrefixSharing(columns["groups"], columns["order"], columns["prefix_lengths"]))


def _write(file: Path, key: str, lengths: TokenLengths) -> None:
    """Put the file in its place at once: another process of the run may read or write it at the same time."""
    misfits = {number: found.misfit for number, found in enumerate(lengths.records) if found.misfit is not None}
    sharing = lengths.sharing
    columns = {
        "key": np.array(key),
        **{name: np.array([getattr(found, name) for found in lengths.records], np.int64) for name in COUNTS[:3]},
        **{name: getattr(sharing, name) for name in COUNTS[3:]},
        "misfit_records": np.array(list(misfits), np.int64),
        "misfits": np.array(list(misfits.values()), np.str_),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            try:
                np.savez_compressed(part, **columns)
                part.close()
                os.replace(part.name, file)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as error:
        # A read-only home must not keep anybody from training; the next start only takes longer.
        print(f"{file}: counted lengths cannot be kept there ({error})", file=sys.stderr, flush=True)
