"""No record is lost or shown twice, images stay together, and no process waits long for another."""

import numpy as np
import pytest

from meme_llava.dataset.sampling import (
    BatchShape,
    PackedLengths,
    PrefixSharing,
    plan_shared_order,
    shuffle_groups,
    shuffle_records,
)


def make_records(sizes: list[int], own=lambda number: 100, prefix: int = 600) -> tuple[np.ndarray, PrefixSharing]:
    """Groups of these sizes: records of `prefix` shared positions and `own(number)` behind; alone, nothing shared."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    total = len(groups)
    positions = np.array([prefix + own(number) for number in range(total)], np.int64)
    is_first = np.diff(groups, prepend=-1) > 0
    return positions, PrefixSharing(groups, np.arange(total), np.where(is_first, 0, prefix))


def make_realistic_records(total: int, seed: int = 0) -> tuple[np.ndarray, PrefixSharing]:
    """2.25 records share an image of 576 positions; text lengths as real captions have them: mean 106, p95 190."""
    generator = np.random.default_rng(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(1 + int(generator.poisson(1.25)))
    sizes[-1] -= sum(sizes) - total
    text = generator.lognormal(4.6, 0.385, total).clip(5, 1_400).astype(int).tolist()
    return make_records(sizes, text.__getitem__, prefix=576 + 30)


def count_batches(order: np.ndarray, positions: np.ndarray, sharing: PrefixSharing, shape: BatchShape) -> np.ndarray:
    """Packed positions: int64 (steps, rounds, processes)."""
    packed = PackedLengths(positions, sharing)
    counts = [packed.count(batch) for batch in order.reshape(-1, shape.device_batch_size).tolist()]
    return np.array(counts).reshape(-1, shape.rounds, shape.processes)


def split(order: np.ndarray, size: int) -> list[list[int]]:
    return order.reshape(-1, size).tolist()


# ---- What a batch takes ----


def test_a_packed_batch_counts_what_neighbours_share_once():
    # By rank: 0 and 1 share 7 positions, 1 and 2 share 5, 3 begins another group and shares 4 with 4.
    sharing = PrefixSharing(np.array([0, 0, 0, 9, 9]), np.array([0, 1, 2, 3, 4]), np.array([0, 7, 5, 0, 4]))
    packed = PackedLengths(np.array([10, 20, 30, 40, 50]), sharing)
    assert packed.count([0]) == 10
    assert packed.count([0, 1, 2]) == packed.count([2, 0, 1]) == 10 + 20 + 30 - 7 - 5
    assert packed.count([0, 2]) == 10 + 30 - 5
    assert packed.count([2, 3]) == 30 + 40
    assert packed.count([4, 1, 3, 0]) == 50 + 20 + 40 + 10 - 4 - 7
    assert packed.count([1, 1]) == 20
    assert PackedLengths(np.array([10, 20]), None).count([0, 1, 1]) == 50


def test_records_with_rows_of_their_own_are_filled_up_to_the_longest():
    packed = PackedLengths(np.array([10, 20, 18]), None, own_rows=True)
    assert [packed.count(records) for records in ([0, 1], [0, 2], [1, 2], [0, 0])] == [40, 36, 40, 20]


# ---- Which records a step shows ----


@pytest.mark.parametrize(
    "shape", [BatchShape(20, 5, 2), BatchShape(20, 20, 1), BatchShape(20, 1, 4), BatchShape(20, 2, 1)]
)
def test_every_record_is_shown_once_a_pass_and_every_step_is_full(shape):
    positions, sharing = make_realistic_records(50)
    steps = split(plan_shared_order(positions, sharing, 10, shape, seed=3), 20)
    assert len(steps) == 10
    # 50 records in steps of 20: the third step is filled from the next pass.
    for done in range(1, 11):
        shown = np.bincount(np.concatenate(steps[:done]), minlength=50)
        assert shown.sum() == 20 * done
        assert shown.min() >= 20 * done // 50 and shown.max() <= -(-20 * done // 50)


def test_fewer_records_than_a_step_takes_are_shown_in_turn():
    positions, sharing = make_records([2, 1])
    shown = plan_shared_order(positions, sharing, 2, BatchShape(8, 4, 1), seed=0)
    assert np.bincount(shown[:8]).min() >= 2 and np.bincount(shown).max() <= 6


def test_a_step_shows_the_same_records_however_many_processes_share_it():
    positions, sharing = make_realistic_records(203)

    def plan(steps: int, device_batch_size: int, processes: int, seed: int = 5) -> list[list[int]]:
        shape = BatchShape(16, device_batch_size, processes)
        return [sorted(step) for step in split(plan_shared_order(positions, sharing, steps, shape, seed), 16)]

    longest = plan(60, 16, 1)
    for device_batch_size, processes in ((1, 1), (1, 16), (2, 8), (4, 2), (8, 2)):
        assert plan(60, device_batch_size, processes) == longest
    # A run that is prolonged goes through the same records first; another seed does not.
    assert plan(7, 4, 2) == longest[:7]
    assert plan(60, 16, 1, seed=6) != longest


def test_the_order_is_the_one_runs_were_trained_in():
    # Written down from a run: a NumPy or a code that shuffles otherwise would silently change what a resumed run sees.
    positions, sharing = make_records([2, 3, 1], own=lambda number: 10 * number)
    stream = [5, 3, 2, 4, 0, 1, 0, 1]
    assert shuffle_groups(sharing.groups, 8, seed=42).tolist() == stream
    order = plan_shared_order(positions, sharing, 2, BatchShape(4, 2, 1), seed=42)
    assert order.tolist() == [5, 4, 2, 3, 1, 1, 0, 0]
    # What the groups are called does not matter.
    assert shuffle_groups(np.array([7, 7, 5, 5, 5, 6]), 8, seed=42).tolist() == stream
    assert shuffle_records(5, 12, seed=42).tolist() == [4, 2, 3, 1, 0, 4, 0, 1, 2, 3, 0, 3]


def test_passes_differ_in_the_order_of_images_and_of_an_images_records():
    _, sharing = make_records([4] * 6)
    passes = split(shuffle_groups(sharing.groups, 24 * 8, seed=0), 24)
    groups = [[record // 4 for record in shown] for shown in passes]
    assert all(row[start] == row[start + 3] for row in groups for start in range(0, 24, 4))
    assert len({tuple(row[::4]) for row in groups}) == 8
    first_image = {tuple(record for record in shown if record < 4) for shown in passes}
    assert len(first_image) > 1


# ---- Which records meet in a device batch ----


@pytest.mark.parametrize(
    "sizes, device_batch_size, expected",
    [
        # Numbers of records of each image in every device batch of the step.
        ([3, 3], 3, [[3], [3]]),
        ([2, 1, 2, 1], 3, [[1, 2], [1, 2]]),
        ([2, 2, 2], 3, [[1, 2], [1, 2]]),  # six records in two batches of three: one image is divided
        ([4, 2], 3, [[1, 2], [3]]),  # more records than a batch takes: divided, the rest stays together
        ([7], 3, [[1], [3], [3]]),
        ([1] * 4, 2, [[1, 1], [1, 1]]),
        # Two images of three and one of two fill a batch; spread over the batches, they would leave room for one.
        ([3, 3, 3, 3, 2, 2], 8, [[2, 3, 3], [2, 3, 3]]),
    ],
)
def test_records_of_an_image_stay_together_where_they_fit(sizes, device_batch_size, expected):
    positions, sharing = make_records(sizes + [1] * (-sum(sizes) % device_batch_size))
    total = len(positions)
    order = plan_shared_order(positions, sharing, 1, BatchShape(total, device_batch_size, 1), seed=1)
    is_filler = sharing.groups >= len(sizes)
    found = []
    for batch in split(order, device_batch_size):
        members = sharing.groups[[record for record in batch if not is_filler[record]]]
        found.append(sorted(np.unique(members, return_counts=True)[1].tolist()))
    assert sorted(found) == expected


def test_the_longest_round_comes_first_and_processes_take_turns():
    # Every record alone, 10 to 3 positions, two processes: 10 and 9 together, then 4 goes to the one that had 9.
    positions = np.array([3, 9, 10, 4])
    sharing = PrefixSharing(np.arange(4), np.arange(4), np.zeros(4, np.int64))
    order = plan_shared_order(positions, sharing, 1, BatchShape(4, 1, 2), seed=0)
    assert positions[order].tolist() == [10, 9, 3, 4]


def test_images_with_many_records_and_with_few_are_mixed_so_that_batches_are_alike():
    # Largest first, 4 and 2 records would fill one batch with 1,000 + 800 positions, 2, 2, 1 and 1 the other with
    # 800 + 800 + 700 + 700. As many records of either can be exchanged: 4, 1 and 1 against 2, 2 and 2.
    positions, sharing = make_records([4, 2, 2, 2, 1, 1])
    shape = BatchShape(12, 6, 2)
    counts = count_batches(plan_shared_order(positions, sharing, 1, shape, seed=0), positions, sharing, shape)
    assert counts.tolist() == [[[2_400, 2_400]]]


@pytest.mark.parametrize("device_batch_size, processes, largest_mean", [(8, 8, 1.07), (4, 8, 1.08), (8, 2, 1.01)])
def test_processes_get_alike_numbers_of_positions(device_batch_size, processes, largest_mean):
    positions, sharing = make_realistic_records(6_400)
    shape = BatchShape(64, device_batch_size, processes)

    def measure_imbalance(order: np.ndarray) -> np.ndarray:
        """How much more than the mean the process with the most positions has: (steps,)."""
        loads = count_batches(order, positions, sharing, shape).sum(axis=1)  # (steps, processes)
        return loads.max(axis=1) / loads.mean(axis=1)

    planned = plan_shared_order(positions, sharing, 100, shape, seed=0)
    stream = shuffle_groups(sharing.groups, 6_400, seed=0)
    imbalance, unplanned = measure_imbalance(planned), measure_imbalance(stream)
    assert imbalance.mean() < largest_mean
    assert imbalance.mean() - 1 < (unplanned.mean() - 1) / 2
    assert imbalance.max() < unplanned.max()
    # Images are hardly ever divided for it: the positions are those of whole steps, within 4 %.
    whole = count_batches(stream, positions, sharing, BatchShape(64, 64, 1)).sum()
    assert count_batches(planned, positions, sharing, shape).sum() < 1.045 * whole
