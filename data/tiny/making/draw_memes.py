"""Memes of our own without end: sticker images with a short Chinese line, and the reference answers about each.

    python data/tiny/making/draw_memes.py --output_dir /tmp/memes --count 1000 --seed 7

writes images/ and annotations.json. `meme_lines.py` knows what memes say, `meme_characters.py` how the figures look,
`meme_images.py` how both make an image, `meme_fonts.py` which fonts there are. This file deals them out and knows
the questions and answers. The same seed, fonts, numpy and Pillow version give the same files.
"""

import argparse
import json
import multiprocessing
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from meme_characters import CHARACTERS, MOODS, PROPS
from meme_fonts import FontFace, find_fonts
from meme_images import Meme, draw_meme, save_image
from meme_lines import LineSource, list_alphabet

TEXTLESS_SHARE = 10  # one meme in N carries no words
FORMATS = ("jpeg",) * 16 + ("png", "palette", "transparent")
NO_TEXT = "图片里没有文字"
TASKS = ("text", "mood", "description")

TEXT_QUESTIONS = ("图片里写了什么字？", "请读出图中的文字。", "这张表情包上的文字是什么？")
MOOD_QUESTIONS = ("这张表情包是什么心情？", "图里的角色心情怎么样？", "这张图表达了什么情绪？")
# Question, answer, answer without words. `who` is the figure with its counting word, `wears` begins with a comma or is
# empty.
DESCRIPTIONS = (
    (
        "这张表情包写了什么，是什么意思？",
        "图中一{who}{wears}，看起来很{mood}，配文“{text}”，表达{mood}的心情。",
        "图中一{who}{wears}，看起来很{mood}，图片里没有文字，表达{mood}的心情。",
    ),
    (
        "请描述一下这张表情包。",
        "这是一张{name}的表情包{wears}，写着“{text}”，{name}的表情是{mood}。",
        "这是一张{name}的表情包{wears}，图片里没有文字，{name}的表情是{mood}。",
    ),
    (
        "图里有什么文字？画的是谁？",
        "文字是“{text}”，画的是一{who}{wears}，它很{mood}。",
        "图片里没有文字，画的是一{who}{wears}，它很{mood}。",
    ),
    (
        "这张图想表达什么？",
        "{name}很{mood}{wears}，它说“{text}”，适合在{mood}的时候用。",
        "{name}很{mood}{wears}，图片里没有文字，适合在{mood}的时候用。",
    ),
    (
        "介绍一下这张图片。",
        "画面里有一{who}{wears}，文字“{text}”和它的表情都透着{mood}。",
        "画面里有一{who}{wears}，图片里没有文字，它的表情透着{mood}。",
    ),
)


# ---- Planning ----


def plan_memes(count: int, seed: int, lines: LineSource) -> Iterator[Meme]:
    """Moods, characters and formats dealt out evenly, each meme with a line of its own."""
    rng = random.Random(seed)
    deal = [dealer(rng, list(values)) for values in (CHARACTERS, MOODS, FORMATS)]
    for index in range(count):
        character, mood, file_format = (next(values) for values in deal)
        line = "" if index % TEXTLESS_SHARE == TEXTLESS_SHARE - 1 else lines.next_line(rng, mood)
        prop = rng.choice(list(PROPS)) if rng.random() < 0.3 else None
        yield Meme(f"meme_{index:06d}", character, mood, prop, line, file_format)


def dealer(rng: random.Random, values: list) -> Iterator:
    """The values in a random order again and again, each as often as the others."""
    while True:
        rng.shuffle(values)
        yield from values


# ---- Questions and answers ----


def write_records(meme: Meme, tasks: list[str], rng: random.Random) -> list[dict]:
    """A record for each task."""
    reference = {"text": meme.text, "character": meme.character, "mood": meme.mood, "prop": meme.prop}
    records = []
    for task in tasks:
        question, answer = write_turns(meme, task, rng)
        records.append(
            {
                "id": f"{meme.identifier}_{task}",
                "image": f"images/{meme.file_name}",
                "task": task,
                **reference,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    return records


def write_turns(meme: Meme, task: str, rng: random.Random) -> tuple[str, str]:
    if task == "text":
        return rng.choice(TEXT_QUESTIONS), meme.text or f"{NO_TEXT}。"
    if task == "mood":
        return rng.choice(MOOD_QUESTIONS), meme.mood
    question, with_text, without_text = rng.choice(DESCRIPTIONS)
    answer = (with_text if meme.text else without_text).format(
        who=CHARACTERS[meme.character].unit + meme.character,
        name=meme.character,
        wears=f"，{meme.prop}" if meme.prop else "",
        mood=meme.mood,
        text=meme.text,
    )
    return question, answer


# ---- Drawing ----


def draw_one(job: tuple[Meme, int, Path, list[FontFace]]) -> None:
    """Draw and save one image; everything about it follows from seed and identifier."""
    meme, seed, folder, faces = job
    rng = random.Random(f"{seed} {meme.identifier}")
    save_image(rng, draw_meme(rng, meme, faces), meme, folder / meme.file_name)


def draw_all(draw: Callable[[tuple], None], jobs: Iterable[tuple], processes: int) -> None:
    if processes == 1:
        for job in jobs:
            draw(job)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for _ in pool.imap_unordered(draw, jobs, chunksize=100):
            pass


def write_annotations(folder: Path, records: list[dict]) -> None:
    text = json.dumps(records, ensure_ascii=False, indent=1)
    (folder / "annotations.json").write_text(text + "\n", encoding="utf-8")


# ---- Command line ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw memes and their annotations.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="gets images/ and annotations.json")
    parser.add_argument("--count", type=int, default=400, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lines", choices=("seen", "unseen"), default="seen", help="unseen: no line that seen ever has"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="records for each meme")
    parser.add_argument("--processes", type=int, default=1, help="draw with N processes")
    parser.add_argument(
        "--font",
        type=Path,
        action="append",
        default=[],
        help="a font file to use instead of the known ones; may be given several times",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the memes that are already there")
    arguments = parser.parse_args(argv)
    for name in ("count", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    images = arguments.output_dir / "images"
    if images.is_dir() and any(images.iterdir()) and not arguments.overwrite:
        print(f"error: {images} is not empty; give --overwrite to replace the memes in it.", file=sys.stderr)
        return 2
    try:
        faces = find_fonts(arguments.font, list_alphabet())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images.mkdir(parents=True, exist_ok=True)
    for path in images.iterdir():
        # A meme of an earlier run may have another ending now, and would stay as a stray.
        if re.fullmatch(r"meme_\d{6}\.(jpg|png)", path.name):
            path.unlink()
    seed = arguments.seed
    memes = list(plan_memes(arguments.count, seed, LineSource(arguments.lines == "unseen")))
    draw_all(draw_one, ((meme, seed, images, faces) for meme in memes), arguments.processes)
    rng = random.Random(f"{seed} questions")
    records = [record for meme in memes for record in write_records(meme, arguments.tasks, rng)]
    write_annotations(arguments.output_dir, records)
    print(f"Drew {len(memes)} memes into {images}; fonts found: {len(faces)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
