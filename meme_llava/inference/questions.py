"""Questions about images, of files or of an annotation file, and what is predicted for them, whoever does."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from meme_llava.dataset.check import CheckedData
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER
from meme_llava.dataset.findings import KINDS
from meme_llava.dataset.image_files import describe_left_out, find_images
from meme_llava.dataset.images import MAX_PIXELS, resolve_image_path
from meme_llava.dataset.inspection import ImageFacts, check_image, inspect_images, normalise_text
from meme_llava.dataset.records import Record, read_quarantined_places, read_records
from meme_llava.dataset.user_files import describe_near_name
from meme_llava.errors import UserError, count, list_by_cause


@dataclass(frozen=True)
class Question:
    """What to ask about one image, and the reference answer where it is known."""

    image: Path
    text: str
    reference: str | None = None
    system: str | None = None
    text_in_image: str | None = None  # None where it is not known, "" where there is none
    task: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model, a server or a text recogniser says to a question; None stands for what is not known."""

    question: Question | None  # None in a chat, which keeps its questions itself
    text: str
    tokens: int | None = None  # length of the text
    stopped: bool | None = None  # whether it ended by itself and was not cut off at the limit
    problem: str | None = None  # why there is none, as "refusal: …"; the text is what came in its place, or empty

    def to_line(self, image_folder: Path) -> dict:
        """The line of predictions.jsonl; the image's path is relative to `image_folder`."""
        asked = self.question
        return {
            "image": str(asked.image.relative_to(image_folder)),
            "task": asked.task,
            "question": asked.text,
            "answer": self.text,
            "reference": asked.reference,
            "text": asked.text_in_image,
            "tokens": self.tokens,
            "stopped": self.stopped,
            "problem": self.problem,
        }

    @classmethod
    def of_line(cls, line: dict) -> Self:
        """The prediction in a line of predictions.jsonl."""
        asked = Question(
            Path(line["image"]), line["question"], line["reference"], text_in_image=line["text"], task=line["task"]
        )
        return cls(asked, line["answer"], line["tokens"], line["stopped"], line["problem"])


def list_file_questions(paths: list[Path], text: str) -> list[Question]:
    """The same question about every image of files and folders (not their subfolders). What else lies in these is
    counted on standard error. Raises UserError where there is no image."""
    images = []
    for path in paths:
        if path.is_dir():
            found, left_out = find_images(path, subfolders=False)
            others = describe_left_out(left_out)
            if not found:
                raise UserError(f"{path}: holds no image ({others or 'nothing'})")
            if others:
                print(f"left out of {path}: {others}", file=sys.stderr)
            images += found
        elif path.exists():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder{describe_near_name(path, {})}")
    return [Question(image, text) for image in images]


def find_question(record: Record, image_folder: Path) -> Question | None:
    """A record's first question with its reference answer, if the record begins with one image and a line break.

    Raises RecordFault where the image's path leaves the image folder.
    """
    system = record.turns[0].text if record.turns[0].role == "system" else None
    user, reference = [turn for turn in record.turns if turn.role != "system"][:2]
    text = user.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    if text == user.text or IMAGE_PLACEHOLDER in text:
        return None
    image = resolve_image_path(record.images[0], image_folder)
    return Question(image, text, reference.text.strip(), system, record.text, record.task)


def list_record_questions(
    annotations: Path, image_folder: Path, limit: int | None, quarantine: Path | None = None
) -> list[Question]:
    """The first question of every record that begins with one image, with its reference answer.

    Malformed records and those of `quarantine` are counted on standard error. Raises UserError where no record begins
    with one image, or a path leaves the image folder.
    """
    records, malformed = read_records(annotations)
    if malformed:
        print(f"not asked: {count(len(malformed), 'malformed record')}, e.g. {malformed[0]}", file=sys.stderr)
    if quarantine is not None:
        places = read_quarantined_places(quarantine)
        asked = [record for record in records if record.place not in places]
        print(f"not asked: {count(len(records) - len(asked), 'quarantined record')}", file=sys.stderr)
        records = asked
    questions = []
    for record in records[:limit]:
        try:
            question = find_question(record, image_folder)
        except ValueError as error:
            raise UserError(f"{record.place} (id {record.record_id!r}): {error}") from error
        questions += [] if question is None else [question]
    if not questions:
        raise UserError(f"{annotations}: no record begins with {IMAGE_PLACEHOLDER}, a line break and a question")
    if left_out := len(records[:limit]) - len(questions):
        print(f"not asked: {count(left_out, 'record')} without one image at the beginning", file=sys.stderr)
    return questions


def check_images(questions: Sequence[Question], annotations: Path, image_folder: Path) -> dict[Path, ImageFacts]:
    """Decode every image. Raises UserError with those that no model can be shown, by cause."""
    found = inspect_images([question.image for question in questions], MAX_PIXELS)
    listings = {}
    faults = [check_image(path, facts, listings) for path, facts in found.items() if facts.fault is not None]
    if bad := [(f"{KINDS[kind]} [{kind}]", detail) for [(kind, detail)] in faults]:
        advice = f"give the right --image_folder ({image_folder}; EVAL_IMAGE_FOLDER in run.sh)."
        raise UserError(
            f"{annotations}: {len(bad)} of {count(len(found), 'image')} cannot be read:\n"
            f"{list_by_cause('image', bad)}\nFix them or leave out their records, or {advice}"
        )
    return found


def warn_of_trained(
    annotations: Path, questions: Sequence[Question], facts: Mapping[Path, ImageFacts], training: CheckedData
) -> dict[str, int]:
    """Say on standard error how much of an evaluation is trained on: images, by their contents, and answers about them.

    Args:
        facts: of the questions' images, decoded as those of `training` were.

    Returns:
        how many different images are trained on, and to how many questions the answer is, too; empty without any.
    """
    taught = {
        (training.facts[path].sha256, normalise_text(turn.text) or turn.text)
        for one in training.usable
        for path in one.image_paths
        for turn in one.record.turns
        if turn.role == "assistant"
    }
    asked = [(facts[one.image].sha256, normalise_text(one.reference) or one.reference) for one in questions]
    images, answers = {image for image, _ in asked}, sum(one in taught for one in asked)
    shared = len(images & {image for image, _ in taught})
    if not shared:
        return {}
    print(
        f"warning: {shared:,} of {count(len(images), 'image')} of {annotations} are trained on, {answers:,} of "
        f"{count(len(asked), 'answer')} too; leave these records out of one of both files, or the scores after "
        "training say too much",
        file=sys.stderr,
    )
    return {"images_trained_on": shared, "answers_trained_on": answers}
