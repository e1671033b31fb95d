"""Near-duplicates: the hash, and groups joined by distance, compared with plain loops."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from meme_llava.errors import UserError
from meme_llava.prepare import splitting
from meme_llava.prepare.splitting import find_near, find_smallest_distance, hash_images
from meme_llava.storage.files import hash_file


def draw(path, seed, **save):
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
    small.resize((96, 96), Image.Resampling.BICUBIC).save(path, **save)


def test_a_recompressed_image_hashes_nearly_alike_and_another_one_far_off(tmp_path):
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "a.jpg", 1, quality=60)
    draw(tmp_path / "b.png", 2)
    original, recompressed, other = hash_images([tmp_path / name for name in ("a.png", "a.jpg", "b.png")])
    assert original.sha256 != recompressed.sha256
    assert (original.perceptual ^ recompressed.perceptual).bit_count() <= 4
    assert (original.perceptual ^ other.perceptual).bit_count() > 12


def test_transparent_images_hash_as_training_sees_them(tmp_path):
    shown = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(shown).ellipse((5, 5, 40, 50), fill="black")
    hidden = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(hidden).ellipse((5, 5, 40, 50), fill="black")
    shown.save(tmp_path / "shown.png")
    hidden.save(tmp_path / "hidden.png")
    first, second = hash_images([tmp_path / "shown.png", tmp_path / "hidden.png"])
    assert first.perceptual == second.perceptual


def test_unreadable_images_come_back_as_errors_in_their_place(tmp_path):
    draw(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_text("<html>")
    good, bad, missing = hash_images([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"])
    assert good.sha256 == hash_file(tmp_path / "a.png")
    assert isinstance(bad, ValueError) and isinstance(missing, ValueError)


@pytest.mark.parametrize("block", [1, 50, 4_000_000])
@pytest.mark.parametrize("distance", [0, 2, 6])
def test_groups_and_pairs_are_those_of_plain_loops(monkeypatch, distance, block):
    monkeypatch.setattr(splitting, "_PAIRS_AT_ONCE", block)
    generator = np.random.default_rng(0)
    centres = generator.integers(0, 2**63, 12, np.uint64)
    flips = np.array(
        [np.bitwise_or.reduce(np.uint64(1) << bits) for bits in generator.integers(0, 64, (40, 3), np.uint64)]
    )
    hashes = np.concatenate([centres[generator.integers(0, 12, 40)] ^ flips, centres, centres[:3]])
    near = [
        (first, second)
        for first in range(len(hashes))
        for second in range(first)
        if (int(hashes[first]) ^ int(hashes[second])).bit_count() <= distance
    ]
    pairs, count = find_near(hashes, distance)
    assert count == len(near)
    assert _connect(len(hashes), pairs.tolist()) == _connect(len(hashes), near)


def _connect(count, pairs):
    """The lowest member of everybody's group."""
    names = list(range(count))
    for first, second in pairs:
        low, high = sorted((names[first], names[second]))
        names = [low if name == high else name for name in names]
    return names


def test_smallest_distance_between_two_sides():
    left, right = np.array([0b1111, 0], np.uint64), np.array([0b0111, 2**63 + 2**10 + 1], np.uint64)
    assert find_smallest_distance(left, right) == 1
    assert find_smallest_distance(left[1:], right) == 3
    assert find_smallest_distance(left, right[:0]) is None


def test_without_imagehash_the_package_is_named(tmp_path, monkeypatch):
    draw(tmp_path / "a.png", 1)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(UserError, match="pip install -r data/requirements.txt"):
        hash_images([tmp_path / "a.png"])
