"""Pages of text: images of 160 x 160 pixels full of letters, from which a model learns to read before memes.

A page knows the place of each of its letters, so it can be asked in two ways. The field is what stands at each of the
tower's 10 x 10 patches, row by row: the letter whose middle lies there, the mark of a figure's mood, or BLANK. Answer
and patches are then in the same order, and a letter or mood is recognised where it stands. The text is the letters
alone, in reading order.
"""

import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meme_characters import MOODS
from meme_fonts import FontFace, load_font
from meme_images import (
    OVERSIZE,
    Box,
    Meme,
    choose_figure,
    choose_ground,
    choose_style,
    draw_background,
    is_wide,
    place_figure,
    wear_out,
)
from meme_lines import ALPHABET, LineSource
from PIL import Image, ImageDraw

SIDE = 160  # pixels
PATCHES = 10  # a side
BLANK = "□"
NARROW = [character for character in ALPHABET if not is_wide(character)]
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
    """Letters in reading order. A field shows one of those that share a patch."""

    identifier: str
    letters: list[Letter]
    is_plain: bool  # dark on white, nothing worn
    stretch: float = 1  # width over height of the image that was made square
    figure: tuple[Meme, Box] | None = None  # who stands on the page, and where, in pixels

    @property
    def text(self) -> str:
        return "".join(letter.character for letter in self.letters)

    @property
    def field(self) -> str:
        marks = [mark_figure(*self.figure)] if self.figure else []
        return write_field([*self.letters, *marks])


@functools.cache
def get_source() -> LineSource:
    return LineSource(unseen=False)


@dataclass(frozen=True)
class RowKind:
    """How rows of letters are drawn.

    Args:
        smallest, largest: letter sizes in pixels.
        few: share of the rows in which two or three characters keep coming again, so that only its place tells which
            one is next; a third of these are digits or Latin letters.
        words: share of the others that are made of words; the rest are characters by chance.
        share_patches: keep letters whose middles lie in the same patch, instead of the first of them.
    """

    smallest: float
    largest: float
    words: float
    few: float = 0
    share_patches: bool = False

    def draw_text(self, rng: random.Random, length: int) -> str:
        # Without `few` nothing is drawn for it: seeds give what they gave before there was any.
        if self.few and rng.random() < self.few:
            count = rng.randint(2, 3)
            few = rng.sample(NARROW, count) if rng.random() < 1 / 3 else get_source().draw_characters(rng, count)
            return "".join(rng.choices(few, k=length))
        if rng.random() >= self.words:
            return get_source().draw_characters(rng, length)
        row = ""
        while len(row) < length:
            row += get_source().compose(rng)
        return row[:length]

    def draw_size(self, rng: random.Random) -> float:
        """A letter size in pixels, each doubling as likely as the others."""
        return math.exp(rng.uniform(math.log(self.smallest), math.log(self.largest)))

    def keep_letters(self, letters: Iterable[Letter]) -> list[Letter]:
        """Those that the page has room for, in their order."""
        if self.share_patches:
            return list(letters)
        first: dict[int, Letter] = {}
        for letter in letters:
            first.setdefault(letter.patch, letter)
        return list(first.values())


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
    letters = []
    for number in range(row_count):
        left = rng.uniform(0, SIDE - size - step * (row_length - 1))
        for place, character in enumerate(kind.draw_text(rng, row_length)):
            letter = Letter(character, left + size / 2 + step * place, top + size / 2 + row_step * number, size)
            if rng.random() >= gaps:
                letters.append(letter)
    return Page(identifier, kind.keep_letters(letters), is_plain)


def plan_scene(identifier: str, rng: random.Random, kind: RowKind, is_plain: bool, most_letters: int) -> Page:
    """Rows of several sizes, few or many, here and there, as memes have them; on some beside a figure.

    Where a figure leaves no room, there are no letters.
    """
    stretch = rng.choice((1, 1, rng.uniform(0.75, 1.4)))
    figure, fullness = None, rng.uniform(0.3, 1)
    if rng.random() < 0.4:
        height = rng.uniform(40, 100)
        left = rng.uniform(0, SIDE - height)
        top = rng.choice((0, SIDE - height, rng.uniform(0, SIDE - height)))
        figure = (choose_figure(rng, identifier), (left, top, left + height, top + height))
    row_count = rng.choices((1, 2, rng.randint(3, 5), PATCHES), (1, 1, 2, 6))[0]
    letters: list[Letter] = []
    size, y = 0.0, rng.uniform(0, 20 if row_count == PATCHES else SIDE - 2 * kind.smallest)
    for _ in range(row_count):
        if not size or rng.random() < 0.3:
            size = kind.draw_size(rng)
        if figure and y + size > figure[1][1] and y < figure[1][3]:
            y = figure[1][3]
        if y + size > SIDE:
            break
        most = int(SIDE * stretch / size)
        length = most if rng.random() < fullness else rng.randint(1, most)
        row = kind.draw_text(rng, min(length, most_letters - len(letters)))
        widths = [size / stretch * (1 if is_wide(character) else 0.6) for character in row]
        x = rng.uniform(0, SIDE - sum(widths))
        for character, width in zip(row, widths, strict=True):
            letters.append(Letter(character, x + width / 2, y + size / 2, size))
            x += width
        letters = kind.keep_letters(letters)
        y += size * rng.uniform(1, 1.4) + (rng.uniform(0, 40) if rng.random() > fullness else 0)
    return Page(identifier, letters, is_plain, stretch, figure)


def draw_page(rng: random.Random, page: Page, faces: list[FontFace]) -> Image.Image:
    """The page as an image of 160 x 160 pixels."""
    size = (round(SIDE * OVERSIZE * page.stretch), SIDE * OVERSIZE)
    ground = "white" if page.is_plain else choose_ground(rng, "page")
    image = draw_background(rng, size, ground)
    if page.figure:
        meme, (left, top, right, bottom) = page.figure
        across = OVERSIZE * page.stretch
        place_figure(rng, image, meme, (left * across, top * OVERSIZE, right * across, bottom * OVERSIZE), 0.5)
    face, style = choose_style(rng, ground, faces)
    canvas = ImageDraw.Draw(image)
    for letter in page.letters:
        font = load_font(face, round(letter.size * 0.95 * OVERSIZE))
        stroke = round(letter.size * OVERSIZE * style["weight"])
        place = (letter.x * OVERSIZE * page.stretch, letter.y * OVERSIZE)
        canvas.text(
            place, letter.character, style["fill"], font, "mm", stroke_width=stroke, stroke_fill=style["stroke"]
        )
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return image if page.is_plain else wear_out(rng, image)
