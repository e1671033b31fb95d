"""Pages of text: images of 160 x 160 pixels full of letters, from which a model learns more of them than from memes.

A page knows the place of each of its letters. What is asked is its field, what stands at each of the tower's 10 x 10
patches, row by row: the letter whose middle lies there, the mark of a figure's mood, or BLANK. Answer and patches are
then in the same order, and a letter or mood is recognised where it stands.
"""

import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meme_characters import MOODS
from meme_fonts import FontFace, load_font
from meme_images import OVERSIZE, Box, Meme, choose_ground, choose_style, draw_background, wear_out
from meme_lines import LineSource
from PIL import Image, ImageDraw

SIDE = 160  # pixels
PATCHES = 10  # a side
BLANK = "□"
MOOD_MARKS = dict(zip(MOODS, "①②③④⑤⑥⑦⑧⑨⑩", strict=True))  # a mood in one character, and one that no line has


@dataclass(frozen=True)
class Letter:
    """A character, its middle and its size in pixels."""

    character: str
    x: float
    y: float
    size: float

    @property
    def patch(self) -> int:
        return int(self.y * PATCHES / SIDE) * PATCHES + int(self.x * PATCHES / SIDE)


def mark_figure(meme: Meme, box: Box) -> Letter:
    """The mark of a figure's mood, in the middle of the figure's box."""
    left, top, right, bottom = box
    return Letter(MOOD_MARKS[meme.mood], (left + right) / 2, (top + bottom) / 2, bottom - top)


def write_field(letters: Iterable[Letter]) -> str:
    """What stands at each patch, row by row."""
    field = [BLANK] * PATCHES**2
    for letter in letters:
        field[letter.patch] = letter.character
    return "".join(field)


@dataclass(frozen=True)
class Page:
    """Letters in reading order, at most one in a patch."""

    identifier: str
    letters: list[Letter]
    is_plain: bool  # dark on white, nothing worn

    @property
    def field(self) -> str:
        return write_field(self.letters)


@functools.cache
def get_source() -> LineSource:
    return LineSource(unseen=False)


@dataclass(frozen=True)
class RowKind:
    """How rows of letters are drawn.

    Args:
        smallest, largest: letter sizes in pixels.
        words: share of the rows that are made of words; the rest are characters by chance.
    """

    smallest: float
    largest: float
    words: float

    def draw_text(self, rng: random.Random, length: int) -> str:
        if rng.random() >= self.words:
            return get_source().draw_characters(rng, length)
        row = ""
        while len(row) < length:
            row += get_source().compose(rng)
        return row[:length]

    def draw_size(self, rng: random.Random) -> float:
        """A letter size in pixels, each doubling as likely as the others."""
        return math.exp(rng.uniform(math.log(self.smallest), math.log(self.largest)))


def plan_full_page(identifier: str, characters: Sequence[str], is_plain: bool) -> Page:
    """A letter in the middle of every patch."""
    patch = SIDE / PATCHES
    middles = [(number + 0.5) * patch for number in range(PATCHES)]
    places = [(x, y) for y in middles for x in middles]
    letters = [Letter(character, x, y, patch) for character, (x, y) in zip(characters, places, strict=True)]
    return Page(identifier, letters, is_plain)


def plan_crowded_page(identifier: str, rng: random.Random, kind: RowKind, is_plain: bool) -> Page:
    """Rows of letters of one size, as many as fit: the more, the more is learned from a page."""
    size = kind.draw_size(rng)
    step, row_step = (size * rng.choice((1, 1, rng.uniform(1, 1.2))) for _ in range(2))
    gaps = rng.choice((0, 0, 0, 0.1))  # share of places left out
    row_length, row_count = (int((SIDE - size) / length) + 1 for length in (step, row_step))
    top = rng.uniform(0, SIDE - size - row_step * (row_count - 1))
    first: dict[int, Letter] = {}  # of each patch; a field has room for no other
    for number in range(row_count):
        left = rng.uniform(0, SIDE - size - step * (row_length - 1))
        for place, character in enumerate(kind.draw_text(rng, row_length)):
            letter = Letter(character, left + size / 2 + step * place, top + size / 2 + row_step * number, size)
            if rng.random() >= gaps:
                first.setdefault(letter.patch, letter)
    return Page(identifier, list(first.values()), is_plain)


def draw_page(rng: random.Random, page: Page, faces: list[FontFace]) -> Image.Image:
    """The page as an image of 160 x 160 pixels."""
    side = SIDE * OVERSIZE
    ground = "white" if page.is_plain else choose_ground(rng, "page")
    image = draw_background(rng, (side, side), ground)
    face, style = choose_style(rng, ground, faces)
    canvas = ImageDraw.Draw(image)
    for letter in page.letters:
        font = load_font(face, round(letter.size * 0.95 * OVERSIZE))
        stroke = round(letter.size * OVERSIZE * style["weight"])
        place = (letter.x * OVERSIZE, letter.y * OVERSIZE)
        canvas.text(
            place, letter.character, style["fill"], font, "mm", stroke_width=stroke, stroke_fill=style["stroke"]
        )
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return image if page.is_plain else wear_out(rng, image)
