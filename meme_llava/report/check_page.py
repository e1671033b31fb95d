"""The page of a data check: one self-contained HTML file, with small images inside.

The page needs no network, and its content security policy lets no script run but its own. Nothing about how
records are checked.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.images import MAX_PIXELS
from meme_llava.dataset.records import Finding, Severity
from meme_llava.report.html_page import make_thumbnails, render_page
from meme_llava.report.line_chart import find_round_marks
from meme_llava.storage.files import write_whole

SHORT_FACT = 10  # characters that stand in a tile in big print
MAX_EXAMPLES = 2
MAX_TICKS = 6
CLEAN = "clean"


@dataclass(frozen=True)
class Histogram:
    """Counts of values: `counts[i]` values lie between `edges[i]` and `edges[i + 1]`; `unit` is the values' own."""

    title: str
    unit: str
    edges: list[float]  # one more than counts
    counts: list[int]
    note: str = ""


@dataclass(frozen=True)
class GalleryEntry:
    """One record as the gallery shows it; the files of `images` may be missing, damaged or no images."""

    place: str
    record_id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]  # empty for a malformed record
    findings: tuple[Finding, ...]
    source: str
    positions: int | None
    supervised: int | None


@dataclass(frozen=True)
class KindCount:
    """How often a kind of finding occurs among all records, and the ids of some of them."""

    name: str
    severity: str  # "bad" or "noted"
    count: int
    meaning: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportContents:
    """All that stands on the page.

    Short facts with a digit become tiles; one whose label begins with "bad", "noted" or "usable" has that colour.
    `kinds` holds every kind that occurs in `entries`; `entries` may be a part of the `total_entries` records.
    """

    title: str
    facts: list[tuple[str, str]]  # label and value
    kinds: list[KindCount]
    histograms: list[Histogram]
    entries: list[GalleryEntry]
    total_entries: int
    max_pixels: int = MAX_PIXELS  # of an image that is shown


@dataclass(frozen=True)
class _Card:
    entry: GalleryEntry
    order: int  # among all cards, in the order of the files
    severity: str  # of the worst finding, or "clean"
    findings: list[tuple[str, str, str]]  # kind, severity and detail, bad ones first
    kinds: list[int]  # positions in the table of kinds
    source: int  # position in the list of sources
    images: list[int]  # positions in the list of thumbnails
    rank: tuple[int, int]  # small is bad


def write_check_report(path: Path, contents: ReportContents) -> None:
    """Write the page in one step: `path` is a whole page or what it was before. Equal contents give equal bytes.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    write_whole(path, _render(contents))


def _render(contents: ReportContents) -> str:
    tiles = [fact for fact in contents.facts if _is_tile(fact[1])]
    kinds = sorted(contents.kinds, key=lambda kind: (kind.severity != Severity.BAD, -kind.count, kind.name))
    images = list(dict.fromkeys(image for entry in contents.entries for image in entry.images))
    thumbnails = make_thumbnails(images, contents.max_pixels)
    sources = sorted({entry.source for entry in contents.entries})
    cards = _make_cards(contents.entries, kinds, images, sources)
    return render_page(
        "check_page.html",
        contents.title,
        {"tone": _find_tone},
        total_entries=contents.total_entries,
        tiles=tiles,
        details=[fact for fact in contents.facts if fact not in tiles],
        found_kinds=[(place, kind) for place, kind in enumerate(kinds) if kind.count],
        absent_kinds=[kind for kind in kinds if not kind.count],
        kinds_on_page=Counter(kind for card in cards for kind in card.kinds),
        most_of_a_kind=max((kind.count for kind in kinds), default=0),
        ids_on_page={entry.record_id for entry in contents.entries},
        max_examples=MAX_EXAMPLES,
        histograms=[_lay_out(histogram) for histogram in contents.histograms],
        sources=sources,
        records_of_source=Counter(card.source for card in cards),
        severities=Counter(card.severity for card in cards),
        cards=cards,
        thumbnails=thumbnails,
        placeholder=IMAGE_PLACEHOLDER,
    )


def _make_cards(
    entries: list[GalleryEntry], kinds: list[KindCount], images: list[Path], sources: list[str]
) -> list[_Card]:
    """One card an entry, the worst first; equally bad ones in the order of the files."""
    kind_places = {kind.name: place for place, kind in enumerate(kinds)}
    image_places = {image: place for place, image in enumerate(images)}
    cards = []
    for order, entry in enumerate(sorted(entries, key=lambda entry: _split_numbers(entry.place))):
        findings = [
            (
                finding.kind,
                str(kinds[kind_places[finding.kind]].severity),
                _shorten_detail(finding.detail, entry.images),
            )
            for finding in entry.findings
        ]
        findings.sort(key=lambda finding: finding[1] != Severity.BAD)
        bad = sum(severity == Severity.BAD for _, severity, _ in findings)
        cards.append(
            _Card(
                entry,
                order,
                severity=findings[0][1] if findings else CLEAN,
                findings=findings,
                kinds=sorted({kind_places[finding.kind] for finding in entry.findings}),
                source=sources.index(entry.source),
                images=[image_places[image] for image in entry.images],
                rank=(-bad, bad - len(findings)),
            )
        )
    return sorted(cards, key=lambda card: card.rank)


def _shorten_detail(detail: str, images: tuple[Path, ...]) -> str:
    """A detail without the folders of the image it begins with, which the card names already."""
    for image in images:
        if detail.startswith(f"{image}: "):
            return detail.removeprefix(f"{image}: " if len(images) == 1 else f"{image.parent}/")
    return detail


def _split_numbers(place: str) -> list[str | int]:
    """A sorting key under which record 9 comes before record 10: text and numbers in turn."""
    return [int(piece) if index % 2 else piece for index, piece in enumerate(re.split(r"([0-9]+)", place))]


def _is_tile(value: str) -> bool:
    return len(value) <= SHORT_FACT and any(character.isdigit() for character in value)


def _find_tone(fact: tuple[str, str]) -> str:
    label, value = fact
    tone = {"bad": "bad", "noted": "noted", "usable": CLEAN}.get((label.lower().split() or [""])[0], "plain")
    return "plain" if value == "0" else tone


def _lay_out(histogram: Histogram) -> dict:
    """Where bars and labels stand, in per cent of the plot. Bars are equally wide whatever their bins hold."""
    edges, counts = histogram.edges, histogram.counts
    if len(edges) != len(counts) + 1:
        raise ValueError(f"histogram {histogram.title!r}: {len(edges)} edges for {len(counts)} counts")
    top, step = map(round, find_round_marks(max(counts, default=0), smallest_step=1))
    width = 100 / max(len(counts), 1)
    bars = [
        {
            "left": round(index * width, 3),
            "width": round(width, 3),
            # A single value among thousands is still to be seen.
            "height": round(max(100 * count / top, 1.5 if count else 0), 3),
            "title": f"{_format(edges[index])} – {_format(edges[index + 1])} {histogram.unit}: {count:,}",
        }
        for index, count in enumerate(counts)
    ]
    every = max(1, math.ceil(len(counts) / MAX_TICKS))
    return {
        "histogram": histogram,
        "total": sum(counts),
        "bars": bars,
        "x_ticks": [(round(index * width, 3), _shorten(edges[index])) for index in range(0, len(edges), every)],
        "y_ticks": [(round(100 * value / top, 3), f"{value:,}") for value in range(0, top + 1, step)],
    }


def _format(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{int(value):,}" if value == int(value) else f"{value:.3g}"


def _shorten(value: float) -> str:
    """As `_format`, but narrow enough to stand beside others under an axis."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if math.isfinite(value) and abs(value) >= max(size, 10_000):
            return f"{value / size:.3g}{letter}"
    return _format(value)
