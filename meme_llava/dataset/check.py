"""The data check: everything that is wrong or unusual about an annotation file and its images, record by record.

data/check.py, run.sh before it builds, and train.py before it loads a model all ask here. Nothing is dropped or
replaced silently: every bad record is listed with its place, kind and reason. Nothing about models.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.conversation import (
    CONTROL_TOKENS,
    IMAGE_PLACEHOLDER,
    Conversation,
    RecordLengths,
    Tokenization,
    TokenizedRecords,
    tokenize_records,
)
from meme_llava.dataset.images import MAX_PIXELS, resolve_image_path
from meme_llava.dataset.inspection import (
    ImageFacts,
    Inspection,
    check_image,
    find_loop,
    find_refusal,
    measure_recall,
    normalise_text,
)
from meme_llava.dataset.records import (
    KINDS,
    QUARANTINE,
    Finding,
    Record,
    RecordFault,
    Severities,
    iterate_values,
    read_records,
)
from meme_llava.errors import UserError
from meme_llava.storage.files import write_lines
from meme_llava.terminal import print_table, show_count


@dataclass(frozen=True)
class RecordSource:
    """An annotation file, and the folder that its image paths start from."""

    annotations: Path
    image_folder: Path


@dataclass(kw_only=True)
class RecordPolicy:
    """What becomes of records with findings; the data check and training take the same settings."""

    bad_records: Literal["error", "quarantine"] = field(
        default="error", metadata=describe("bad records stop the run, or go to quarantine.jsonl and are counted")
    )
    allow: list[str] = field(
        default_factory=list, metadata=describe("kinds of findings that make no record bad, such as duplicate_id")
    )
    refuse: list[str] = field(
        default_factory=list, metadata=describe("kinds that make a record bad though they need not, such as cut_answer")
    )
    max_pixels: int = field(default=MAX_PIXELS, metadata=describe("images with more pixels are not decoded"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "max_pixels", self.max_pixels > 0, "at least 1")
        Severities(tuple(self.allow), tuple(self.refuse))  # stops at a kind that does not exist

    @property
    def severities(self) -> Severities:
        """Which findings keep a record from training."""
        return Severities(tuple(self.allow), tuple(self.refuse))


# A list of a hundred thousand findings helps nobody; the count is always given in full.
MAX_LISTED, MAX_LISTED_OF_ONE_CAUSE = 50, 5


@dataclass
class CheckedRecord:
    """A record of sound form with all that was found about it, and its lengths if an encoder was given."""

    record: Record
    image_paths: tuple[Path, ...]
    findings: list[Finding] = field(default_factory=list)
    lengths: RecordLengths | None = None


@dataclass
class CheckedData:
    """Every record of an annotation file. `malformed` holds the findings about those without a sound form.

    `tokens` are those of `records`, if an encoder was given.
    """

    annotations: Path
    severities: Severities
    records: list[CheckedRecord]
    malformed: list[Finding]
    facts: dict[Path, ImageFacts]
    tokens: TokenizedRecords | None = None

    @property
    def total(self) -> int:
        """Records of the file, sound or not."""
        return len(self.records) + len(self.malformed)

    @property
    def findings(self) -> list[Finding]:
        """All findings in the order of the file."""
        found = [finding for checked in self.records for finding in checked.findings]
        return sorted([*self.malformed, *found], key=lambda finding: _read_number(finding.place))

    def is_usable(self, checked: CheckedRecord) -> bool:
        """Whether a record is trained on."""
        return not any(self.severities.is_bad(finding.kind) for finding in checked.findings)

    @property
    def usable(self) -> list[CheckedRecord]:
        return [checked for checked in self.records if self.is_usable(checked)]

    @property
    def usable_tokens(self) -> TokenizedRecords:
        """The tokens of the `usable` records; an encoder must have been given."""
        return self.tokens.select([number for number, one in enumerate(self.records) if self.is_usable(one)])

    @property
    def bad(self) -> dict[str, list[Finding]]:
        """What keeps records from training, by place, in the order of the file."""
        reasons: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if self.severities.is_bad(finding.kind):
                reasons.setdefault(finding.place, []).append(finding)
        return reasons

    @property
    def counts(self) -> dict[str, int]:
        """Findings of every kind that was found, in the order of `findings.KINDS`."""
        counts = Counter(finding.kind for finding in self.findings)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}


def stop_on_bad_records(checked: CheckedData, bad_records: str) -> None:
    """Stop where bad records are errors, or where nothing else is left.

    Raises:
        UserError: listing the first findings.
    """
    bad, suggestion = list(checked.bad.values()), suggest_folder(checked)
    # One wrong folder explains them all.
    most = MAX_LISTED_OF_ONE_CAUSE if suggestion else MAX_LISTED
    listed = "\n".join(f"  {_describe_record(findings)}" for findings in bad[:most])
    more = f"\n  … and {len(bad) - most} more" if len(bad) > most else ""
    if bad and bad_records == "error":
        raise UserError(
            f"{checked.annotations}: {len(bad)} of {checked.total} records cannot be trained on:\n{listed}{more}"
            f"{suggestion}\nMend them, or pass --bad_records quarantine to train without them."
        )
    if not checked.usable:
        why = f"; all {checked.total} are unusable:\n{listed}{more}{suggestion}" if checked.total else ""
        raise UserError(f"{checked.annotations}: no record to train on{why}")


def write_quarantine(output_dir: Path, checked: CheckedData) -> Path | None:
    """List bad records in quarantine.jsonl: place, id, reasons and the record itself, so that nothing is lost.

    Returns its path, or None if there is no bad record.
    """
    reasons = checked.bad
    path = output_dir / QUARANTINE
    path.unlink(missing_ok=True)
    if not reasons:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = (
        {
            "place": place,
            "record_id": reasons[place][0].record_id,
            "reasons": [{"kind": finding.kind, "detail": finding.detail} for finding in reasons[place]],
            "record": value.content if isinstance(value, RecordFault) else value,
        }
        for place, value in iterate_values(checked.annotations)
        if place in reasons
    )
    write_lines(path, lines)
    return path


def describe_mispairing(checked: CheckedData) -> str:
    """A question to the user if most answers lack the words known to stand in their images, else nothing."""
    with_text = [record for record in checked.records if record.record.text]
    disagreeing = sum(any(f.kind == "text_disagrees" for f in record.findings) for record in with_text)
    if disagreeing * 2 <= len(with_text):
        return ""
    return (
        f"{disagreeing:,} of {len(with_text):,} answers lack most of the words known to stand in their images; do "
        "the captions belong to these images?"
    )


def suggest_folder(checked: CheckedData) -> str:
    """A line that asks about the image folder if most images are missing, else nothing."""
    missing = sum(finding.kind == "missing_image" for finding in checked.findings)
    if missing * 2 > len(checked.records):
        question = "is --image_folder the folder that the records' paths start from?"
        return f"\nImages of {missing} records are missing; {question}"
    return ""


def print_findings(checked: CheckedData) -> None:
    """Print how many findings of every kind there are, and whether they keep their records from training."""
    rows = [
        (kind, checked.severities.severity_of(kind), count, KINDS[kind].meaning)
        for kind, count in checked.counts.items()
    ]
    if rows:
        print_table("Findings", ("kind", "severity", "records", "meaning"), rows)
    if doubt := describe_mispairing(checked):
        print(doubt)


def _describe_record(findings: list[Finding]) -> str:
    first, *others = findings
    return "; ".join([str(first), *(f"{finding.detail} [{finding.kind}]" for finding in others)])


def _read_number(place: str) -> int:
    return int(place.rsplit(" ", 1)[1])


SMALLEST_RECALL = 0.5  # of the characters known to stand in an image; a caption may quote them in part
# Short answers ("有", "图片里没有文字。") may well answer two questions about one image.
SHORT_ANSWER = 10  # characters that are letters or digits


def check_data(
    source: RecordSource,
    policy: RecordPolicy,
    tokens: Tokenization | None = None,
    inspection: Inspection | None = None,
) -> CheckedData:
    """Read and check every record, tokenise it, and look at every image.

    Args:
        tokens: how records are encoded; without it, nothing is known about lengths.
        inspection: how images are looked at; every one is opened whole if it is not given.

    Raises:
        UserError: the annotation file or the image folder cannot be read at all.
    """
    check_image_folder(source.image_folder)
    inspection = inspection or Inspection()
    records, malformed = read_records(source.annotations)
    checked_records = [_resolve_images(record, source.image_folder) for record in records]
    facts = inspection.inspect((path for one in checked_records for path in one.image_paths), policy.max_pixels)
    judged = {path: check_image(path, found, policy.max_pixels) for path, found in facts.items()}
    originals = _find_first_copies(facts)
    tokenized = None if tokens is None else _tokenize(checked_records, tokens, inspection.workers)
    for checked in checked_records:
        for path in checked.image_paths:
            for kind, detail in judged[path]:
                _add(checked, kind, detail)
            if originals.get(path, path) != path:
                _add(checked, "duplicate_image", f"{path}: has the bytes of {originals[path]}")
        _check_text(checked, CONTROL_TOKENS if tokens is None else tokens.encoder.control_tokens)
        _check_length(checked)
    checked_data = CheckedData(source.annotations, policy.severities, checked_records, malformed, facts, tokenized)
    _find_duplicates(checked_data)
    return checked_data


def check_records(source: RecordSource, policy: RecordPolicy) -> CheckedData:
    """Check records without a model, and decode every image.

    Raises:
        UserError: a record or image is bad, or nothing is left.
    """
    checked = check_data(source, policy, inspection=Inspection(show_progress=show_count))
    stop_on_bad_records(checked, policy.bad_records)
    return checked


def check_image_folder(image_folder: Path) -> None:
    """Raise UserError unless the folder exists."""
    if not image_folder.is_dir():
        raise UserError(f"{image_folder}: no such image folder")


def _add(checked: CheckedRecord, kind: str, detail: str) -> None:
    record = checked.record
    checked.findings.append(Finding(kind, record.place, record.record_id, detail))


def _resolve_images(record: Record, image_folder: Path) -> CheckedRecord:
    try:
        return CheckedRecord(record, tuple(resolve_image_path(image, image_folder) for image in record.images))
    except RecordFault as fault:
        return CheckedRecord(record, (), [Finding(fault.kind, record.place, record.record_id, str(fault))])


def _find_first_copies(facts: dict[Path, ImageFacts]) -> dict[Path, Path]:
    """Every file whose contents are known: the first file with the same bytes."""
    first: dict[str, Path] = {}
    return {path: first.setdefault(fact.sha256, path) for path, fact in facts.items() if fact.sha256 is not None}


def _check_text(checked: CheckedRecord, control_tokens: Sequence[str]) -> None:
    for index, turn in enumerate(checked.record.turns):
        where = f"turn {index + 1}"
        spelt = [
            token
            for token in control_tokens
            if token in turn.text and not (token == IMAGE_PLACEHOLDER and turn.role == "user")
        ]
        if spelt:
            _add(checked, "control_text", f"{where} spells {', '.join(spelt)}")
        if turn.role == "assistant":
            if refusal := find_refusal(turn.text):
                _add(checked, "refusal", f"{where} refuses: {refusal!r}")
            if (loop := find_loop(turn.text)) is not None:
                _add(checked, "loop", f"{where} repeats {loop[:30]!r}")
    text = checked.record.text
    if text:
        answers = "".join(turn.text for turn in checked.record.turns if turn.role == "assistant")
        recall = measure_recall(text, answers)
        if recall < SMALLEST_RECALL:
            _add(checked, "text_disagrees", f"{recall:.0%} of the characters of {text!r} are in the answer")


def _tokenize(checked_records: Sequence[CheckedRecord], tokens: Tokenization, workers: int | None) -> TokenizedRecords:
    conversations = [Conversation(checked.record.turns, checked.image_paths) for checked in checked_records]
    tokenized = tokenize_records(conversations, tokens, workers)
    for checked, lengths in zip(checked_records, tokenized.lengths, strict=True):
        checked.lengths = lengths
    return tokenized


def _check_length(checked: CheckedRecord) -> None:
    lengths = checked.lengths
    if lengths is None:
        return
    if lengths.misfit is not None:
        _add(checked, "too_long", lengths.misfit)
    elif lengths.cut_tokens:
        _add(checked, "cut_answer", f"{lengths.cut_tokens} positions cut")


def _find_duplicates(data: CheckedData) -> None:
    """Of records that share an id or a caption the first usable one stays; one that is left out does not count."""
    ids: dict[str, str] = {}
    captions: dict[tuple, str] = {}
    for checked in data.records:
        record = checked.record
        if record.record_id in ids:
            _add(checked, "duplicate_id", f"has the id of {ids[record.record_id]}")
        if not data.is_usable(checked):
            continue
        ids.setdefault(record.record_id, record.place)
        if record.repeat == 1:
            first = captions.setdefault(_make_caption_key(checked), record.place)
            if first != record.place:
                _add(checked, "duplicate_caption", f"says the same as {first}")


def _make_caption_key(checked: CheckedRecord) -> tuple:
    """What two records share if they teach the same: images and answers, and questions where an answer is short."""
    turns = checked.record.turns
    answers = tuple(normalise_text(turn.text) or turn.text for turn in turns if turn.role == "assistant")
    questions = tuple(turn.text for turn in turns if turn.role != "assistant")
    is_long = bool(checked.image_paths) and all(len(answer) >= SHORT_ANSWER for answer in answers)
    return checked.image_paths, answers, () if is_long else questions
