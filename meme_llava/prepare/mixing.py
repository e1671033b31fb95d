"""Several annotation files mixed into one, each with its weight.

Weight 2 takes every record twice, 0.3 a share of about 30 % drawn by whole images, 1.3 both. All records of an image
are adjacent in the result, copies and those of other files too: batches that share images can encode them once.
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from meme_llava.cli import setting
from meme_llava.errors import UserError, count
from meme_llava.prepare.inputs import read_record_rows
from meme_llava.prepare.writer import AnnotationWriter, OutputSettings, make_unique

MOST_RECORDS = 10_000_000  # of a mixture, which is held in memory


@dataclass(kw_only=True)
class MixSettings(OutputSettings):
    annotations: list[Path] = setting("annotation files with the same image folder")
    weights: list[float] = setting("one for each file, 1 for all without it; 2: twice, 0.3: a sample, 0: none", [])
    seed: int = setting("draws the samples of weights with a fraction", 0)

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        self.weights = self.weights or [1.0] * len(self.annotations)
        if len(self.weights) != len(self.annotations):
            raise UserError(
                f"--weights has {count(len(self.weights), 'number')}, --annotations "
                f"{count(len(self.annotations), 'file')}; give one each"
            )
        if wrong := [weight for weight in self.weights if not math.isfinite(weight) or weight < 0]:
            raise UserError(f"--weights has {wrong[0]}, expected 0 or more")


class _Record(NamedTuple):
    """A record of a file with the place it came from; `image` is what its neighbours share."""

    value: dict
    place: str
    image: Hashable


def prepare_mix(settings: MixSettings) -> None:
    """Annotation files → one."""
    with AnnotationWriter(settings, settings.annotations) as writer:
        files = [_read(path, writer) for path in settings.annotations]
        wanted = sum(weight * len(records) for weight, records in zip(settings.weights, files, strict=True))
        if wanted > MOST_RECORDS:
            raise UserError(f"--weights ask for {wanted:,.0f} records, expected at most {MOST_RECORDS:,}; lower them")
        taken_names = set()
        labels = [make_unique(path.stem, taken_names) for path in settings.annotations]
        holders = Counter(record_id for records in files for record_id in {record.value["id"] for record in records})
        images = defaultdict(list)
        for path, label, weight, records in zip(settings.annotations, labels, settings.weights, files, strict=True):
            for record in records:
                if holders[record.value["id"]] > 1:
                    record.value["id"] = f"{label}_{record.value['id']}"
                    writer.notes["ids that stood in several files, now with the file's name in front"] += 1
            taken = _take_weighted(records, weight, random.Random(f"{settings.seed} {label}"))
            for record, repeat in taken:
                images[record.image].append((record, repeat))
            skipped = ", left out" if weight == 0 else ""
            writer.notes[f"records of {path.name} (weight {weight:g} of {len(records):,}{skipped})"] = len(taken)
        for record, repeat in itertools.chain.from_iterable(images.values()):
            copy = {"id": f"{record.value['id']}#{repeat}", "repeat": repeat} if repeat > 1 else {}
            writer.add({**record.value, **copy}, record.place)
        writer.finish()


def _read(path: Path, writer: AnnotationWriter) -> list[_Record]:
    records = []
    for row, parsed in read_record_rows(path, writer):
        *_, number = row.position.values()
        defaults = {"id": f"{path.stem}_{number}", "sources": [{"set": path.stem, **row.position}]}
        value = defaults | {key: found for key, found in row.value.items() if key not in defaults or found is not None}
        value["id"] = str(value["id"])
        records.append(_Record(value, row.place, parsed.images or (row.place, str(path))))
    return records


def _take_weighted(records: list[_Record], weight: float, generator: random.Random) -> list[tuple[_Record, int]]:
    """Every record with the number of its copy (1, 2, …), as often as `weight` says."""
    share, whole = math.modf(weight)
    taken = [(record, repeat) for record in records for repeat in range(1, int(whole) + 1)]
    if share > 0:
        groups = defaultdict(list)
        for record in records:
            groups[record.image].append(record)
        groups = list(groups.values())
        chosen = draw_groups([len(group) for group in groups], round(share * len(records)), generator, nearest=True)
        taken += [(record, int(whole) + 1) for index in chosen for record in groups[index]]
    return taken


def draw_groups(sizes: Sequence[int], target: int, generator: random.Random, nearest: bool = False) -> list[int]:
    """Groups drawn at random that together hold at most `target`: each is taken if it still fits. Sorted indices.

    Args:
        nearest: take one group more where that comes nearer to `target`.
    """
    order = list(range(len(sizes)))
    generator.shuffle(order)
    chosen, lacking = [], target
    for index in order:
        if sizes[index] <= lacking:
            chosen.append(index)
            lacking -= sizes[index]
    others = sorted(set(order) - set(chosen), key=lambda index: sizes[index])
    if nearest and others and sizes[others[0]] - lacking < lacking:
        chosen.append(others[0])
    return sorted(chosen)
