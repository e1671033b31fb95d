"""Lessons in reading, drawn: memes, and pages of letters or figures, as the sample data have them.

    python data/tiny/making/draw_lessons.py --output_dir /tmp/lessons --crowded_fields 1000 --memes 500 --seed 7

writes images/, annotations.json and alphabet.txt, the characters that can occur. What is asked about a page is its
field; `meme_pages.py` says what that is.
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
)

FIELD_QUESTION = "逐格读出图中的文字。"
LESSONS = {
    "full_fields": "images with a letter in the middle of every patch: what is in each patch?",
    "crowded_fields": "images of pages with as many letters as they hold: what is in each patch?",
    "group_fields": "images of 1, 4 or 9 figures: what is in each patch, moods being marked?",
    "memes": "memes, with a record for each task",
}


def plan_all(arguments: argparse.Namespace) -> Iterator[tuple[list[dict], Page | Group | Meme]]:
    """Records, and the image to draw for them."""
    rng = random.Random(arguments.seed)
    for meme in plan_memes(arguments.memes, arguments.seed, LineSource(unseen=False)):
        yield write_records(meme, arguments.tasks, rng), meme
    for lesson in LESSONS:
        if lesson != "memes":
            for number in range(getattr(arguments, lesson)):
                page = plan_page(lesson, f"{lesson}_{number:06d}", rng, arguments)
                yield [write_record(page)], page


def plan_page(lesson: str, identifier: str, rng: random.Random, arguments: argparse.Namespace) -> Page | Group:
    """The page of a lesson other than a meme."""
    if lesson == "group_fields":
        return plan_group(identifier, rng)
    is_plain = rng.random() < arguments.plain
    if lesson == "full_fields":
        page = plan_full_page(identifier, get_source().draw_characters(rng, PATCHES**2), is_plain)
    else:
        kind = RowKind(arguments.smallest, arguments.largest, arguments.words)
        page = plan_crowded_page(identifier, rng, kind, is_plain)
    # A question that is not asked. Without this draw the seed of the sample data would give other pages.
    rng.choice(TEXT_QUESTIONS)
    return page


def write_record(page: Page | Group) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{FIELD_QUESTION}"}, {"from": "gpt", "value": page.field}]
    return {"id": page.identifier, "conversations": turns, "image": f"images/{page.identifier}.png"}


def draw_one(job: tuple[Page | Group | Meme, int, Path, list[FontFace]]) -> None:
    page, seed, folder, faces = job
    if isinstance(page, Meme):
        draw_memes.draw_one(job)
        return
    rng = random.Random(f"{seed} {page.identifier}")
    image = draw_group(rng, page) if isinstance(page, Group) else draw_page(rng, page, faces)
    image.save(folder / f"{page.identifier}.png", compress_level=1)


def list_lesson_alphabet() -> str:
    """Every character that a lesson may need, in questions and answers."""
    wordings = [
        FIELD_QUESTION,
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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="records for each meme")
    parser.add_argument("--words", type=float, default=0.5, help="share of a page's rows made of words, not characters")
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
    for name in ("words", "plain"):
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
        jobs.append((page, arguments.seed, images, faces))
    draw_all(draw_one, jobs, arguments.processes)
    write_annotations(arguments.output_dir, records)
    (arguments.output_dir / "alphabet.txt").write_text(list_lesson_alphabet() + "\n", encoding="utf-8")
    print(f"Drew {len(jobs)} images into {images}, wrote {len(records)} lessons; fonts found: {len(faces)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
