"""What data/check.py prints and shows of a checked annotation file: a summary, and a self-contained HTML page.

The page needs no network, and its content security policy lets no script run but its own. Nothing about how records
are checked.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meme_llava.cli import setting
from meme_llava.dataset.check import CheckedData, CheckedRecord, print_findings
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.findings import KINDS, Finding, RecordPolicy
from meme_llava.report.html_page import draw_bars, make_thumbnails, render_page
from meme_llava.terminal import print_table

FINDINGS = "findings.jsonl"
REPORT = "report.html"
HISTOGRAM_BINS = 20
BAR_WIDTH = 40  # characters of the longest bar on a terminal
MAX_EXAMPLES = 2  # ids of a kind in the page's table
SHORT_FACT = 10  # characters that stand in a tile in big print
TONES = {"bad": "bad", "noted": "noted", "usable": "clean"}  # colours of facts whose label begins so


@dataclass
class CheckArguments(RecordPolicy):
    annotations: Path = setting("annotation file, .json or .jsonl")
    image_folder: Path = setting("folder that the records' image paths start from")
    model: Path | None = setting("base model; with it, records are tokenised and their lengths are known", None)
    output_dir: Path = setting(f"gets {REPORT}, {FINDINGS} and, if needed, quarantine.jsonl", Path("output/check"))
    model_max_length: int | None = setting(
        "positions a record may take, image tokens counted; without it, none is too long",
        None,
        expected="greater than 0",
    )
    global_batch_size: int | None = setting(
        "records per optimizer step, to predict the steps", None, expected="greater than 0"
    )
    num_train_epochs: float | None = setting(
        "passes over the records, to predict the steps", None, expected="greater than 0"
    )
    workers: int | None = setting(
        "processes that decode images; all CPUs if not given", None, expected="greater than 0"
    )
    report_records: int = setting(
        "records that the report shows: the worst, then a sample of the others", 1000, expected="0 or more"
    )


@dataclass(frozen=True)
class Histogram:
    """Counts of values: `counts[i]` values lie from `edges[i]` to below `edges[i + 1]`; `unit` is the values' own."""

    title: str
    unit: str
    edges: list[int]  # one more than counts
    counts: list[int]


@dataclass(frozen=True)
class Card:
    """One record on the page; the files of `images` may be missing, damaged or no images."""

    place: str
    record_id: str
    findings: Sequence[Finding]
    images: Sequence[Path] = ()
    turns: Sequence[Turn] = ()  # none of a malformed record
    source: str = ""
    positions: int | None = None
    supervised: int | None = None


def list_facts(checked: CheckedData, tokens_per_image: int | None, arguments: CheckArguments) -> list[tuple[str, str]]:
    """What a user wants to know before training, as (label, value); `tokens_per_image` with a model."""
    usable = checked.usable
    contents = {facts.sha256 for facts in checked.facts.values() if facts.sha256 is not None}
    batch, epochs, limit = arguments.global_batch_size, arguments.num_train_epochs, arguments.model_max_length
    facts = [
        ("annotations", str(arguments.annotations)),
        ("image folder", str(arguments.image_folder)),
        ("records", f"{checked.total:,}"),
        ("usable records", f"{len(usable):,}"),
        ("bad records", f"{len(checked.bad):,}"),
        ("images", f"{len(checked.facts):,}"),
        ("different images", f"{len(contents):,}"),
    ]
    if batch is None or epochs is None:
        facts.append(("steps", "unknown; give --global_batch_size and --num_train_epochs"))
    else:
        steps = math.ceil(len(usable) * epochs / batch)
        facts += [("steps", f"{steps:,}"), ("records a step", f"{batch:,}"), ("epochs", f"{epochs:g}")]
    if tokens_per_image is None:
        return [*facts, ("positions", "unknown; give --model to tokenise the records")]
    if not usable:
        return facts
    lengths = [record.tokens.positions for record in usable]
    total = sum(lengths)
    supervised = sum(int(record.tokens.supervised.sum()) for record in usable)
    of_images = tokens_per_image * sum(len(record.image_paths) for record in usable)
    median, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    return [
        *facts,
        ("length limit", "unknown; give --model_max_length" if limit is None else f"{limit:,} positions"),
        ("positions a record", f"{total / len(usable):,.1f} (median {median:,}, 95 % under {most:,})"),
        ("longest record", f"{longest:,} positions"),
        ("supervised positions", f"{supervised / total:.1%} of all"),
        ("image positions", f"{of_images / total:.1%} of all"),
        ("positions an epoch", f"{total:,}"),
    ]


def make_histograms(checked: CheckedData) -> list[Histogram]:
    """Token lengths of the usable records, if known, their answers, and sizes of the images that could be opened."""
    tokens = [record.tokens for record in checked.usable if record.tokens is not None]
    answers = [sum(len(t.text) for t in r.record.turns if t.role == "assistant") for r in checked.usable]
    sides = [max(facts.width, facts.height) for facts in checked.facts.values() if facts.width]
    values = [
        ("Positions a record / 每条记录的位置数", "positions", [one.positions for one in tokens]),
        ("Supervised positions / 计入损失的位置数", "positions", [one.supervised.sum() for one in tokens]),
        ("Characters of the answers / 回答的字数", "characters", answers),
        ("Longer side of the images / 图片长边", "pixels", sides),
    ]
    return [_count(*one) for one in values if one[2]]


def _count(title: str, unit: str, values: Sequence[int]) -> Histogram:
    low, high = min(values), max(values) + 1
    # Bins begin at multiples of 1, 2, 5, 10, 20, 50 …, which are easy to read.
    least = max((high - low) / HISTOGRAM_BINS, 1)
    power = 10 ** math.floor(math.log10(least))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    edges = np.arange(low // width * width, high + width, width)
    return Histogram(title, unit, edges.tolist(), np.histogram(values, edges)[0].tolist())


def print_summary(checked: CheckedData, facts: list[tuple[str, str]], histograms: list[Histogram]) -> None:
    """Print facts, findings and the first histogram, which is that of the lengths where those are known."""
    print_table("Data", ("", "value"), facts)
    print_findings(checked)
    for one in histograms[:1]:
        largest = max(one.counts)
        rows = [
            (
                f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}",
                count,
                "█" * math.ceil(BAR_WIDTH * count / largest),
            )
            for low, high, count in zip(one.edges, one.edges[1:], one.counts, strict=False)
        ]
        print_table(one.title, (one.unit, "records", ""), rows)


def render_check_page(
    checked: CheckedData, facts: list[tuple[str, str]], histograms: list[Histogram], arguments: CheckArguments
) -> str:
    """The page: facts, findings, histograms, the worst records and a sample of the others. Equal data, equal text.

    Short facts with a digit become tiles.
    """
    severity_of = checked.policy.severity_of
    cards = [_make_card(record, checked.policy.is_bad) for record in checked.records]
    cards += [Card(one.place, one.record_id, [one]) for one in checked.malformed]
    shown = _choose_cards(cards, checked, arguments.report_records)
    shown.sort(key=lambda card: _split_numbers(card.place))
    orders = {card.place: order for order, card in enumerate(shown)}
    # The worst first, equally bad ones in the order of the files.
    bad = {card.place: sum(checked.policy.is_bad(one.kind) for one in card.findings) for card in shown}
    shown.sort(key=lambda card: (-bad[card.place], bad[card.place] - len(card.findings)))
    ids: dict[str, list[str]] = {}
    for finding in checked.findings:
        ids.setdefault(finding.kind, []).append(finding.record_id)
    kinds = sorted(ids, key=lambda kind: (severity_of(kind) != "bad", -len(ids[kind]), kind))
    images = list(dict.fromkeys(image for card in shown for image in card.images))
    tiles = [fact for fact in facts if len(fact[1]) <= SHORT_FACT and any(map(str.isdigit, fact[1]))]
    return render_page(
        "check_page.html",
        f"Data check: {arguments.annotations.name}",
        {"tone": _find_tone, "shorten": _shorten_detail},
        severity_of=severity_of,
        total_entries=len(cards),
        tiles=tiles,
        details=[fact for fact in facts if fact not in tiles],
        kinds=[(kind, severity_of(kind), len(ids[kind]), KINDS[kind]) for kind in kinds],
        examples={kind: ids[kind][:MAX_EXAMPLES] for kind in kinds},
        kinds_on_page=Counter(kind for card in shown for kind in {one.kind for one in card.findings}),
        ids_on_page={card.record_id for card in shown},
        histograms=[(one, draw_bars(one.edges, one.counts, one.unit)) for one in histograms],
        sources=sorted({card.source for card in shown}),
        records_of_source=Counter(card.source for card in shown),
        cards=[
            (card, orders[card.place], severity_of(card.findings[0].kind) if card.findings else "clean")
            for card in shown
        ],
        places={image: place for place, image in enumerate(images)},
        thumbnails=make_thumbnails(images, arguments.max_pixels),
        placeholder=IMAGE_PLACEHOLDER,
    )


def _make_card(checked: CheckedRecord, is_bad: Callable[[str], bool]) -> Card:
    record, tokens = checked.record, checked.tokens
    known = (tokens.positions, int(tokens.supervised.sum())) if tokens is not None else (None, None)
    findings = sorted(checked.findings, key=lambda finding: not is_bad(finding.kind))
    return Card(record.place, record.record_id, findings, checked.image_paths, record.turns, record.source, *known)


def _choose_cards(cards: Sequence[Card], checked: CheckedData, limit: int) -> list[Card]:
    """All bad records as far as they fit, then noted and clean ones half and half, drawn by a fixed seed."""
    bad, noted, clean = [], [], []
    for index in np.random.default_rng(0).permutation(len(cards)).tolist():
        found = cards[index].findings
        is_bad = any(checked.policy.is_bad(finding.kind) for finding in found)
        (bad if is_bad else noted if found else clean).append(cards[index])
    # A set of GIFs has a finding about every record; clean ones must be seen as well.
    room = max(limit - len(bad), 0)
    noted_count = min(len(noted), max(room // 2, room - len(clean)))
    return [*bad[:limit], *noted[:noted_count], *clean[: room - noted_count]]


def _split_numbers(place: str) -> list[str | int]:
    """A sorting key under which record 9 comes before record 10: text and numbers in turn."""
    return [int(piece) if index % 2 else piece for index, piece in enumerate(re.split(r"([0-9]+)", place))]


def _shorten_detail(detail: str, images: Sequence[Path]) -> str:
    """A detail without the folders of the image it begins with, which the card names already."""
    for image in images:
        if detail.startswith(f"{image}: "):
            return detail.removeprefix(f"{image}: " if len(images) == 1 else f"{image.parent}/")
    return detail


def _find_tone(fact: tuple[str, str]) -> str:
    label, value = fact
    return "plain" if value == "0" else TONES.get(label.split(" ")[0], "plain")
