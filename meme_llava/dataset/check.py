"""The data check: everything that is wrong or unusual about an annotation file and its images, record by record.

data/check.py, run.sh before it builds, and train.py before it loads a model all ask here. Nothing is dropped or
replaced silently: every bad record is listed with its place, kind and reason. Nothing about models.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meme_llava.dataset.conversation import CONTROL_TOKENS, IMAGE_PLACEHOLDER, ConversationEncoder
from meme_llava.dataset.findings import KINDS, Finding, RecordFault, Severities
from meme_llava.dataset.image_cache import ImageCache, ImageFacts
from meme_llava.dataset.image_inspection import check_image, inspect_image, inspect_images
from meme_llava.dataset.images import MAX_PIXELS, resolve_image_path
from meme_llava.dataset.records import Record, read_records
from meme_llava.dataset.text_quality import find_loop, find_refusal, measure_recall, normalise_text
from meme_llava.dataset.token_lengths import Conversation, PrefixSharing, RecordLengths, measure_tokens
from meme_llava.errors import UserError
from meme_llava.terminal import print_table

# A list of a hundred thousand findings helps nobody; the count is always given in full.
MAX_LISTED, MAX_LISTED_OF_ONE_CAUSE = 50, 5
SMALLEST_RECALL = 0.5  # of the characters known to stand in an image; a caption may quote them in part
# Short answers ("有", "图片里没有文字。") may well answer two questions about one image.
SHORT_ANSWER = 10  # characters that are letters or digits


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

    `sharing` says how `records` share positions, if an encoder was given.
    """

    annotations: Path
    severities: Severities
    records: list[CheckedRecord]
    malformed: list[Finding]
    facts: dict[Path, ImageFacts]
    sharing: PrefixSharing | None = None

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
    def usable_sharing(self) -> PrefixSharing:
        """How the `usable` records share positions; an encoder must have been given."""
        usable = [number for number, checked in enumerate(self.records) if self.is_usable(checked)]
        return self.sharing.select(np.array(usable, np.int64))

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

    @property
    def undecoded(self) -> int:
        """Images of which only the header was read."""
        return sum(not facts.decoded and facts.fault is None for facts in self.facts.values())


def check_data(
    annotations: Path,
    image_folder: Path,
    severities: Severities,
    max_pixels: int = MAX_PIXELS,
    encoder: ConversationEncoder | None = None,
    max_length: int | None = None,
    cache: ImageCache | None = None,
    decode: bool = True,
    workers: int | None = None,
    show_progress: Callable | None = None,
    length_folder: Path | None = None,
) -> CheckedData:
    """Read and check every record, and count its tokens.

    Args:
        encoder: with it, it is known how records are encoded to at most `max_length` positions (image tokens counted);
            without it, nothing is known about lengths.
        decode: open every image whole, in parallel, unless the cache knows it; if False, look at the header of those
            that the cache does not know.
        show_progress: `display.show_count`.
        length_folder: where counted lengths are kept; None counts anew.

    Raises:
        UserError: the annotation file or the image folder cannot be read at all.
    """
    check_image_folder(image_folder)
    records, malformed = read_records(annotations)
    checked_records = [_resolve_images(record, image_folder) for record in records]
    paths = list(dict.fromkeys(path for checked in checked_records for path in checked.image_paths))
    facts = _look_at_images(paths, max_pixels, cache or ImageCache(None), decode, workers, show_progress)
    judged = {path: check_image(path, facts[path], max_pixels) for path in paths}
    originals = _find_first_copies(facts)
    sharing = None
    if encoder is not None:
        sharing = _measure_tokens(checked_records, encoder, max_length, length_folder, workers)
    for checked in checked_records:
        for path in checked.image_paths:
            for kind, detail in judged[path]:
                _add(checked, kind, detail)
            if originals.get(path, path) != path:
                _add(checked, "duplicate_image", f"{path}: has the bytes of {originals[path]}")
        _check_text(checked, encoder)
        _check_length(checked)
    checked_data = CheckedData(annotations, severities, checked_records, malformed, facts, sharing)
    _find_duplicates(checked_data)
    return checked_data


def check_image_folder(image_folder: Path) -> None:
    """Raise UserError unless the folder exists."""
    if not image_folder.is_dir():
        raise UserError(f"{image_folder}: no such image folder")


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


def _describe_record(findings: list[Finding]) -> str:
    first, *others = findings
    return "; ".join([str(first), *(f"{finding.detail} [{finding.kind}]" for finding in others)])


def suggest_folder(checked: CheckedData) -> str:
    """A line that asks about the image folder if most images are missing, else nothing."""
    missing = sum(finding.kind == "missing_image" for finding in checked.findings)
    if missing * 2 > len(checked.records):
        question = "is --image_folder the folder that the records' paths start from?"
        return f"\nImages of {missing} records are missing; {question}"
    return ""


def _read_number(place: str) -> int:
    return int(place.rsplit(" ", 1)[1])


def _add(checked: CheckedRecord, kind: str, detail: str) -> None:
    record = checked.record
    checked.findings.append(Finding(kind, record.place, record.record_id, detail))


def _resolve_images(record: Record, image_folder: Path) -> CheckedRecord:
    try:
        return CheckedRecord(record, tuple(resolve_image_path(image, image_folder) for image in record.images))
    except RecordFault as fault:
        return CheckedRecord(record, (), [Finding(fault.kind, record.place, record.record_id, str(fault))])


def _look_at_images(paths, max_pixels, cache, decode, workers, show_progress) -> dict[Path, ImageFacts]:
    if not decode:
        return {path: cache.look_up(path) or inspect_image(path, max_pixels, decode=False) for path in paths}
    if show_progress is None:
        return inspect_images(paths, max_pixels, cache, workers)
    with show_progress("images", len(paths)) as advance:
        return inspect_images(paths, max_pixels, cache, workers, advance)


def _find_first_copies(facts: dict[Path, ImageFacts]) -> dict[Path, Path]:
    """Every file whose contents are known: the first file with the same bytes."""
    first: dict[str, Path] = {}
    return {path: first.setdefault(fact.sha256, path) for path, fact in facts.items() if fact.sha256 is not None}


def _check_text(checked: CheckedRecord, encoder: ConversationEncoder | None) -> None:
    control_tokens = encoder.control_tokens if encoder is not None else CONTROL_TOKENS
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


def _measure_tokens(checked_records, encoder, max_length, length_folder, workers) -> PrefixSharing:
    conversations = [Conversation(checked.record.turns, checked.image_paths) for checked in checked_records]
    measured = measure_tokens(conversations, encoder, max_length, length_folder, workers)
    for checked, lengths in zip(checked_records, measured.records, strict=True):
        checked.lengths = lengths
    return measured.sharing


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
