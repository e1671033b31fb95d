"""What can be wrong or unusual about a record and its images, by name, and which of it keeps a record from training."""

from dataclasses import dataclass
from typing import Literal

from meme_llava.cli import check_settings, setting, suggest
from meme_llava.errors import UserError

QUARANTINE = "quarantine.jsonl"
# A header can promise more pixels than memory holds; real memes stay far below.
MAX_PIXELS = 50_000_000
# What keeps a record from training: such records stop the run or are quarantined.
BAD_KINDS = {
    # The record's form.
    "not_json": "the line is not JSON",
    "repeated_key": "a key stands twice in one object, with two values",
    "malformed": "the record does not have the form of data/README.md",
    "bad_turn_order": "the turns do not alternate human, gpt and end with gpt",
    "empty_text": "a question or an answer is empty, or of invisible characters alone",
    "half_character": "a text holds half a character (a cut emoji)",
    "placeholder_mismatch": "the number of <image> differs from the number of images",
    "image_elsewhere": "the record seems to show an image that is not under 'image', so it would train as text",
    "too_long": "no answer can begin within model_max_length",
    "duplicate_id": "an earlier record has the same id",
    # What the record says.
    "duplicate_caption": "an earlier record gives the same answer about the same image",
    "refusal": "an answer refuses to describe the image",
    "loop": "an answer repeats itself without end",
    # Its images.
    "unsafe_path": "the path is absolute, a URL, or leaves the image folder",
    "missing_image": "there is no such file",
    "unreadable_file": "the file may not be read, or is a folder, pipe or device",
    "empty_file": "the file is empty",
    "not_an_image": "the file is not an image, such as a web page saved under an image's name",
    "unaccepted_format": "an image in a format that is not accepted",
    "damaged_image": "the image is truncated or damaged",
    "too_many_pixels": "the image has more pixels than the limit (--max_pixels of check.py and train.py)",
    "too_small": "a side of the image has less than 4 pixels",
    "extreme_shape": "one side of the image is more than 50 times the other",
}
# Such records are trained on, counted and listed.
NOTED_KINDS = {
    "cut_answer": "the last answer is cut to model_max_length",
    "control_text": "a text spells a control token; it is trained on as plain text",
    "text_disagrees": "an answer holds less than half of the characters known to stand in the image",
    "duplicate_image": "another file has the same bytes",
    "wrong_extension": "the file's name does not end as its format's names do; the contents decide",
    "animated": "an animation, of which the first frame is used",
    "one_colour": "the image, or the first frame of an animation, is of one colour",
    "damaged_animation": "an animation whose later frames are damaged; the first frame is sound",
    "transparent": "transparent parts, which become white",
    "palette": "colours from a palette, which become RGB",
    "cmyk": "printing colours (CMYK), which become RGB",
    "sixteen_bit": "16 bits a channel, which are scaled to 8",
    "exif_rotation": "turned upright as its EXIF tag says",
    "broken_exif": "a damaged EXIF block, which is ignored",
    "stretched_shape": "one side is more than 4 times the other, so the model sees the words squashed",
    "low_resolution": "a side of the image has less than 64 pixels, so words may be unreadable",
}
KINDS = BAD_KINDS | NOTED_KINDS  # of findings, with what is wrong and, where something is done about it, what
# Bad kinds that one may train on nevertheless; without any of the others there is something to train on.
ALLOWABLE = {"duplicate_id", "duplicate_caption", "refusal", "loop", "too_small", "extreme_shape", "image_elsewhere"}
UNTRAINABLE = set(BAD_KINDS) - ALLOWABLE


@dataclass(frozen=True)
class Finding:
    """Something found about one record. `place` says where it stands: "train.json record 12", "a.jsonl line 3"."""

    kind: str
    place: str
    record_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place} (id {self.record_id!r}): {self.detail} [{self.kind}]"


class RecordFault(ValueError):
    """Why a record or an image is found at fault, with the kind of fault, and the record's text if it is not JSON."""

    def __init__(self, kind: str, detail: str, content: str | None = None):
        super().__init__(detail)
        self.kind = kind
        self.content = content


@dataclass(kw_only=True)
class RecordPolicy:
    """What becomes of records with findings; the data check and training take the same settings."""

    bad_records: Literal["error", "quarantine"] = setting(
        "bad records stop the run, or go to quarantine.jsonl and are counted", "error"
    )
    allow: list[str] = setting("kinds of findings that make no record bad, such as duplicate_id", [])
    refuse: list[str] = setting("kinds that make a record bad though they need not, such as cut_answer", [])
    max_pixels: int = setting("images with more pixels are not decoded", MAX_PIXELS, expected="at least 1")

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_settings(self)
        if both := set(self.allow) & set(self.refuse):
            raise UserError(f"{', '.join(sorted(both))}: both in --allow and in --refuse; choose one")
        # A flag without effect would leave its user believing that it had one.
        for flag, names, without_effect, anyway in (
            ("--allow", self.allow, NOTED_KINDS, "trained on"),
            ("--refuse", self.refuse, BAD_KINDS, "bad"),
        ):
            for name in names:
                if name not in KINDS:
                    there = f"there are {', '.join(KINDS)}"
                    raise UserError(f"{flag} {name}: no such kind of finding{suggest(name, KINDS)}; {there}")
                if name in without_effect:
                    raise UserError(f"{flag} {name}: such records are {anyway} anyway; leave it out")
        if impossible := [name for name in self.allow if name in UNTRAINABLE]:
            raise UserError(
                f"--allow {impossible[0]}: such a record cannot be trained on; fix it, or leave it out with "
                "--bad_records quarantine"
            )

    def is_bad(self, kind: str) -> bool:
        """Whether a finding of this kind keeps its record from training."""
        return kind in self.refuse or (kind in BAD_KINDS and kind not in self.allow)

    def severity_of(self, kind: str) -> str:
        """`bad`, or `noted` for what is trained on, counted and listed."""
        return "bad" if self.is_bad(kind) else "noted"
