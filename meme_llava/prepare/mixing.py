"""Several annotation files mixed into one, each with its weight.

Weight 2 takes every record twice, 0.3 a share of about 30 % drawn by whole images, 1.3 both. All records of an image
are adjacent in the result, copies and those of other files too: batches that share images can encode them once.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meme_llava.cli import describe
from meme_llava.dataset.records import parse_record
from meme_llava.errors import UserError
from meme_llava.prepare.row_files import Row, read_json_rows
from meme_llava.prepare.writer import AnnotationWriter, OutputSettings, UniqueIds, check_not_input, finish


@dataclass(kw_only=True)
class MixSettings(OutputSettings):
    annotations: list[Path] = field(metadata=describe("annotation files with the same image folder"))
    weights: list[float] = field(
        default_factory=list,
        metadata=describe("one for each file, 1 for all without it; 2: twice, 0.3: a sample, 0: none"),
    )
    seed: int = field(default=0, metadata=describe("draws the samples of weights with a fraction"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        self.weights = self.weights or [1.0] * len(self.annotations)
        if len(self.weights) != len(self.annotations):
            raise UserError(
                f"--weights has {len(self.weights)} numbers, --annotations {len(self.annotations)} files; give one each"
            )
        if wrong := [weight for weight in self.weights if not math.isfinite(weight) or weight < 0]:
            raise UserError(f"--weights has {wrong[0]}, expected 0 or more")


@dataclass(frozen=True)
class MixedRecord:
    """A record of a file with the place it came from; `image` is what its neighbours share."""

    value: dict
    place: str
    image: Hashable


def prepare_mix(settings: MixSettings) -> None:
    """Annotation files → one."""
    check_not_input([settings.output], settings.annotations)
    with AnnotationWriter(settings) as writer:
        files = [_read(path, writer) for path in settings.annotations]
        labels = _label(settings.annotations)
        _separate_ids(files, labels, writer)
        images = defaultdict(list)
        for path, label, weight, records in zip(settings.annotations, labels, settings.weights, files, strict=True):
            taken = take_weighted(records, weight, f"{settings.seed} {label}")
            for record, repeat in taken:
                images[record.image].append((record, repeat))
            skipped = ", left out" if weight == 0 else ""
            writer.notes[f"records of {path.name} (weight {weight:g} of {len(records):,}{skipped})"] = len(taken)
        for records in images.values():
            for record, repeat in records:
                value = record.value
                if repeat > 1:
                    value = {**value, "id": f"{value['id']}#{repeat}", "repeat": repeat}
                writer.add(value, record.place)
        finish(writer)


def take_weighted(records: list[MixedRecord], weight: float, seed: str) -> list[tuple[MixedRecord, int]]:
    """Every record with the number of its copy (1, 2, …), as often as `weight` says."""
    whole, share = math.floor(weight), weight - math.floor(weight)
    taken = [(record, repeat) for record in records for repeat in range(1, whole + 1)]
    if share > 0:
        groups = defaultdict(list)
        for record in records:
            groups[record.image].append(record)
        groups = list(groups.values())
        chosen = draw_nearest([len(group) for group in groups], round(share * len(records)), random.Random(seed))
        taken += [(record, whole + 1) for index in chosen for record in groups[index]]
    return taken


def draw_fitting(sizes: Sequence[int], target: int, generator: random.Random) -> list[int]:
    """Groups drawn at random that together hold at most `target`: each is taken if it still fits. Sorted indices."""
    order = list(range(len(sizes)))
    generator.shuffle(order)
    chosen, count = [], 0
    for index in order:
        if count + sizes[index] <= target:
            chosen.append(index)
            count += sizes[index]
    return sorted(chosen)


def draw_nearest(sizes: Sequence[int], target: int, generator: random.Random) -> list[int]:
    """Like `draw_fitting`, and one group more where that comes nearer to `target`. Sorted indices."""
    chosen = draw_fitting(sizes, target, generator)
    lacking = target - sum(sizes[index] for index in chosen)
    others = sorted(set(range(len(sizes))) - set(chosen), key=lambda index: sizes[index])
    if others and sizes[others[0]] - lacking < lacking:
        chosen.append(others[0])
    return sorted(chosen)


def _read(path: Path, writer: AnnotationWriter) -> list[MixedRecord]:
    records, rows = [], 0
    for row in read_json_rows(path):
        rows += 1
        try:
            records.append(_check(row, path))
        except ValueError as error:
            writer.report_problem("not a record", row.place, str(error), row.original)
    writer.note_input(path, rows)
    return records


def _check(row: Row, path: Path) -> MixedRecord:
    if isinstance(row.value, ValueError):
        raise row.value
    images = parse_record(row.value, row.place).images
    (number,) = row.position.values()
    source = {"set": path.stem, "file": row.file, **row.position}
    value = {"id": f"{path.stem}_{number}", "sources": [source], **row.value}
    return MixedRecord({**value, "id": str(value["id"])}, row.place, images or (row.place, str(path)))


def _label(paths: list[Path]) -> list[str]:
    """A name for each file, the stem where that is unique."""
    ids = UniqueIds()
    return [ids.take(path.stem) for path in paths]


def _separate_ids(files: list[list[MixedRecord]], labels: list[str], writer: AnnotationWriter) -> None:
    """Put the file's name in front of ids that stand in several files."""
    holders = Counter(record_id for records in files for record_id in {record.value["id"] for record in records})
    for label, records in zip(labels, files, strict=True):
        for record in records:
            if holders[record.value["id"]] > 1:
                record.value["id"] = f"{label}_{record.value['id']}"
                writer.notes["ids that stood in several files, now with the file's name in front"] += 1
