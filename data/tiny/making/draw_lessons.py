"""The lessons from which small towers (`make_towers.py`) learn to read, drawn.

    python data/tiny/making/draw_lessons.py --output_dir /tmp/lessons --crowded_fields 1000 --memes 500 --seed 7

writes images/, annotations.json and alphabet.txt, the characters that can occur. What is asked about a page of letters
is its field, or its text; `meme_pages.py` says what these are. Pages come as images, or spelled out where the image
tokens would stand: that teaches a language model the order of the patches and the skipping of blanks before it has
eyes.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import draw_memes
from draw_memes import (
    DESCRIPTIONS,
    MOOD_QUESTIONS,
    NO_TEXT,
    TASKS,
    TEXT_QUESTIONS,
    draw_all,
    plan_memes,
    write_annotations,
    write_records,
)
from meme_characters import CHARACTERS, MOODS, PROPS
from meme_fonts import FontFace, find_fonts
from meme_groups import Group, draw_group, plan_group
from meme_images import Meme
from meme_lines import LineSource, list_alphabet
from meme_pages import (
    BLANK,
    MOOD_MARKS,
    PATCHES,
    SIDE,
    Page,
    RowKind,
    draw_page,
    get_source,
    plan_crowded_page,
    plan_full_page,
    plan_scene,
)

GROUP_QUESTION = "逐个说出图中角色的心情。"
FIELD_QUESTION = "逐格读出图中的文字。"
LESSONS = {
    "copies": "short texts to be said again, without a page",
    "spelled_fields": "spelled pages with 2 to 4 different letters, one in every patch: what is in each patch?",
    "spelled_texts": "spelled scenes: what is the text?",
    "spelled_moods": "spelled scenes with a figure, whose mood is marked: what is the mood?",
    "full_fields": "images with a letter in the middle of every patch: what is in each patch?",
    "crowded_fields": "images of pages with as many letters as they hold: what is in each patch?",
    "crowded_texts": "the same: what is the text?",
    "scene_fields": "images with rows of several sizes and perhaps a figure: what is in each patch?",
    "scene_texts": "the same with at most --most_letters: what is the text?",
    "group_fields": "images of 1, 4 or 9 figures: what is in each patch, moods being marked?",
    "groups": "the same: what is the mood of each?",
    "memes": "memes, with a record for each task",
}


def plan_all(arguments: argparse.Namespace) -> Iterator[tuple[list[dict], Page | Group | Meme | None]]:
    """Records, and the image to draw for them, if any."""
    rng = random.Random(arguments.seed)
    for meme in plan_memes(arguments.memes, arguments.seed, LineSource(unseen=False)):
        yield write_records(meme, arguments.tasks, rng), meme
    for lesson in LESSONS:
        if lesson != "memes":
            for number in range(getattr(arguments, lesson)):
                record, page = plan_lesson(lesson, f"{lesson}_{number:06d}", rng, arguments)
                yield [record], page


def plan_lesson(
    lesson: str, identifier: str, rng: random.Random, arguments: argparse.Namespace
) -> tuple[dict, Page | Group | None]:
    """The record of a lesson other than a meme, and its page if that is to be drawn."""
    # A field has one answer for a patch, and a spelled page is one.
    share_patches = arguments.share_patches and lesson in ("crowded_texts", "scene_texts")
    kind = RowKind(arguments.smallest, arguments.largest, arguments.words, arguments.few, share_patches)
    if lesson == "copies":
        text = kind.draw_text(rng, rng.randint(1, 16))
        return write_record(identifier, text, rng.choice(TEXT_QUESTIONS), text), None
    if lesson.startswith("group"):
        group = plan_group(identifier, rng)
        if lesson == "group_fields":
            return write_record(identifier, "<image>", FIELD_QUESTION, group.field), group
        question = GROUP_QUESTION if len(group.figures) > 1 else rng.choice(MOOD_QUESTIONS)
        return write_record(identifier, "<image>", question, group.answer), group
    is_plain = rng.random() < arguments.plain
    if lesson == "spelled_fields":
        characters = get_source().draw_characters(rng, rng.randint(2, 4))
        page = plan_full_page(identifier, rng.choices(characters, k=PATCHES**2), is_plain=True)
    elif lesson == "full_fields":
        page = plan_full_page(identifier, get_source().draw_characters(rng, PATCHES**2), is_plain)
    elif lesson.startswith("crowded"):
        page = plan_crowded_page(identifier, rng, kind, is_plain)
    else:
        most_letters = PATCHES**2 if lesson == "scene_fields" else arguments.most_letters
        page = None
        while page is None or lesson == "spelled_moods" and not page.figure:
            page = plan_scene(identifier, rng, kind, is_plain, most_letters)
    question, answer = rng.choice(TEXT_QUESTIONS), page.text or f"{NO_TEXT}。"
    if lesson.endswith("fields"):
        question, answer = FIELD_QUESTION, page.field
    elif lesson == "spelled_moods":
        question, answer = rng.choice(MOOD_QUESTIONS), page.figure[0].mood
    if lesson.startswith("spelled"):
        return write_record(identifier, page.field, question, answer), None
    return write_record(identifier, "<image>", question, answer), page


def write_record(identifier: str, page: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"{page}\n{question}"}, {"from": "gpt", "value": answer}]
    record = {"id": identifier, "conversations": turns}
    return record | ({"image": f"images/{identifier}.png"} if page == "<image>" else {})


def draw_one(job: tuple[Page | Group | Meme, int, Path, list[FontFace]]) -> None:
    page, seed, folder, faces = job
    if isinstance(page, Meme):
        draw_memes.draw_one(job)
        return
    rng = random.Random(f"{seed} {page.identifier}")
    image = draw_group(rng, page) if isinstance(page, Group) else draw_page(rng, page, faces)
    image.save(folder / f"{page.identifier}.png", compress_level=1)


def list_lesson_alphabet() -> str:
    """Every character that a lesson may need, in questions, answers and spelled pages."""
    wordings = [
        FIELD_QUESTION,
        GROUP_QUESTION,
        *TEXT_QUESTIONS,
        *MOOD_QUESTIONS,
        *(part for wording in DESCRIPTIONS for part in wording),
    ]
    names = [*MOODS, *PROPS, *CHARACTERS, *(character.unit for character in CHARACTERS.values())]
    return "".join(
        sorted({*list_alphabet(), BLANK, *MOOD_MARKS.values(), *"".join(wordings), *"".join(names)} - {*"{}"})
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw lessons in reading.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets images/ and annotations.json")
    for lesson, meaning in LESSONS.items():
        parser.add_argument(f"--{lesson}", type=int, default=0, help=f"number of {meaning}")
    parser.add_argument("--smallest", type=float, default=14, help="smallest letters of pages, pixels")
    parser.add_argument("--largest", type=float, default=36, help="largest letters of pages, pixels")
    parser.add_argument("--most_letters", type=int, default=16, help="in a scene, unless its field is asked for")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="records for each meme")
    parser.add_argument("--words", type=float, default=0.5, help="share of a page's rows made of words, not characters")
    parser.add_argument(
        "--few", type=float, default=0, help="share of a page's rows in which two or three characters keep coming again"
    )
    parser.add_argument("--share_patches", action="store_true", help="texts may have several letters in a patch")
    parser.add_argument("--plain", type=float, default=0, help="share of pages dark on white, with nothing worn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="draw with N processes")
    arguments = parser.parse_args(argv)
    if not any(getattr(arguments, lesson) for lesson in LESSONS):
        parser.error("no lesson is asked for; give at least one of " + ", ".join(f"--{lesson}" for lesson in LESSONS))
    for name in LESSONS:
        if getattr(arguments, name) < 0:
            parser.error(f"--{name} must not be negative")
    if arguments.processes < 1:
        parser.error("--processes must be at least 1")
    if arguments.most_letters < 1:
        parser.error("--most_letters must be at least 1")
    for name in ("words", "few", "plain"):
        if not 0 <= getattr(arguments, name) <= 1:
            parser.error(f"--{name} must be 0 to 1")
    if not 4 <= arguments.smallest <= arguments.largest <= SIDE:
        parser.error(f"--smallest and --largest must be 4 to {SIDE}, the smallest not above the largest")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    images = arguments.output_dir / "images"
    if images.is_dir() and any(images.iterdir()):
        print(f"error: {images} is not empty; choose another --output_dir.", file=sys.stderr)
        return 2
    try:
        faces = find_fonts([], list_alphabet())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images.mkdir(parents=True, exist_ok=True)
    records, jobs = [], []
    for lessons, page in plan_all(arguments):
        records += lessons
        if page:
            jobs.append((page, arguments.seed, images, faces))
    draw_all(draw_one, jobs, arguments.processes)
    write_annotations(arguments.output_dir, records)
    (arguments.output_dir / "alphabet.txt").write_text(list_lesson_alphabet() + "\n", encoding="utf-8")
    print(f"Drew {len(jobs)} images into {images}, wrote {len(records)} lessons; fonts found: {len(faces)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
