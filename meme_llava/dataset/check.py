"""The data check: everything that is wrong or unusual about an annotation file and its images, record by record.

data/check.py, run.sh before it builds, and train.py before it loads a model all ask here. Nothing is dropped or
replaced silently: every bad record is listed with its place, kind and reason. Nothing about models.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from meme_llava.dataset.conversation import CONTROL_TOKENS, ConversationEncoder, DoesNotFit, Tokens
from meme_llava.dataset.findings import KINDS, QUARANTINE, Finding, RecordFault, RecordPolicy
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import (
    ImageFacts,
    check_image,
    check_texts,
    inspect_images,
    measure_recall,
    normalise_text,
)
from meme_llava.dataset.records import Record, iterate_values, read_records, show
from meme_llava.dataset.user_files import describe_near_name
from meme_llava.errors import UserError, count, list_by_cause
from meme_llava.storage.files import write_lines
from meme_llava.terminal import print_table

# Short answers ("有", "图片里没有文字。") may well answer two questions about one image.
SHORT_ANSWER = 10  # characters that are letters or digits
SMALLEST_RECALL = 0.5  # of the characters known to stand in an image; a caption may quote them in part


@dataclass
class CheckedRecord:
    """A record of sound form with all that was found about it, and its tokens if an encoder was given and they fit."""

    record: Record
    image_paths: tuple[Path, ...]
    findings: list[Finding] = field(default_factory=list)
    tokens: Tokens | None = None

    def add(self, *found: tuple[str, str]) -> None:
        """Note findings, each as (kind, detail)."""
        self.findings += [Finding(kind, self.record.place, self.record.record_id, detail) for kind, detail in found]


@dataclass
class CheckedData:
    """Every record of an annotation file. `malformed` holds the findings about those without a sound form."""

    annotations: Path
    policy: RecordPolicy
    records: list[CheckedRecord]
    malformed: list[Finding]
    facts: dict[Path, ImageFacts]

    @property
    def total(self) -> int:
        """Records of the file, sound or not."""
        return len(self.records) + len(self.malformed)

    @property
    def findings(self) -> list[Finding]:
        """All findings in the order of the file."""
        found = [finding for checked in self.records for finding in checked.findings]
        return sorted([*self.malformed, *found], key=lambda finding: int(finding.place.rsplit(" ", 1)[1]))

    def is_usable(self, checked: CheckedRecord) -> bool:
        """Whether a record is trained on."""
        return not any(self.policy.is_bad(finding.kind) for finding in checked.findings)

    @property
    def usable(self) -> list[CheckedRecord]:
        return [checked for checked in self.records if self.is_usable(checked)]

    @property
    def bad(self) -> dict[str, list[Finding]]:
        """What keeps records from training, by place, in the order of the file."""
        reasons: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if self.policy.is_bad(finding.kind):
                reasons.setdefault(finding.place, []).append(finding)
        return reasons

    @property
    def counts(self) -> dict[str, int]:
        """Findings of every kind that was found, in the order of `KINDS`."""
        counts = Counter(finding.kind for finding in self.findings)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}


def check_data(
    annotations: Path,
    image_folder: Path,
    policy: RecordPolicy,
    encoder: ConversationEncoder | None = None,
    max_length: int | None = None,
    decode: bool = True,
    workers: int | None = None,
) -> CheckedData:
    """Read and check every record, tokenise it, and look at every image.

    Args:
        image_folder: the image paths of records start from it.
        encoder: without it, nothing is known about lengths.
        max_length: positions a record may take, image tokens counted.
        decode: open every image whole, in `workers` processes (None: as many as there are CPUs); else its header.

    Raises:
        UserError: the annotation file or the image folder cannot be read at all.
    """
    check_image_folder(image_folder)
    records, malformed = read_records(annotations)
    checked_records = [_resolve_images(record, image_folder) for record in records]
    paths = (path for one in checked_records for path in one.image_paths)
    facts = inspect_images(paths, policy.max_pixels, decode, workers)
    found, first_of, listings = {}, {}, {}  # findings by path; the first path by sha256; names by folder
    for path, fact in facts.items():
        found[path] = check_image(path, fact, listings)
        if fact.sha256 is not None and (first := first_of.setdefault(fact.sha256, path)) != path:
            found[path].append(("duplicate_image", f"{path}: has the bytes of {first}"))
    control_tokens = CONTROL_TOKENS if encoder is None else encoder.control_tokens
    for checked in checked_records:
        checked.add(*(one for path in checked.image_paths for one in found[path]))
        checked.add(*check_texts(checked.record.turns, control_tokens))
        if stray_image := checked.record.stray_image:
            checked.add(("image_elsewhere", stray_image))
    _compare_texts(checked_records)
    if encoder is not None:
        encoded = encoder.encode_many([checked.record.turns for checked in checked_records], max_length)
        for checked, tokens in zip(checked_records, encoded, strict=True):
            if isinstance(tokens, DoesNotFit):
                checked.add(("too_long", str(tokens)))
                continue
            checked.tokens = tokens
            if tokens.cut_tokens:
                checked.add(("cut_answer", f"{count(tokens.cut_tokens, 'position')} cut"))
    checked_data = CheckedData(annotations, policy, checked_records, malformed, facts)
    _find_duplicates(checked_data)
    return checked_data


def check_records(annotations: Path, image_folder: Path, policy: RecordPolicy) -> CheckedData:
    """Check records without a model, and decode every image.

    Raises:
        UserError: a record or image is bad, or nothing is left.
    """
    checked = check_data(annotations, image_folder, policy)
    stop_on_bad_records(checked)
    return checked


def check_image_folder(image_folder: Path) -> None:
    """Raise UserError unless the folder exists."""
    if image_folder.is_file():
        raise UserError(f"{image_folder}: is a file, expected the folder that the records' image paths start from")
    if not image_folder.is_dir():
        raise UserError(f"{image_folder}: no such image folder{describe_near_name(image_folder, {})}")


def _resolve_images(record: Record, image_folder: Path) -> CheckedRecord:
    try:
        return CheckedRecord(record, tuple(resolve_image_path(image, image_folder) for image in record.images))
    except RecordFault as fault:
        return CheckedRecord(record, (), [Finding(fault.kind, record.place, record.record_id, str(fault))])


def _compare_texts(records: list[CheckedRecord]) -> None:
    """Note answers that lack the text known to stand in their image, but for short ones, as about its mood, where
    another answer about the image has it."""
    compared = []
    for checked in (checked for checked in records if checked.record.text):
        answer = "".join(turn.text for turn in checked.record.turns if turn.role == "assistant")
        compared.append((checked, len(normalise_text(answer)), measure_recall(checked.record.text, answer)))
    read = {checked.image_paths for checked, _, recall in compared if recall >= SMALLEST_RECALL}
    for checked, length, recall in compared:
        if recall < SMALLEST_RECALL and (length >= SHORT_ANSWER or checked.image_paths not in read):
            detail = f"{recall:.0%} of the characters of {show(checked.record.text)} are in the answer"
            checked.add(("text_disagrees", detail))


def _find_duplicates(data: CheckedData) -> None:
    """Of records that share an id or a caption the first usable one stays; one that is left out does not count."""
    ids: dict[str, str] = {}
    captions: dict[tuple, str] = {}
    for checked in data.records:
        record = checked.record
        if record.record_id in ids:
            checked.add(("duplicate_id", f"has the id of {ids[record.record_id]}"))
        if not data.is_usable(checked):
            continue
        ids.setdefault(record.record_id, record.place)
        if record.repeat == 1:
            first = captions.setdefault(_make_caption_key(checked), record.place)
            if first != record.place:
                checked.add(("duplicate_caption", f"says the same as {first}"))


def _make_caption_key(checked: CheckedRecord) -> tuple:
    """What two records share if they teach the same: images and answers, and questions where an answer is short."""
    turns = checked.record.turns
    answers = tuple(normalise_text(turn.text) or turn.text for turn in turns if turn.role == "assistant")
    questions = tuple(turn.text for turn in turns if turn.role != "assistant")
    is_long = bool(checked.image_paths) and all(len(answer) >= SHORT_ANSWER for answer in answers)
    return checked.image_paths, answers, () if is_long else questions


def stop_on_bad_records(checked: CheckedData) -> None:
    """Stop where bad records are errors, or where nothing else is left.

    Raises:
        UserError: with examples of every kind of finding.
    """
    bad, suggestion = list(checked.bad.values()), suggest_folder(checked)
    listed = list_by_cause("record", map(_explain, bad)) + suggestion
    if bad and checked.policy.bad_records == "error":
        raise UserError(
            f"{checked.annotations}: {len(bad):,} of {count(checked.total, 'record')} cannot be trained on:\n{listed}\n"
            + ("Fix them, or pass --bad_records quarantine to train without them." if checked.usable else "Fix them.")
        )
    if not checked.usable:
        why = f"; all {checked.total:,} are unusable:\n{listed}" if checked.total else ""
        raise UserError(f"{checked.annotations}: no record to train on{why}")


def _explain(findings: list[Finding]) -> tuple[str, str]:
    """The cause that keeps a record from training, which others may share, and the line about this one."""
    first, *others = findings
    cause = "; ".join(f"{KINDS[finding.kind]} [{finding.kind}]" for finding in findings)
    return cause, "; ".join([str(first), *(f"{other.detail} [{other.kind}]" for other in others)])


def write_quarantine(output_dir: Path, checked: CheckedData) -> Path | None:
    """List bad records in quarantine.jsonl: place, id, reasons and the record itself, so that nothing is lost.

    Returns its path, or None if there is no bad record.
    """
    reasons, path = checked.bad, output_dir / QUARANTINE
    if not reasons:
        path.unlink(missing_ok=True)
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


def suggest_folder(checked: CheckedData) -> str:
    """A line that asks about the image folder if most images are missing, else nothing."""
    missing = len({finding.place for finding in checked.findings if finding.kind == "missing_image"})
    if missing * 2 <= len(checked.records):
        return ""
    question = "is --image_folder (IMAGE_FOLDER of run.sh) the folder that their paths start from?"
    return f"\nImages of {count(missing, 'record')} are missing; {question}"


def describe_findings(checked: CheckedData) -> str:
    """How many findings of every kind there are, in a line; empty for none."""
    found = ", ".join(f"{number:,} {kind}" for kind, number in checked.counts.items())
    return f"findings: {found}" if found else ""


def print_findings(checked: CheckedData) -> None:
    """Print how many findings of every kind there are, and whether they keep their records from training."""
    rows = [(kind, checked.policy.severity_of(kind), number, KINDS[kind]) for kind, number in checked.counts.items()]
    if rows:
        print_table("Findings", ("kind", "severity", "records", "meaning"), rows)
    with_text = [one for one in checked.records if one.record.text]
    disagreeing = sum(any(finding.kind == "text_disagrees" for finding in one.findings) for one in with_text)
    if disagreeing * 2 > len(with_text):
        print(
            f"{disagreeing:,} of {len(with_text):,} answers lack most of the words known to stand in their images; do "
            "the captions belong to these images?"
        )
