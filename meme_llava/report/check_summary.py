"""The summary of a checked annotation file: lengths, steps, and what data/check.py prints and reports of it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.check import CheckedData, CheckedRecord, RecordPolicy, print_findings
from meme_llava.dataset.records import KINDS, Finding, Severities
from meme_llava.report.check_page import GalleryEntry, Histogram, KindCount, ReportContents
from meme_llava.storage.files import write_lines
from meme_llava.terminal import print_table

FINDINGS = "findings.jsonl"
REPORT = "report.html"
HISTOGRAM_BINS = 20
BAR_WIDTH = 40  # characters of the longest bar on a terminal
MAX_EXAMPLES = 5  # ids of a kind in the report's table


@dataclass
class CheckArguments(RecordPolicy):
    annotations: Path = field(metadata=describe("annotation file, .json or .jsonl"))
    image_folder: Path = field(metadata=describe("folder that the records' image paths start from"))
    model: Path | None = field(
        default=None, metadata=describe("base model; with it, records are tokenised and their lengths are known")
    )
    output_dir: Path = field(
        default=Path("output/check"), metadata=describe(f"gets {REPORT}, {FINDINGS} and, if needed, quarantine.jsonl")
    )
    model_max_length: int = field(default=2048, metadata=describe("positions a record may take, image tokens counted"))
    global_batch_size: int = field(default=64, metadata=describe("records per optimizer step, to predict the steps"))
    num_train_epochs: float = field(default=5, metadata=describe("passes over the records, to predict the steps"))
    workers: int | None = field(default=None, metadata=describe("processes that decode images; all CPUs if not given"))
    report_records: int = field(
        default=1000, metadata=describe("records that the report shows: the worst, then a sample of the others")
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        super().__post_init__()
        for name in ("model_max_length", "global_batch_size", "num_train_epochs", "workers"):
            value = getattr(self, name)
            check_setting(self, name, value is None or value > 0, "more than 0")
        check_setting(self, "report_records", self.report_records >= 0, "0 or more")


@dataclass(frozen=True)
class Lengths:
    """Positions of the usable records, int64 (records,) each; `images` counts those that hold image tokens."""

    total: np.ndarray
    supervised: np.ndarray
    images: np.ndarray


def measure_lengths(checked: CheckedData, tokens_per_image: int) -> Lengths:
    """The lengths of all records that train; an encoder must have counted them."""
    usable = checked.usable
    return Lengths(
        total=np.array([record.lengths.positions for record in usable], np.int64),
        supervised=np.array([record.lengths.supervised for record in usable], np.int64),
        images=np.array([len(record.image_paths) * tokens_per_image for record in usable], np.int64),
    )


def list_facts(checked: CheckedData, lengths: Lengths | None, arguments: CheckArguments) -> list[tuple[str, str]]:
    """What a user wants to know before training, as (label, value)."""
    usable = len(checked.usable)
    contents = {facts.sha256 for facts in checked.facts.values() if facts.sha256 is not None}
    steps = math.ceil(usable * arguments.num_train_epochs / arguments.global_batch_size)
    facts = [
        ("annotations", str(arguments.annotations)),
        ("image folder", str(arguments.image_folder)),
        ("records", f"{checked.total:,}"),
        ("usable records", f"{usable:,}"),
        ("bad records", f"{len(checked.bad):,}"),
        ("images", f"{len(checked.facts):,}"),
        ("different images", f"{len(contents):,}"),
        ("steps", f"{steps:,}"),
        ("records a step", f"{arguments.global_batch_size:,}"),
        ("epochs", f"{arguments.num_train_epochs:g}"),
    ]
    if lengths is None:
        return [*facts, ("positions", "unknown; give --model to tokenise the records")]
    if not usable:
        return facts
    total = int(lengths.total.sum())
    percentiles = np.percentile(lengths.total, [50, 95, 100]).astype(int)
    return [
        *facts,
        ("length limit", f"{arguments.model_max_length:,} positions (model_max_length)"),
        ("positions a record", f"{total / usable:,.1f} (median {percentiles[0]:,}, 95 % under {percentiles[1]:,})"),
        ("longest record", f"{percentiles[2]:,} positions"),
        ("supervised positions", f"{lengths.supervised.sum() / total:.1%} of all"),
        ("image positions", f"{lengths.images.sum() / total:.1%} of all"),
        ("positions an epoch", f"{total:,}"),
    ]


def make_histograms(checked: CheckedData, lengths: Lengths | None) -> list[Histogram]:
    """Token lengths of the usable records, and sizes of the images that could be opened."""
    histograms = []
    if lengths is not None and len(lengths.total):
        histograms.append(_count("Positions a record / 每条记录的位置数", "positions", lengths.total))
        histograms.append(_count("Supervised positions / 计入损失的位置数", "positions", lengths.supervised))
    answers = [sum(len(t.text) for t in r.record.turns if t.role == "assistant") for r in checked.usable]
    if answers:
        histograms.append(_count("Characters of the answers / 回答的字数", "characters", np.array(answers)))
    sides = [max(facts.width, facts.height) for facts in checked.facts.values() if facts.width]
    if sides:
        histograms.append(_count("Longer side of the images / 图片长边", "pixels", np.array(sides)))
    return histograms


def print_summary(checked: CheckedData, facts: list[tuple[str, str]], histograms: list[Histogram]) -> None:
    """Print facts, findings and the first histogram, which is that of the lengths where those are known."""
    print_table("Data", ("", "value"), facts)
    print_findings(checked)
    for histogram in histograms[:1]:
        largest = max(histogram.counts)
        rows = [
            (_describe_range(low, high), count, "█" * math.ceil(BAR_WIDTH * count / largest))
            for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
        ]
        print_table(histogram.title, (histogram.unit, "records", ""), rows)


def make_report_contents(
    checked: CheckedData, facts: list[tuple[str, str]], histograms: list[Histogram], arguments: CheckArguments
) -> ReportContents:
    """Everything the report shows; of the records the worst ones and a sample of the others."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in checked.findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    kinds = [
        KindCount(
            name=kind,
            severity=checked.severities.severity_of(kind),
            count=len(found),
            meaning=KINDS[kind].meaning,
            examples=tuple(finding.record_id for finding in found[:MAX_EXAMPLES]),
        )
        for kind, found in by_kind.items()
    ]
    entries = [_make_entry(record) for record in checked.records]
    entries += [GalleryEntry(f.place, f.record_id, (), (), (f,), "", None, None) for f in checked.malformed]
    return ReportContents(
        title=f"Data check: {arguments.annotations.name}",
        facts=facts,
        kinds=kinds,
        histograms=histograms,
        entries=_choose_entries(entries, checked.severities, arguments.report_records),
        total_entries=len(entries),
        max_pixels=arguments.max_pixels,
    )


def write_findings(path: Path, checked: CheckedData) -> None:
    """List every finding in a JSONL file, in the order of the annotation file."""
    write_lines(
        path, ({**one.__dict__, "severity": checked.severities.severity_of(one.kind)} for one in checked.findings)
    )


def _count(title: str, unit: str, values: np.ndarray) -> Histogram:
    low, high = int(values.min()), int(values.max()) + 1
    width = _round_up((high - low) / HISTOGRAM_BINS)
    edges = np.arange(low // width * width, high + width, width)
    counts, _ = np.histogram(values, edges)
    return Histogram(title, unit, edges.tolist(), counts.tolist())


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 …, so that bins begin at numbers that are easy to read."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)


def _describe_range(low: int, high: int) -> str:
    return f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"


def _make_entry(checked: CheckedRecord) -> GalleryEntry:
    record, lengths = checked.record, checked.lengths
    fits = lengths is not None and lengths.misfit is None
    return GalleryEntry(
        place=record.place,
        record_id=record.record_id,
        images=checked.image_paths,
        turns=record.turns,
        findings=tuple(checked.findings),
        source=record.source,
        positions=lengths.positions if fits else None,
        supervised=lengths.supervised if fits else None,
    )


def _choose_entries(entries: list[GalleryEntry], severities: Severities, limit: int) -> list[GalleryEntry]:
    """All bad entries as far as they fit, then noted and clean ones half and half, drawn by a fixed seed."""
    bad, noted, clean = [], [], []
    for index in np.random.default_rng(0).permutation(len(entries)).tolist():
        found = entries[index].findings
        is_bad = any(severities.is_bad(finding.kind) for finding in found)
        (bad if is_bad else noted if found else clean).append(index)
    # A set of GIFs has a finding about every record; clean ones must be seen as well.
    room = max(limit - len(bad), 0)
    noted_count = min(len(noted), max(room // 2, room - len(clean)))
    chosen = [*bad[:limit], *noted[:noted_count], *clean[: room - noted_count]]
    return [entries[index] for index in sorted(chosen)]
