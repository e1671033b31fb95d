"""Which records about one image begin alike, and for how many positions."""

from dataclasses import dataclass

import numpy as np


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


def count_common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many entries two arrays have in common before they differ or one ends."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length
