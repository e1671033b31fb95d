"""Settings of the data: where records stand, which of them train, which of them meet in a step. Without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.findings import Severities
from meme_llava.dataset.images import MAX_PIXELS

LossAverage = Literal["token", "caption"]


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


@dataclass(kw_only=True)
class BatchSettings:
    """How much of a record trains, which records meet in an optimizer step, and how it becomes device batches."""

    model_max_length: int = field(metadata=describe("positions a record may take, image tokens counted"))
    global_batch_size: int = field(metadata=describe("records per optimizer step, over all processes"))
    device_batch_size: int = field(metadata=describe("records a device computes at once", free=True))
    seed: int = field(default=42, metadata=describe("order of the records, LoRA start values, dropout"))
    loss_average: LossAverage = field(
        default="token", metadata=describe("what weighs the same in an optimizer step: every token, or every caption")
    )
    shared_images: bool = field(
        default=True,
        metadata=describe("draw images instead of records; all captions of one share its encoding and prompt"),
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "model_max_length", self.model_max_length > 0, "greater than 0")
        for name in ("global_batch_size", "device_batch_size"):
            check_setting(self, name, getattr(self, name) > 0, "at least 1")
        check_setting(self, "seed", self.seed >= 0, "0 or more")
