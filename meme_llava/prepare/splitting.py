"""Training and validation records, divided without an image, or one nearly like it, on both sides.

Records stay together that share an image: the same path, equal bytes, or perceptual hashes at most `near_distance` of
64 bits apart; and so on along the chain. The hash is ImageHash's phash (64 bits of a DCT of the image in grey, 32x32)
of the image as training sees it. Split before mixing: copies made by weights would count in validation too.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meme_llava import count_cores
from meme_llava.cli import check_setting, setting
from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.images import open_image, resolve_image_path
from meme_llava.errors import UserError, count
from meme_llava.prepare.inputs import read_record_rows
from meme_llava.prepare.mixing import draw_groups
from meme_llava.prepare.writer import AnnotationWriter, SourceSettings
from meme_llava.storage.files import hash_file
from meme_llava.terminal import show_count

# Of 881 memes, pairs at distance 2 to 4 are one drawing with other words in 19 of 21 cases, at 6 in 17 of 20, at 8 in
# 22 of 40, at 10 in about 17 of 40. The largest group grows from 5 (distance 6) to 8, 17 and 30 (12) as chains form.
NEAR_DISTANCE = 6
# 64-bit distances computed at once; 8 bytes each, and a few copies of that.
_PAIRS_AT_ONCE = 4_000_000


@dataclass(kw_only=True)
class SplitSettings(SourceSettings):
    annotations: Path = setting("annotation file to divide")
    validation_output: Path = setting("annotation file of the validation side")
    validation: float = setting("share of the records for validation, at most", 0.05)
    near_distance: int = setting(
        "images stay together whose perceptual hashes differ in at most N of 64 bits", NEAR_DISTANCE
    )
    seed: int = setting("draws the validation side", 0)

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "validation", 0 < self.validation < 1, "a share greater than 0 and below 1, such as 0.05")
        check_setting(self, "near_distance", 0 <= self.near_distance <= 32, "0 to 32 bits")
        if self.output.with_suffix("").resolve() == self.validation_output.with_suffix("").resolve():
            raise UserError(
                f"--validation_output {self.validation_output}: is --output too, but for its ending; choose another "
                "name, so that the manifests stay apart"
            )


class ImageHash(NamedTuple):
    """What identifies an image: sha256 of the file, and 64 bits that change little when the image does."""

    sha256: str
    perceptual: int


class _Record(NamedTuple):
    value: dict
    place: str
    images: dict[Path, ImageHash]


def prepare_split(settings: SplitSettings) -> None:
    """One annotation file → a training and a validation file."""
    check_image_folder(settings.image_folder)
    of_validation = SourceSettings(
        output=settings.validation_output,
        overwrite=settings.overwrite,
        bad_records=settings.bad_records,
        image_folder=settings.image_folder,
    )
    inputs = [settings.annotations]
    with AnnotationWriter(settings, inputs) as training, AnnotationWriter(of_validation, inputs) as validation:
        records = _read(settings, training)
        training.stop_on_problems(len(records))
        groups, near_pairs = _group(records, settings.near_distance)
        chosen = _choose_validation(groups, settings)
        sides = {}, {}  # of training and validation: {path: hash}
        for record, group in zip(records, groups, strict=True):
            (validation if group in chosen else training).add(record.value, record.place)
            sides[group in chosen].update(record.images)
        between = _prove_apart(*sides, settings.near_distance)
        validation.inputs = training.inputs
        training.close()
        validation.close()
        sizes = Counter(groups)
        facts = {
            "division": {name: getattr(settings, name) for name in ("validation", "near_distance", "seed")},
            "groups": {"count": len(sizes), "largest": max(sizes.values()), "near_duplicate_pairs": near_pairs},
            "between_the_sides": between,
        }
        # A run that is killed between the two leaves a new validation side without its training side, never a leak
        # that goes unseen: the manifests name both.
        validation.publish(**facts, training_output=str(settings.output))
        training.publish(**facts, validation_output=str(settings.validation_output))
    training.print_summary()
    validation.print_summary()
    share = validation.records / (training.records + validation.records)
    nearest = between["nearest_distance"]
    print(
        f"{share:.2%} of the records are for validation. Groups that stay together: {len(sizes):,}, the largest of "
        f"{count(max(sizes.values()), 'record')}; pairs of near-duplicates: {near_pairs:,}. No image is on both sides, "
        f"by path or bytes; the nearest two of them differ in {'–' if nearest is None else nearest} of 64 bits."
    )


def _read(settings: SplitSettings, writer: AnnotationWriter) -> list[_Record]:
    """The records with the hashes of their images; what cannot be used goes to `writer`."""
    found = []
    for row, parsed in read_record_rows(settings.annotations, writer):
        try:
            paths = [resolve_image_path(name, settings.image_folder) for name in parsed.images]
        except ValueError as error:
            writer.report_problem("not a record", row.place, str(error), row.value)
            continue
        found.append((row.value, row.place, paths))
    if copies := sum(value.get("repeat", 1) != 1 for value, _, _ in found):
        writer.notes["copies made by mixing, which count in validation too (split before you mix)"] = copies
    paths = list(dict.fromkeys(path for _, _, paths in found for path in paths))
    hashes = dict(zip(paths, hash_images(paths), strict=True))
    records = []
    for value, place, paths in found:
        images = {path: hashes[path] for path in paths}
        if errors := [image for image in images.values() if isinstance(image, ValueError)]:
            writer.report_problem("image that cannot be used", place, str(errors[0]), value)
        else:
            records.append(_Record(value, place, images))
    return records


def _group(records: list[_Record], distance: int) -> tuple[list[int], int]:
    """The group of every record, and how many pairs of images are near-duplicates.

    Groups are the connected parts of a graph of records and images. Files of equal bytes have equal hashes.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    images = {path: image for record in records for path, image in record.images.items()}
    numbers = {path: len(records) + number for number, path in enumerate(images)}
    owned = [(record, numbers[path]) for record, one in enumerate(records) for path in one.images]
    near, near_pairs = find_near(np.array([image.perceptual for image in images.values()], np.uint64), distance)
    edges = np.concatenate([np.array(owned, np.int64).reshape(-1, 2), near + len(records)])
    nodes = len(records) + len(images)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][: len(records)].tolist(), near_pairs


def _choose_validation(groups: list[int], settings: SplitSettings) -> set[int]:
    sizes = Counter(groups)
    target = int(settings.validation * len(groups))
    drawn = draw_groups(list(sizes.values()), target, random.Random(settings.seed))
    if not drawn or len(drawn) == len(sizes):
        raise UserError(
            f"--validation {settings.validation}: of {len(groups):,} records at most {target:,} may go there, and they "
            f"form {len(sizes):,} groups of at least {min(sizes.values(), default=0):,} that stay together. Give "
            "more records, another --validation, or a smaller --near_distance."
        )
    names = list(sizes)
    return {names[index] for index in drawn}


def _prove_apart(training: dict[Path, ImageHash], validation: dict[Path, ImageHash], distance: int) -> dict:
    """Compare the two sides without the groups; raises RuntimeError if an image or a near one is on both."""
    shared = len(training.keys() & validation.keys())
    first, second = ({image.sha256 for image in side.values()} for side in (training, validation))
    nearest = find_smallest_distance(
        *(np.array([image.perceptual for image in side.values()], np.uint64) for side in (training, validation))
    )
    if shared or first & second or (nearest is not None and nearest <= distance):
        raise RuntimeError(
            f"the split leaks: {shared} shared images, {len(first & second)} equal, {nearest} bits apart"
        )
    return {"shared_images": shared, "equal_bytes": len(first & second), "nearest_distance": nearest}


def hash_images(paths: Sequence[Path]) -> list[ImageHash | ValueError]:
    """Hash many images on all cores; the error in place of the hash for a file that is not an image."""
    try:
        import imagehash
    except ImportError as error:
        raise UserError("perceptual hashes need one more package: pip install -r data/requirements.txt") from error

    def hash_image(path: Path) -> ImageHash | ValueError:
        try:
            bits = imagehash.phash(open_image(path)).hash.ravel()  # bool (64,)
        except ValueError as error:
            return error
        return ImageHash(hash_file(path), int(np.packbits(bits).view(">u8")[0]))

    hashes = []
    with ThreadPoolExecutor(count_cores()) as pool, show_count("images hashed", len(paths)) as advance:
        for image_hash in pool.map(hash_image, paths):
            hashes.append(image_hash)
            advance(1)
    return hashes


def find_near(perceptual: np.ndarray, distance: int) -> tuple[np.ndarray, int]:
    """Which images have hashes that differ in at most `distance` bits.

    Args:
        perceptual: uint64 (images,).

    Returns:
        pairs of images that connect all those that are near, int64 (pairs, 2), and how many pairs are near in all.
    """
    unique, first, inverse, counts = np.unique(perceptual, return_index=True, return_inverse=True, return_counts=True)
    # One image stands for all with its hash.
    pairs = [np.stack([np.arange(len(perceptual)), first[inverse]], axis=1)]
    count = int((counts * (counts - 1) // 2).sum())
    for start, distances in _iterate_distances(unique, unique):
        rows, columns = np.nonzero(distances <= distance)
        rows += start
        rows, columns = rows[rows < columns], columns[rows < columns]
        count += int((counts[rows] * counts[columns]).sum())
        pairs.append(np.stack([first[rows], first[columns]], axis=1))
    return np.concatenate(pairs), count


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
