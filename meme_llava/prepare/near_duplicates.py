"""Images that are the same or nearly the same: equal bytes, or perceptual hashes a few bits apart.

The hash is ImageHash's phash (64 bits of a DCT of the image in grey, 32x32) of the image as training sees it.
Nothing about records.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meme_llava import count_cores
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.storage.files import hash_file
from meme_llava.terminal import show_count

# 64-bit distances computed at once; 8 bytes each, and a few copies of that.
_PAIRS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class ImageHash:
    """What identifies an image: sha256 of the file, and 64 bits that change little when the image does."""

    sha256: str
    perceptual: int


def hash_image(path: Path) -> ImageHash:
    """Raises ValueError, with the reason, for a file that is not an image."""
    try:
        import imagehash
    except ImportError as error:
        raise UserError("perceptual hashes need one more package: pip install -r data/requirements.txt") from error
    bits = imagehash.phash(open_image(path)).hash.ravel()  # bool (64,)
    return ImageHash(hash_file(path), int(np.packbits(bits).view(">u8")[0]))


def hash_images(paths: Sequence[Path]) -> list[ImageHash | ValueError]:
    """Hash many images on all cores; the error in place of the hash for a file that is not an image."""

    def hash_or_error(path: Path) -> ImageHash | ValueError:
        try:
            return hash_image(path)
        except ValueError as error:
            return error

    hashes = []
    with ThreadPoolExecutor(count_cores()) as pool, show_count("images hashed", len(paths)) as advance:
        for image_hash in pool.map(hash_or_error, paths):
            hashes.append(image_hash)
            advance(1)
    return hashes


class Groups:
    """Union-find over 0 … count - 1."""

    def __init__(self, count: int):
        self._parents = list(range(count))

    def find(self, member: int) -> int:
        """The member that stands for the group of `member`."""
        root = member
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[member] != root:
            self._parents[member], member = root, self._parents[member]
        return root

    def join(self, first: int, second: int) -> None:
        """Make one group of two; its lowest member stands for it."""
        low, high = sorted((self.find(first), self.find(second)))
        self._parents[high] = low

    def roots(self) -> np.ndarray:
        """The member that stands for each group, for every member: int64 (count,)."""
        return np.array([self.find(member) for member in range(len(self._parents))], np.int64)


def join_near(groups: Groups, perceptual: np.ndarray, distance: int) -> int:
    """Join the groups of members whose hashes differ in at most `distance` bits.

    Args:
        perceptual: uint64 (members,).

    Returns:
        how many pairs of members are that near.
    """
    unique, inverse, counts = np.unique(perceptual, return_inverse=True, return_counts=True)
    first = np.full(len(unique), -1, np.int64)  # one member of each different hash
    for member, index in enumerate(inverse.tolist()):
        if first[index] < 0:
            first[index] = member
        else:
            groups.join(int(first[index]), member)
    pairs = int((counts * (counts - 1) // 2).sum())
    for rows, columns in iterate_near(unique, unique, distance):
        different = rows < columns
        rows, columns = rows[different], columns[different]
        pairs += int((counts[rows] * counts[columns]).sum())
        for row, column in zip(first[rows].tolist(), first[columns].tolist(), strict=True):
            groups.join(row, column)
    return pairs


def iterate_near(left: np.ndarray, right: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of the pairs of uint64 hashes that differ in at most `distance` bits, block by block."""
    for start, distances in _iterate_distances(left, right):
        rows, columns = np.nonzero(distances <= distance)
        yield rows + start, columns


def find_smallest_distance(left: np.ndarray, right: np.ndarray) -> int | None:
    """The fewest bits in which a hash of `left` differs from one of `right`; None if a side is empty."""
    return min(
        (int(distances.min()) for _, distances in _iterate_distances(left, right) if distances.size), default=None
    )


def _iterate_distances(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of Hamming distances, uint8 (rows, len(right)), each with its first row."""
    step = max(1, _PAIRS_AT_ONCE // max(1, len(right)))
    # Seconds of work begin at about 30,000 images.
    is_long = len(left) * len(right) > 10**9
    with show_count("images compared", len(left)) if is_long else contextlib.nullcontext(lambda count: None) as advance:
        for start in range(0, len(left), step):
            rows = left[start : start + step, None]
            yield start, np.bitwise_count(rows ^ right[None, :])
            advance(len(rows))
