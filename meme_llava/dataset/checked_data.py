"""What a check found: every record of an annotation file with its findings, and what a user is told of them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from meme_llava.dataset.findings import KINDS, Finding, Severities
from meme_llava.dataset.image_inspection import ImageFacts
from meme_llava.dataset.records import Record
from meme_llava.dataset.tokenization import RecordLengths, TokenizedRecords
from meme_llava.errors import UserError
from meme_llava.terminal import print_table

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
