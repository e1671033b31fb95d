"""Knows pages of text: pictures full of characters, from which a model learns to read before it sees memes.

A page teaches more characters per picture than a meme. On level 0 a hundred small ones stand in a plain grid, one in
every patch of a tower with 10 x 10 patches: nothing has to be put together from several patches, and the place of a
character in the answer is that of its patch. Level 1 is a regular grid of larger ones; level 2 moves and resizes the
grid; level 3 is a few rows of any length, anywhere.
"""

import functools
import random

from meme_fonts import FontFace, load_font
from meme_lines import LineSource
from meme_pictures import (
    LINE_HEIGHT,
    Meme,
    choose_ground,
    choose_style,
    draw_background,
    draw_rows,
    measure_row,
    wear_out,
)
from PIL import Image, ImageDraw

SIDE = 160  # pixels
GRID_SIDES = {0: (10,), 1: (5,), 2: (3, 4, 5, 6, 7)}  # characters a side, by level


@functools.cache
def _get_source() -> LineSource:
    return LineSource(unseen=False)


def plan_page(identifier: str, rng: random.Random, level: int) -> Meme:
    """A page's rows: on the first levels characters in a square, later words, too."""
    source = _get_source()
    if level < 3:
        side = rng.choice(GRID_SIDES[level])
        rows = [source.draw_characters(rng, side) for _ in range(side)]
    else:
        longest = rng.randint(1, 11)
        rows = [draw_row(source, rng, rng.choice((longest, rng.randint(1, longest)))) for _ in range(rng.randint(1, 5))]
    return Meme(identifier, None, None, None, "\n".join(rows), "jpeg")


def draw_row(source: LineSource, rng: random.Random, length: int) -> str:
    """Characters or words, cut to `length`."""
    if rng.random() < 0.5:
        return source.draw_characters(rng, length)
    row = ""
    while len(row) < length:
        row += source.compose(rng)
    return row[:length]


def draw_page(rng: random.Random, page: Meme, faces: list[FontFace], level: int) -> Image.Image:
    """The page as a picture of 160 x 160 pixels."""
    rows = page.line.split("\n")
    ground = "white" if level == 0 else choose_ground(rng, "words")
    picture = draw_background(rng, (SIDE, SIDE), ground)
    face, style = choose_style(rng, ground, faces)
    if level < 3:
        draw_grid(rng, picture, rows, face, style, 1 if level == 2 else 0)
    else:
        largest = min(SIDE * 0.97 / max(map(measure_row, rows)), SIDE * 0.97 / (LINE_HEIGHT * len(rows)), 60)
        words = draw_rows(rows, face, max(13, largest * rng.uniform(0.5, 1)), style, rng.choice((0, 0.5)))
        if rng.random() < 0.2:
            words = words.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
        words.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        place = (rng.randint(0, SIDE - words.width), rng.randint(0, SIDE - words.height))
        picture.alpha_composite(words, place)
    picture = picture.convert("RGB")
    return picture if level == 0 else wear_out(rng, picture)


def draw_grid(
    rng: random.Random, picture: Image.Image, rows: list[str], face: FontFace, style: dict, irregularity: float
) -> None:
    """Every character in the middle of its cell, or the whole grid moved and made smaller."""
    cell = SIDE / len(rows)
    size = cell * 0.95 * rng.uniform(1 - 0.3 * irregularity, 1)
    font, stroke = load_font(face, round(size)), round(size * style["weight"])
    free = SIDE - size * len(rows)
    step = size + free / len(rows) * (1 - irregularity * rng.random())
    left, top = (irregularity * rng.random() * (SIDE - step * len(rows)) for _ in range(2))
    canvas = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        for place, character in enumerate(row):
            middle = (left + step * (place + 0.5), top + step * (number + 0.5))
            canvas.text(middle, character, style["fill"], font, "mm", stroke_width=stroke, stroke_fill=style["stroke"])
