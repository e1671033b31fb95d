"""What can be wrong or unusual about a record, by name, and which of it keeps a record from training.

Data preparation, the data check and training speak of the same kinds. Nothing about how they are found.
"""

import difflib
from dataclasses import dataclass
from enum import StrEnum

from meme_llava.errors import UserError


class Severity(StrEnum):
    """BAD records stop the run or are quarantined; NOTED ones are trained on, counted and listed."""

    BAD = "bad"
    NOTED = "noted"


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `meaning` says what is wrong and, where something is done about it, what."""

    name: str
    severity: Severity
    meaning: str


_BAD = {
    # The record's form.
    "not_json": "the line is not JSON",
    "malformed": "the record does not have the form of data/README.md",
    "bad_turn_order": "the turns do not alternate human, gpt and end with gpt",
    "empty_text": "a question or an answer is empty",
    "half_character": "a text holds half a character (a cut emoji)",
    "placeholder_mismatch": "the number of <image> differs from the number of images",
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
    "too_many_pixels": "the image has more pixels than the limit",
    "too_small": "a side of the image has less than 4 pixels",
    "extreme_shape": "one side of the image is more than 50 times the other",
}
_NOTED = {
    "cut_answer": "the last answer is cut to model_max_length",
    "control_text": "a text spells a control token; it is trained on as plain text",
    "text_disagrees": "an answer holds less than half of the characters known to stand in the image",
    "duplicate_image": "another file has the same bytes",
    "wrong_extension": "the file's name does not end as its format's names do; the contents decide",
    "animated": "an animation, of which the first frame is used",
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
KINDS = {name: Kind(name, Severity.BAD, meaning) for name, meaning in _BAD.items()} | {
    name: Kind(name, Severity.NOTED, meaning) for name, meaning in _NOTED.items()
}


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


@dataclass(frozen=True)
class Severities:
    """Which kinds are bad in one run: the table above, changed by what the user allows and refuses.

    Raises:
        UserError: an unknown kind, or one that is both allowed and refused.
    """

    allowed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, names in (("--allow", self.allowed), ("--refuse", self.refused)):
            for name in names:
                if name not in KINDS:
                    near = difflib.get_close_matches(name, KINDS, n=1)
                    hint = f" (did you mean {near[0]}?)" if near else ""
                    raise UserError(f"{flag} {name}: no such kind of finding{hint}; there are {', '.join(KINDS)}")
        if both := set(self.allowed) & set(self.refused):
            raise UserError(f"{', '.join(sorted(both))}: both in --allow and in --refuse; choose one")
        # A flag without effect would leave its user believing that it had one.
        if idle := [name for name in self.allowed if KINDS[name].severity is Severity.NOTED]:
            raise UserError(f"--allow {idle[0]}: such records are trained on anyway; leave it out")
        if idle := [name for name in self.refused if KINDS[name].severity is Severity.BAD]:
            raise UserError(f"--refuse {idle[0]}: such records are bad anyway; leave it out")
        if impossible := [name for name in self.allowed if name in UNTRAINABLE]:
            raise UserError(
                f"--allow {impossible[0]}: such a record cannot be trained on; fix it, or leave it out with "
                "--bad_records quarantine"
            )

    def severity_of(self, kind: str) -> Severity:
        """The severity of a kind in this run."""
        if kind in self.refused:
            return Severity.BAD
        return Severity.NOTED if kind in self.allowed else KINDS[kind].severity

    def is_bad(self, kind: str) -> bool:
        """Whether a finding of this kind keeps its record from training."""
        return self.severity_of(kind) is Severity.BAD


# Bad kinds that one may train on nevertheless; without any of the others there is something to train on.
ALLOWABLE = {"duplicate_id", "duplicate_caption", "refusal", "loop", "too_small", "extreme_shape"}
UNTRAINABLE = set(_BAD) - ALLOWABLE
