"""What becomes of records with findings."""

from dataclasses import dataclass, field
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.findings import Severities
from meme_llava.dataset.images import MAX_PIXELS


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


LossAverage = Literal["token", "caption"]
