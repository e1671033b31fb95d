"""Which records begin alike, the order in which they train, and which of them meet in a device batch.

Every process plans the whole run alike, from the seed and what records share. Nothing about prompts or pixels.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from meme_llava.cli import setting

LossAverage = Literal["token", "caption"]
# Device batches of a step are evened out until the longest is this much above the mean, or by so many exchanges.
TOLERANCE = 0.02
EXCHANGES_PER_BATCH = 4
_FIRST_IMAGE = 1 << 31  # in sort keys images are numbered from here, beyond every token id


@dataclass(kw_only=True)
class BatchSettings:
    """How much of a record trains, which records meet in an optimizer step, and how it becomes device batches."""

    model_max_length: int = setting("positions a record may take, image tokens counted", expected="greater than 0")
    global_batch_size: int = setting("records per optimizer step, over all processes", expected="at least 1")
    device_batch_size: int = setting("records a device computes at once", free=True, expected="at least 1")
    seed: int = setting("order of the records, LoRA start values, dropout", 42, expected="0 to 18446744073709551615")
    loss_average: LossAverage = setting(
        "what weighs the same in an optimizer step: every token, or every caption", "token"
    )
    shared_images: bool = setting(
        "draw images instead of records; all captions of one share its encoding and prompt", True
    )


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


def find_sharing(
    ids: Sequence[np.ndarray], image_paths: Sequence[tuple[Path, ...]], image_token_id: int, tokens_per_image: int
) -> PrefixSharing:
    """Which records begin alike.

    Args:
        ids: of every record, int32 (tokens,), one image token for all of an image.
        image_paths: of every record, one file for every image token; a record without images is alone.
    """
    groups: dict[Path | int, list[int]] = {}
    for record, paths in enumerate(image_paths):
        groups.setdefault(paths[0] if paths else record, []).append(record)
    group_of, order, prefix_lengths = np.zeros((3, len(ids)), np.int64)
    order[[record for members in groups.values() for record in members]] = np.arange(len(ids))
    for group, members in enumerate(groups.values()):
        group_of[members] = group
        if len(members) == 1:
            continue
        numbers: dict[Path, int] = {}
        keys = {}
        for record in members:
            # Numbers written with the highest byte first are sorted as bytes like themselves.
            keys[record] = key = ids[record].astype(">u4")
            shown = [_FIRST_IMAGE + numbers.setdefault(path, len(numbers)) for path in image_paths[record]]
            key[ids[record] == image_token_id] = shown
        first_rank = order[members[0]]
        members.sort(key=lambda record: keys[record].tobytes())
        order[members] = np.arange(first_rank, first_rank + len(members))
        for previous, record in itertools.pairwise(members):
            alike = keys[record][: count_common_prefix(keys[previous], keys[record])]
            prefix_lengths[record] = len(alike) + (alike >= _FIRST_IMAGE).sum() * (tokens_per_image - 1)
    return PrefixSharing(group_of, order, prefix_lengths)


def count_common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many entries two arrays have in common before they differ or one ends."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


@dataclass(frozen=True)
class BatchShape:
    """How the records of an optimizer step are split into device batches."""

    global_batch_size: int  # records of a step
    device_batch_size: int  # records of a device batch
    processes: int

    @property
    def rounds(self) -> int:
        """Device batches that every process goes through in a step."""
        return self.global_batch_size // (self.device_batch_size * self.processes)


class PackedLengths:
    """Positions of any set of records when those that begin alike share their beginning.

    Args:
        positions: of every record alone, int64 (records,).
        sharing: None if nothing is shared.
        own_rows: every record gets a row of its own, filled up to the longest.
    """

    def __init__(self, positions: np.ndarray, sharing: PrefixSharing | None, own_rows: bool = False):
        self._own_rows = own_rows
        # Python's own lists: element by element they are several times faster than arrays.
        self._positions, self._shares = positions.tolist(), sharing is not None
        if sharing is not None:
            self.groups = sharing.groups.tolist()
            self.order = sharing.order.tolist()
            self._shared_by_rank = sharing.prefix_lengths[np.argsort(sharing.order)].tolist()

    def count(self, records: Sequence[int]) -> int:
        """Positions that these records are computed on."""
        if self._own_rows:
            return len(records) * max(self._positions[record] for record in records)
        total = sum(self._positions[record] for record in records)
        if not self._shares:
            return total
        by_rank = sorted(records, key=self.order.__getitem__)
        return total - sum(map(self._count_common, by_rank, by_rank[1:]))

    def _count_common(self, first: int, second: int) -> int:
        if first == second:  # the end of one pass and the beginning of the next may bring a record twice
            return self._positions[first]
        return min(self._shared_by_rank[self.order[first] + 1 : self.order[second] + 1])


def shuffle_records(records: int, length: int, seed: int) -> np.ndarray:
    """One shuffled pass over the records after another, cut at `length`: int64 (length,)."""
    passes = -(-length // records)
    return np.concatenate([np.random.default_rng([seed, n]).permutation(records) for n in range(passes)])[:length]


def shuffle_groups(groups: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Like `shuffle_records`, with the records of a group one after another in every pass: int64 (length,).

    Args:
        groups: the group of every record, int64 (records,).
    """
    # Numbered by first appearance, so that the order depends on which records are alike and on nothing else.
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first))[numbers]
    passes = []
    for number in range(-(-length // len(groups))):
        generator = np.random.default_rng([seed, number])
        family_order = generator.permutation(len(first))
        record_order = generator.permutation(len(groups))
        passes.append(np.lexsort((record_order, family_order[numbers])))
    return np.concatenate(passes)[:length]


def plan_shared_order(
    positions: np.ndarray, sharing: PrefixSharing, steps: int, shape: BatchShape, seed: int, first_record: int = 0
) -> np.ndarray:
    """The order of a run in which records about one image share it: int64 (steps x global_batch_size,).

    Which records a step trains on depends on the seed and the global batch alone. Batch i of `device_batch_size`
    records goes to process i % processes; the batches of a round are alike, those of a step balanced over processes.

    Args:
        first_record: records of the run that were trained on before these steps.
    """
    packed = PackedLengths(positions, sharing)
    end = first_record + steps * shape.global_batch_size
    stream = shuffle_groups(sharing.groups, end, seed)[first_record:]
    order: list[int] = []
    for records in stream.reshape(steps, -1).tolist():
        pieces = _split_families(records, packed, shape.device_batch_size)
        batches = _fill_batches(pieces, packed, shape)
        _balance(batches, shape.device_batch_size)
        for batch in _assign_to_ranks(batches, shape.processes):
            order += [record for piece in batch.pieces for record in piece.records]
    return np.array(order, np.int64)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Records of one group that stay together; `length` counts their packed positions."""

    length: int
    records: list[int]  # by rank


@dataclass(slots=True)
class _DeviceBatch:
    length: int
    records: int
    pieces: list[_Piece]

    def add(self, piece: _Piece) -> None:
        self.length += piece.length
        self.records += len(piece.records)
        self.pieces.append(piece)

    def exchange(self, given: list[_Piece], taken: list[_Piece]) -> None:
        self.pieces = [piece for piece in self.pieces if not any(piece is gone for gone in given)] + taken
        self.length = sum(piece.length for piece in self.pieces)


def _split_families(records: list[int], packed: PackedLengths, largest: int) -> list[_Piece]:
    """The records of every group; of one that is larger than a device batch, as many at a time as fit."""
    groups: dict[int, list[int]] = {}
    for record in records:
        groups.setdefault(packed.groups[record], []).append(record)
    pieces = []
    for group in groups.values():
        group.sort(key=packed.order.__getitem__)
        for start in range(0, len(group), largest):
            piece = group[start : start + largest]
            pieces.append(_Piece(packed.count(piece), piece))
    return pieces


def _fill_batches(pieces: list[_Piece], packed: PackedLengths, shape: BatchShape) -> list[_DeviceBatch]:
    """Put the piece of most records first, where it leaves least room; divide one that fits nowhere whole."""
    size = shape.device_batch_size
    batches = [_DeviceBatch(0, 0, []) for _ in range(shape.rounds * shape.processes)]
    numbers = itertools.count()  # settle ties
    waiting = [(-len(piece.records), -piece.length, next(numbers), piece) for piece in pieces]
    heapq.heapify(waiting)
    while waiting:
        piece = heapq.heappop(waiting)[-1]
        with_room = [batch for batch in batches if batch.records + len(piece.records) <= size]
        if with_room:
            min(with_room, key=lambda batch: (-batch.records, batch.length)).add(piece)
            continue
        chosen = min(batches, key=lambda batch: (batch.records, batch.length))
        room = size - chosen.records
        begin, rest = piece.records[:room], piece.records[room:]
        chosen.add(_Piece(packed.count(begin), begin))
        piece = _Piece(packed.count(rest), rest)
        heapq.heappush(waiting, (-len(rest), -piece.length, next(numbers), piece))
    return batches


def _balance(batches: list[_DeviceBatch], size: int) -> None:
    """Exchange pieces between the longest device batch and others, as many records for as many, while that helps.

    Filling leaves large groups together in some batches and single records, which share nothing, in others.
    """
    if size == 1 or len(batches) == 1:
        return
    target = sum(batch.length for batch in batches) / len(batches) * (1 + TOLERANCE)
    for _ in range(EXCHANGES_PER_BATCH * len(batches)):
        shortest, *others = sorted(batches, key=lambda batch: batch.length)
        longest = others[-1]
        if longest.length <= target or not any(_exchange(longest, batch, size) for batch in (shortest, *others[:-1])):
            return


def _exchange(longer: _DeviceBatch, shorter: _DeviceBatch, size: int) -> bool:
    """Exchange the pieces that bring two batches closest, if any do."""
    heavy, light = _choose_pieces(longer.pieces, size, max), _choose_pieces(shorter.pieces, size, min)
    gap = longer.length - shorter.length
    # What the longer one loses if as many records go each way; best is half the gap.
    losses = {count: heavy[count][0] - light[count][0] for count in heavy.keys() & light.keys()}
    helpful = {count: loss for count, loss in losses.items() if 0 < loss < gap}
    if not helpful:
        return False
    count = min(helpful, key=lambda count: abs(2 * helpful[count] - gap))
    given, taken = heavy[count][1], light[count][1]
    longer.exchange(given, taken)
    shorter.exchange(taken, given)
    return True


def _choose_pieces(pieces: list[_Piece], size: int, choose) -> dict[int, tuple[int, list[_Piece]]]:
    """For every number of records that some pieces make: the longest or shortest such pieces, and their length."""
    best: dict[int, tuple[int, list[_Piece]]] = {0: (0, [])}
    for piece in pieces:
        for count, (length, chosen) in list(best.items()):
            found = (length + piece.length, [*chosen, piece])
            total = count + len(piece.records)
            best[total] = choose(best.get(total, found), found, key=lambda entry: entry[0])
    del best[0]
    return best


def _assign_to_ranks(batches: list[_DeviceBatch], processes: int) -> list[_DeviceBatch]:
    """Batches of like length side by side, the longest first; in every round the process that had least gets most."""
    longest_first = sorted(batches, key=lambda batch: -batch.length)
    totals = [0] * processes
    assigned = []
    for start in range(0, len(batches), processes):
        by_total = sorted(range(processes), key=totals.__getitem__)
        given = dict(zip(by_total, longest_first[start : start + processes], strict=True))
        for process in range(processes):
            assigned.append(given[process])
            totals[process] += given[process].length
    return assigned
