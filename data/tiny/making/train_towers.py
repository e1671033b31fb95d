"""Teaches two small towers to read some thousand characters, from random weights, on a GPU in minutes.

    python data/tiny/making/prepare_towers.py --output_dir output/towers/start
    python data/tiny/making/train_towers.py --start output/towers/start --output_dir output/towers/work
    python data/tiny/making/write_towers.py --start output/towers/start --export output/towers/work/export \
        --output_dir output/towers/new

Five stages: the vision tower learns to name what stands in every patch, then to show it to those who have no softmax;
the language model learns to read from perfectly seen patches, then from those of the vision tower, behind a pool of
projectors that are drawn anew again and again; in the end both learn. The same command goes on where an interrupted one
stood.
"""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from course import Course
from exam import examine
from glyphs import read_characters
from lessons import Teacher
from networks import Sizes
from studio import MemeDrawer, Studio, load_material, to_device
from texts import Alphabet, RowWriter, read_words

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The signals that ask the course to stop, which it does between two steps."""
    stops: list[int] = []
    before = {number: signal.signal(number, lambda number, _: stops.append(number)) for number in STOPPING}
    yield stops
    for number, handler in before.items():
        signal.signal(number, handler)


def run(course: Course, exam_studio: Studio, drawer: MemeDrawer | None, started: float, stops: list[int]) -> None:
    """All stages from where the course stands, until they are done, the time is over, or a signal stops them."""
    settings = course.settings
    stages = list(course.stages)
    last_save = time.time()
    while True:
        if course.progress >= 1:
            report_exam(course, exam_studio)
            if course.stage == stages[-1]:
                break
            course.begin(stages[stages.index(course.stage) + 1])
            continue
        if course.stage in ("read", "joint") and course.memes is None and drawer:
            course.memes = drawer.collect(settings.device)
            print(f"drawn memes: {len(course.memes.texts)}", flush=True)
        before, progress = time.time(), course.progress
        course.step(progress)
        course.optimizer.step(course.share(progress))
        course.count += 1
        now = time.time()
        course.spent += now - before
        if course.count % settings.note_every == 0:
            report(course, now - started)
        if course.count % settings.exam_every == 0:
            report_exam(course, exam_studio)
        is_over = now - started > settings.seconds or bool(stops)
        if is_over or now - last_save > settings.save_every:
            save(course)
            last_save = time.time()
        if is_over:
            print("stopped; the same command goes on from here", flush=True)
            return
    save(course)


def save(course: Course) -> None:
    """A checkpoint, whole or not at all, and the export."""
    path = course.settings.output_dir / "checkpoint.pt"
    torch.save(course.state(), path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    course.export(course.settings.export_dir)


def report(course: Course, seconds: float) -> None:
    """The means of what was noted since the last report; waits for the device."""
    figures = "  ".join(f"{name} {torch.stack(values).mean():.4f}" for name, values in course.figures.items())
    pages = course.count / max(course.spent, 1e-9)
    print(
        f"{seconds:6.0f} s  {course.stage} {course.count} ({course.progress:.0%}, {pages:.2f} steps/s)  {figures}",
        flush=True,
    )
    course.figures = {}


def report_exam(course: Course, studio: Studio) -> None:
    with torch.no_grad():
        found = examine(course, studio)
    print("        exam  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach two small towers to read.", allow_abbrev=False)
    parser.add_argument("--start", type=Path, required=True, help="what prepare_towers.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets material, checkpoint and export")
    parser.add_argument("--export_dir", type=Path, help="gets the weights in float16; OUTPUT_DIR/export by default")
    parser.add_argument("--fonts", type=Path, help="folder of font files, instead of the known ones that are installed")
    parser.add_argument("--words", type=Path, help="a word and its count a line, such as jieba's dict.txt")
    parser.add_argument("--photos", type=Path, help="folder of photographs without text")
    parser.add_argument("--vision_steps", type=int, default=2500)
    parser.add_argument("--lookup_steps", type=int, default=600)
    parser.add_argument("--language_steps", type=int, default=1500)
    parser.add_argument("--read_steps", type=int, default=2000)
    parser.add_argument("--joint_steps", type=int, default=1000)
    parser.add_argument(
        "--stage_seconds", type=float, nargs=5, help="of the five stages, instead of their steps; not repeatable"
    )
    parser.add_argument("--batch", type=int, default=512, help="pages a vision step")
    parser.add_argument("--language_batch", type=int, default=512)
    parser.add_argument("--joint_batch", type=int, default=512, help="of the read and the joint stage")
    parser.add_argument("--uses", type=int, default=1, help="how often a drawn page is learned from")
    parser.add_argument(
        "--crowded", action="store_true", help="begin with half of the vision tower's pages full of letters"
    )
    parser.add_argument("--projectors", type=int, default=8)
    parser.add_argument("--life", type=int, default=400, help="steps after which a projector is drawn anew")
    parser.add_argument("--projector_rate", type=float, default=2e-3)
    parser.add_argument("--reading_weight", type=float, default=0.3, help="of the heads' loss in the joint stage")
    parser.add_argument("--rows", type=int, default=400_000, help="rows of text")
    parser.add_argument("--images", type=int, default=2000, help="images of each kind of scenery")
    parser.add_argument("--memes", type=int, default=6400, help="drawn memes; 0 for none")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop in time, with a checkpoint")
    parser.add_argument("--save_every", type=float, default=120, help="seconds")
    parser.add_argument("--note_every", type=int, default=50, help="steps")
    parser.add_argument("--exam_every", type=int, default=500, help="steps")
    parser.add_argument("--exam_pages", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="that draw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", default=torch.cuda.is_available())
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON of networks.Sizes, to try small ones")
    settings = parser.parse_args(argv)
    settings.export_dir = settings.export_dir or settings.output_dir / "export"
    return settings


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    settings = parse_arguments(argv)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    alphabet = Alphabet(read_characters(settings.start / "characters.txt"))
    writer = RowWriter(alphabet, read_words(settings.words, alphabet), settings.seed)
    material = load_material(settings, writer)
    drawer = None
    if settings.memes:
        drawer = MemeDrawer(writer, settings)
    print(f"{time.time() - started:6.0f} s  material is there", flush=True)
    atlas, scenery = (to_device(part, settings.device) for part in (material.atlas, material.scenery))
    banks = [to_device(bank, settings.device) for bank in (material.bank, material.exam_bank)]
    studio, exam_studio = (
        Studio(alphabet, atlas, bank, scenery, seed, settings.device)
        for bank, seed in zip(banks, (settings.seed, 10_000), strict=True)
    )
    teacher = Teacher(settings.start / "tables.json", settings.device)
    sizes = Sizes(**{"vocabulary": teacher.vocabulary, **settings.sizes})
    course = Course(settings, sizes, studio, teacher)
    checkpoint = settings.output_dir / "checkpoint.pt"
    if checkpoint.is_file():
        course.restore(torch.load(checkpoint, map_location=settings.device, weights_only=True))
    else:
        course.begin("vision")
    with caught_signals() as stops:
        run(course, exam_studio, drawer, started, stops)


if __name__ == "__main__":
    main()
