"""Training and validation records, divided without an image, or one nearly like it, on both sides.

Records stay together that share an image: the same path, equal bytes, or perceptual hashes at most `near_distance` of
64 bits apart; and so on along the chain. Split before mixing: copies made by weights would count in validation too.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meme_llava.cli import describe
from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.records import parse_record
from meme_llava.errors import UserError
from meme_llava.prepare.mixing import draw_fitting
from meme_llava.prepare.near_duplicates import Groups, ImageHash, find_smallest_distance, hash_images, join_near
from meme_llava.prepare.row_files import read_json_rows
from meme_llava.prepare.writer import AnnotationWriter, SourceSettings, check_not_input, check_output

# Of 881 memes, pairs at distance 2 to 4 are one drawing with other words in 19 of 21 cases, at 6 in 17 of 20, at 8 in
# 22 of 40, at 10 in about 17 of 40. The largest group grows from 5 (distance 6) to 8, 17 and 30 (12) as chains form.
NEAR_DISTANCE = 6


@dataclass(kw_only=True)
class SplitSettings(SourceSettings):
    annotations: Path = field(metadata=describe("annotation file to divide"))
    validation_output: Path = field(metadata=describe("annotation file of the validation side"))
    validation: float = field(default=0.05, metadata=describe("share of the records for validation, at most"))
    near_distance: int = field(
        default=NEAR_DISTANCE,
        metadata=describe("images stay together whose perceptual hashes differ in at most N of 64 bits"),
    )
    seed: int = field(default=0, metadata=describe("draws the validation side"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        if not 0 < self.validation < 1:
            raise UserError(f"--validation is {self.validation}, expected a share between 0 and 1, such as 0.05")
        if not 0 <= self.near_distance <= 32:
            raise UserError(f"--near_distance is {self.near_distance}, expected 0 to 32 bits")
        if self.output.with_suffix("").resolve() == self.validation_output.with_suffix("").resolve():
            raise UserError(
                f"--validation_output {self.validation_output}: is --output too, but for its ending; choose another "
                "name, so that the manifests stay apart"
            )


@dataclass
class _Divided:
    """The usable records, and the images they have."""

    records: list[tuple[dict, str, list[int]]]  # value, place, its images
    hashes: list[ImageHash]  # of every image


@dataclass(frozen=True)
class _Grouping:
    """`records`: the group of each record; `near_pairs`: how many pairs of images are near-duplicates."""

    records: list[int]
    near_pairs: int


def prepare_split(settings: SplitSettings) -> None:
    """One annotation file → a training and a validation file."""
    check_image_folder(settings.image_folder)
    check_not_input([settings.output, settings.validation_output], [settings.annotations])
    check_output(settings.validation_output, settings.overwrite)
    with AnnotationWriter(settings) as training, AnnotationWriter(_of_validation(settings)) as validation:
        divided = _read(settings, training)
        grouping = _group(divided, settings.near_distance)
        chosen = _choose_validation(grouping.records, settings)
        for (value, place, _), group in zip(divided.records, grouping.records, strict=True):
            (validation if group in chosen else training).add(value, place)
        leakage = _prove_apart(divided, grouping.records, chosen, settings.near_distance)
        validation.inputs = training.inputs
        training.close()
        validation.close()
        division = {name: getattr(settings, name) for name in ("validation", "near_distance", "seed")}
        facts = {"division": division, "groups": _describe_groups(grouping), "between_the_sides": leakage}
        # A run that is killed between the two leaves a new validation side without its training side, never a leak
        # that goes unseen: the manifests name both.
        validation.publish(**facts, training_output=str(settings.output))
        training.publish(**facts, validation_output=str(settings.validation_output))
        _print_split(training, validation, facts)


def _of_validation(settings: SplitSettings) -> SourceSettings:
    return SourceSettings(
        output=settings.validation_output,
        overwrite=settings.overwrite,
        bad_records=settings.bad_records,
        image_folder=settings.image_folder,
    )


def _read(settings: SplitSettings, writer: AnnotationWriter) -> _Divided:
    """Read the records and hash their images; what cannot be used goes to `writer`."""
    parsed, rows, numbers = [], 0, {}
    for row in read_json_rows(settings.annotations):
        rows += 1
        try:
            if isinstance(row.value, ValueError):
                raise row.value
            names = parse_record(row.value, row.place).images
            paths = [resolve_image_path(name, settings.image_folder) for name in names]
        except ValueError as error:
            writer.report_problem("not a record", row.place, str(error), row.original)
            continue
        parsed.append((row.value, row.place, [numbers.setdefault(path, len(numbers)) for path in paths]))
    writer.note_input(settings.annotations, rows)
    if copies := sum(value.get("repeat", 1) != 1 for value, _, _ in parsed):
        writer.notes["copies made by mixing, which count in validation too (split before you mix)"] = copies
    hashes = hash_images(list(numbers))
    records = []
    for value, place, images in parsed:
        errors = [hashes[image] for image in images if isinstance(hashes[image], ValueError)]
        if errors:
            writer.report_problem("image that cannot be used", place, str(errors[0]), value)
        else:
            records.append((value, place, images))
    return _Divided(records, hashes)


def _group(divided: _Divided, distance: int) -> _Grouping:
    """Union-find over records and the images that they have."""
    count = len(divided.records)
    usable = sorted({image for _, _, images in divided.records for image in images})
    node = {image: count + index for index, image in enumerate(usable)}
    groups = Groups(count + len(usable))
    for record, (_, _, images) in enumerate(divided.records):
        for image in images:
            groups.join(record, node[image])
    same_bytes = {}
    for image in usable:
        groups.join(node[image], node[same_bytes.setdefault(divided.hashes[image].sha256, image)])
    between = Groups(len(usable))
    perceptual = np.array([divided.hashes[image].perceptual for image in usable], np.uint64)
    near_pairs = join_near(between, perceptual, distance)
    for index, root in enumerate(between.roots().tolist()):
        groups.join(count + index, count + root)
    return _Grouping(groups.roots()[:count].tolist(), near_pairs)


def _choose_validation(groups: list[int], settings: SplitSettings) -> set[int]:
    sizes = Counter(groups)
    target = int(settings.validation * len(groups))
    names = list(sizes)
    drawn = draw_fitting([sizes[name] for name in names], target, random.Random(settings.seed))
    if not drawn or len(drawn) == len(names):
        raise UserError(
            f"--validation {settings.validation}: of {len(groups):,} records at most {target:,} may go there, and they "
            f"form {len(names):,} groups of at least {min(sizes.values(), default=0):,} that stay together. Give "
            "more records, another --validation, or a smaller --near_distance."
        )
    return {names[index] for index in drawn}


def _prove_apart(divided: _Divided, groups: list[int], chosen: set[int], distance: int) -> dict:
    """Compare the two sides without the groups; raises RuntimeError if an image or a near one is on both."""
    sides = (set(), set())
    for (_, _, images), group in zip(divided.records, groups, strict=True):
        sides[group in chosen].update(images)
    training, validation = ([divided.hashes[image] for image in sorted(side)] for side in sides)
    same = {image.sha256 for image in training} & {image.sha256 for image in validation}
    nearest = find_smallest_distance(
        np.array([image.perceptual for image in validation], np.uint64),
        np.array([image.perceptual for image in training], np.uint64),
    )
    shared = len(sides[0] & sides[1])
    if shared or same or (nearest is not None and nearest <= distance):
        raise RuntimeError(f"the split leaks: {shared} shared images, {len(same)} equal, nearest {nearest} bits")
    return {"shared_images": shared, "equal_bytes": len(same), "nearest_distance": nearest}


def _describe_groups(grouping: _Grouping) -> dict:
    sizes = Counter(grouping.records)
    return {"count": len(sizes), "largest": max(sizes.values()), "near_duplicate_pairs": grouping.near_pairs}


def _print_split(training: AnnotationWriter, validation: AnnotationWriter, facts: dict) -> None:
    groups, apart = facts["groups"], facts["between_the_sides"]
    training.print_summary()
    validation.print_summary()
    share = validation.records / (training.records + validation.records)
    nearest = apart["nearest_distance"]
    print(
        f"{share:.2%} of the records are for validation. {groups['count']:,} groups stay together, the largest has "
        f"{groups['largest']:,} records; {groups['near_duplicate_pairs']:,} pairs of images are near-duplicates. "
        f"No image is on both sides, by path or bytes; the nearest two of them differ in "
        f"{'–' if nearest is None else nearest} of 64 bits."
    )
