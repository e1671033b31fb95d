"""A line and a figure in one image, and what an image goes through before it is seen.

An image is composed a little too large and then made smaller, which smooths its edges; after that come the blur, the
lost resolution and the JPEG damage that a meme collects on its way through chats. The tower sees every image as a
square, so widths of letters are meant in shares of the image's width.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
from meme_characters import CHARACTERS, INK, MOODS, draw_figure
from meme_fonts import FontFace, load_font
from meme_lines import PUNCTUATION
from PIL import Image, ImageColor, ImageDraw, ImageFilter

OVERSIZE = 2  # an image is composed this many times too large
LINE_HEIGHT = 1.18  # of the letter size
SMALLEST_LETTER = 0.09  # of the image's shorter side
DARK_COLORS = ("#b3261e", "#1f4e9c", "#6b2f9c", "#14663c", "#7a3b12")
BRIGHT_COLORS = ("#fff27a", "#ffd0e0", "#c9f7ff")
PASTELS = ("#ffe1e6", "#fff1c9", "#dff3ff", "#e4f5dc", "#efe4ff", "#f3f6ee")
STRONG_COLORS = ("#f08a5d", "#4a90b8", "#6a9c5b", "#b0699c", "#d8a530", "#5f6f9c", "#cf5d63")
NIGHT_COLORS = ("#1d1a24", "#2b2320", "#16263f", "#2d1530", "#000000")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Meme:
    """What one image shows and says, and in which format it is kept."""

    identifier: str
    character: str
    mood: str
    prop: str | None
    line: str  # the words, with a bar where they have a preferred break; "" for none
    format: str  # jpeg, png, palette or transparent

    @property
    def text(self) -> str:
        return self.line.replace("|", "")

    @property
    def file_name(self) -> str:
        return f"{self.identifier}.{'jpg' if self.format == 'jpeg' else 'png'}"


@dataclass(frozen=True)
class Layout:
    """Where the words and the figure stand, as shares of the image's sides."""

    kind: str
    text_box: Box
    figure_box: Box
    lean: float = 0.5  # where the figure stands in the room left over: 0 at its top, 1 at its bottom


def draw_meme(rng: random.Random, meme: Meme, faces: list[FontFace]) -> Image.Image:
    """The finished image, before it is saved; about 150 to 300 pixels a side."""
    layout, (width, height) = choose_layout(rng, meme)
    size = (width * OVERSIZE, height * OVERSIZE)
    ground = "white" if meme.format == "transparent" else choose_ground(rng, layout.kind)
    if meme.format == "transparent":
        image = Image.new("RGBA", size)
    else:
        image = draw_background(rng, size, ground)
    place_figure(rng, image, meme, scale_box(layout.figure_box, size), layout.lean)
    if meme.line:
        place_words(rng, image, meme.line, layout, scale_box(layout.text_box, size), ground, faces)
    image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=None)
    return image if meme.format == "transparent" else wear_out(rng, image.convert("RGB"))


def save_image(rng: random.Random, image: Image.Image, meme: Meme, path) -> None:
    """Write the image in the meme's format."""
    if meme.format == "jpeg":
        image.save(path, quality=rng.choice((40, 55, 70, 80, 85, 90)))
    elif meme.format == "palette":
        image.quantize(64, Image.Quantize.MEDIANCUT).save(path)
    else:
        image.save(path)


# ---- Layout ----


def choose_layout(rng: random.Random, meme: Meme) -> tuple[Layout, tuple[int, int]]:
    """A layout and the image's size in pixels that suits it."""
    square = rng.randrange(150, 250, 10)
    sizes = {
        "square": (square, square - rng.choice((0, 0, 10, 20))),
        "wide": (round(square * rng.uniform(1.1, 1.3)), square),
        "tall": (square, round(square * rng.uniform(1.05, 1.3))),
    }
    if not meme.line:
        return Layout("plain", (0, 0, 0, 0), (0.05, 0.05, 0.95, 0.95)), sizes["square"]
    kinds = {"below": 30, "above": 16, "overlay": 22, "bar": 14, "bubble": 12, "beside": 8, "column": 7}
    if meme.format == "transparent":
        kinds = {"below": 1, "above": 1}
    length = len(meme.text)
    if length > 5 or set(PUNCTUATION) & set(meme.text) or not all(is_wide(char) for char in meme.text):
        kinds.pop("column", None)
    if length > 9:
        kinds.pop("beside", None)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    shape = rng.choices(list(sizes), (6, 2, 2))[0]
    if kind == "beside":
        return Layout(kind, (0.47, 0.1, 0.97, 0.9), (0.03, 0.08, 0.47, 0.97)), sizes["wide"]
    if kind == "column":
        boxes = ((0.76, 0.04, 0.97, 0.96), (0.03, 0.06, 0.74, 0.95))
        if rng.random() < 0.5:
            boxes = ((0.03, 0.04, 0.24, 0.96), (0.26, 0.06, 0.97, 0.95))
        return Layout(kind, *boxes), sizes["square" if shape == "wide" else shape]
    # Long lines need room for a second row.
    tall = 0.25 if length <= 6 else 0.36
    boxes = {
        "below": ((0.03, 0.97 - tall, 0.97, 0.98), (0.06, 0.03, 0.94, 0.96 - tall)),
        "above": ((0.03, 0.02, 0.97, 0.03 + tall), (0.06, 0.05 + tall, 0.94, 0.97)),
        "overlay": ((0.03, 0.97 - tall, 0.97, 0.98), (0.02, 0.03, 0.98, 1.0)),
        "bar": ((0.03, 0.98 - tall, 0.97, 0.99), (0.06, 0.03, 0.94, 0.97 - tall)),
        "bubble": ((0.08, 0.05, 0.92, 0.07 + tall), (0.08, 0.17 + tall, 0.92, 0.98)),
    }
    # The figure stays close to the words, but clear of words that are written over it.
    leans = {"below": 0.75, "above": 0.25, "overlay": 0.1, "bar": 0.7, "bubble": 0.1}
    return Layout(kind, *boxes[kind], leans[kind]), sizes[shape]


def scale_box(box: Box, size: tuple[int, int]) -> Box:
    return tuple(share * size[side % 2] for side, share in enumerate(box))


# ---- Background ----


def choose_ground(rng: random.Random, kind: str) -> str:
    if kind == "overlay":
        return rng.choice(("strong", "photo", "photo"))
    if kind == "page":
        return rng.choices(("white", "pale", "strong", "photo", "night"), (4, 2, 1, 2, 2))[0]
    return rng.choices(("white", "pale", "strong", "photo", "night"), (7, 4, 1, 2, 1))[0]


def draw_background(rng: random.Random, size: tuple[int, int], kind: str) -> Image.Image:
    """White or pale behind dark words; night behind bright ones; strong colours or a photo behind outlined ones."""
    if kind == "white":
        return Image.new("RGBA", size, rng.choice(("white", "white", "white", "#fbfbf8", "#f4faf4")))
    if kind == "photo":
        return draw_photo(rng, size)
    first = rng.choice({"pale": PASTELS, "strong": STRONG_COLORS, "night": NIGHT_COLORS}[kind])
    image = Image.new("RGBA", size, first)
    canvas = ImageDraw.Draw(image)
    lighter = {"pale": 2, "strong": 4, "night": 8}[kind]
    second = tuple(channel + (255 - channel) // lighter for channel in ImageColor.getrgb(first))
    width, height = size
    pattern = rng.choice(("flat", "gradient", "rays", "dots"))
    if pattern == "gradient":
        shade = Image.linear_gradient("L").resize(size)
        image.paste(Image.new("RGBA", size, (*second, 255)), (0, 0), shade)
    elif pattern == "rays":
        reach = width + height
        for start in range(0, 360, 30):
            box = (width / 2 - reach, height / 2 - reach, width / 2 + reach, height / 2 + reach)
            canvas.pieslice(box, start, start + 15, fill=second)
    elif pattern == "dots":
        step = 24 * OVERSIZE
        for row, y in enumerate(range(0, height + step, step // 2)):
            for x in range(row % 2 * step // 2, width + step, step):
                canvas.ellipse((x - step / 6, y - step / 6, x + step / 6, y + step / 6), fill=second)
    return image


def draw_photo(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Something like a photograph out of focus: patches of related colours, edges, and grain."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    base = numbers.integers(30, 220, 3)
    image = Image.new("RGB", size)
    for cells, spread in ((3, 70), (9, 35), (30, 14)):
        patches = np.clip(base + numbers.normal(0, spread, (cells, cells, 3)), 0, 255).astype(np.uint8)
        layer = Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)
        image = layer if cells == 3 else Image.blend(image, layer, 0.4)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randrange(5)):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        reach = rng.uniform(0.05, 0.35) * size[0]
        color = tuple(int(channel) for channel in np.clip(base + numbers.normal(0, 60, 3), 0, 255))
        draw_shape = rng.choice((canvas.ellipse, canvas.rectangle))
        draw_shape((x - reach, y - reach, x + reach, y + reach * rng.uniform(0.3, 1.5)), fill=color)
    return image.convert("RGBA")


def wear_out(rng: random.Random, image: Image.Image) -> Image.Image:
    """Blur, lost resolution and noise, each on some images; what is legible stays so."""
    if rng.random() < 0.25:
        share = rng.uniform(0.6, 0.9)
        small = image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BILINEAR)
        image = small.resize(image.size, Image.Resampling.BILINEAR)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.15:
        numbers = np.random.default_rng(rng.getrandbits(32))
        grain = numbers.normal(0, rng.uniform(3, 12), (image.height, image.width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return image


# ---- Figure ----


@functools.lru_cache(maxsize=2000)
def _draw_figure(character: str, mood: str, skin: int, has_glasses: bool, prop: str | None) -> Image.Image:
    figure = CHARACTERS[character]
    return draw_figure(figure, MOODS[mood], figure.skins[skin], has_glasses, prop)


def choose_figure(rng: random.Random, identifier: str) -> Meme:
    """A meme without words or prop, for images in which only the figure counts."""
    return Meme(identifier, rng.choice(list(CHARACTERS)), rng.choice(list(MOODS)), None, "", "jpeg")


def place_figure(rng: random.Random, image: Image.Image, meme: Meme, box: Box, lean: float) -> None:
    has_glasses = meme.mood == "得意" and rng.random() < 0.4
    skin = rng.randrange(len(CHARACTERS[meme.character].skins))
    drawing = _draw_figure(meme.character, meme.mood, skin, has_glasses, meme.prop)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top, right, bottom = box
    scale = min((right - left) / drawing.width, (bottom - top) / drawing.height) * rng.choice((1, 1, 0.95, 0.88))
    drawing = drawing.resize((round(drawing.width * scale), round(drawing.height * scale)), Image.Resampling.BILINEAR)
    if rng.random() < 0.25:
        drawing = drawing.rotate(rng.choice((-12, -8, 8, 12)), Image.Resampling.BICUBIC)
    x = left + (right - left - drawing.width) * rng.uniform(0.3, 0.7)
    y = top + (bottom - top - drawing.height) * min(1, max(0, lean + rng.uniform(-0.1, 0.1)))
    image.alpha_composite(drawing, (max(0, round(x)), max(0, round(y))))


# ---- Words ----


def is_wide(char: str) -> bool:
    """Whether a character is as wide as it is high."""
    return ord(char) > 0x2E7F


def measure_row(row: str) -> float:
    """The width of a row in letter sizes, at most."""
    return sum(1 if is_wide(char) else 0.72 for char in row)


def list_arrangements(line: str, is_column: bool, most_rows: int) -> list[list[str]]:
    """The ways to break a line of words into rows."""
    text = line.replace("|", "")
    if is_column:
        return [list(text)]
    ways = [[text]]
    if len(text) >= 5 and most_rows > 1:
        if "|" in line:
            ways.append(line.split("|"))
        else:
            cut = next((i + 1 for i, char in enumerate(text[:-1]) if char in PUNCTUATION), (len(text) + 1) // 2)
            ways.append([text[:cut], text[cut:]])
    if len(text) >= 12 and most_rows > 2:
        third = -(-len(text) // 3)
        ways.append([text[:third], text[third : 2 * third], text[2 * third :]])
    return ways


def choose_style(rng: random.Random, ground: str, faces: list[FontFace]) -> tuple[FontFace, dict]:
    """The font, and colours and outline (its width as a share of the letter size) of the words."""
    # An outline eats into thin letters, so outlined words take one of the heavier fonts.
    heavy = faces[: (len(faces) + 1) // 2]
    outlined = ground in ("strong", "photo")
    if outlined:
        fill, edge = rng.choice((("white", INK), ("white", "black"), (rng.choice(BRIGHT_COLORS), INK), (INK, "white")))
        return rng.choice(heavy), {"fill": fill, "stroke": edge, "weight": rng.uniform(0.06, 0.1), "shadow": None}
    face = rng.choice(faces)
    if ground == "night":
        fill = rng.choice(("white", "white", rng.choice(BRIGHT_COLORS)))
    else:
        fill = rng.choice(DARK_COLORS) if rng.random() < 0.25 else rng.choice(("black", INK))
    weight = 0 if face in heavy else rng.choice((0, 0.012, 0.025))
    shadow = rng.choice(("#9a9a9a", "#c8b8a8")) if ground in ("white", "pale") and rng.random() < 0.15 else None
    return face, {"fill": fill, "stroke": fill, "weight": weight, "shadow": shadow}


def draw_rows(rows: list[str], face: FontFace, size: float, style: dict, align: float) -> Image.Image:
    """The rows on a transparent ground, cut to their edges. `align`: 0 flush left, 0.5 centred."""
    font, stroke = load_font(face, round(size)), round(size * style["weight"])
    widths = [font.getlength(row) for row in rows]
    step, margin = size * LINE_HEIGHT, stroke + 4
    layer = Image.new("RGBA", (round(max(widths)) + 2 * margin, round(step * len(rows) + 0.4 * size) + 2 * margin))
    canvas = ImageDraw.Draw(layer)
    colors = [(style["shadow"], size * 0.05)] if style["shadow"] else []
    for fill, offset in [*colors, (style["fill"], 0)]:
        edge = style["stroke"] if offset == 0 else fill
        for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
            x = margin + (max(widths) - width) * align + offset
            canvas.text((x, margin + step * number + offset), row, fill, font, stroke_width=stroke, stroke_fill=edge)
    return layer.crop(layer.getbbox())


def place_words(
    rng: random.Random, image: Image.Image, line: str, layout: Layout, box: Box, ground: str, faces: list[FontFace]
) -> None:
    left, top, right, bottom = box
    room = (right - left, bottom - top)
    if layout.kind == "bar":
        ground = rng.choice(("night", "white"))
        bar_top = round(top - 0.01 * image.height)
        ImageDraw.Draw(image).rectangle((0, bar_top, *image.size), "black" if ground == "night" else "white")
    # A bubble brings its own white ground.
    face, style = choose_style(rng, "white" if layout.kind == "bubble" else ground, faces)
    shorter = min(image.size)
    largest = rng.uniform(0.14, 0.23) * shorter
    fits = []
    for rows in list_arrangements(line, layout.kind == "column", 3 if layout.kind == "beside" else 2):
        size = min(room[0] / max(map(measure_row, rows)), room[1] / (LINE_HEIGHT * len(rows)), largest)
        fits.append((size, rows))
    # One row reads more naturally than two, unless two are clearly larger.
    size, rows = next((fit for fit in fits if fit[0] * 1.1 > max(fits)[0]), fits[0])
    size = max(size * rng.choice((1, 1, 0.9)), min(size, SMALLEST_LETTER * shorter))
    words = draw_rows(rows, face, size, style, rng.choice((0.5, 0.5, 0.5, 0)))
    if layout.kind not in ("bubble", "column", "bar") and rng.random() < 0.25:
        words = words.rotate(rng.uniform(-7, 7), Image.Resampling.BICUBIC, expand=True)
    if words.width > room[0] or words.height > room[1]:
        words.thumbnail((round(room[0]), round(room[1])), Image.Resampling.BILINEAR)
    x = left + (room[0] - words.width) * (rng.uniform(0, 1) if layout.kind == "above" else 0.5)
    y = top + (room[1] - words.height) * 0.5
    if layout.kind == "bubble":
        pad_x, pad_y = 10 * OVERSIZE, 7 * OVERSIZE
        around = (x - pad_x, y - pad_y, x + words.width + pad_x, y + words.height + pad_y)
        draw_bubble(image, around, (image.width * rng.uniform(0.4, 0.6), around[3] + 14 * OVERSIZE))
    image.alpha_composite(words, (max(0, round(x)), max(0, round(y))))


def draw_bubble(image: Image.Image, box: Box, tip: tuple[float, float]) -> None:
    """A speech bubble around the box whose tail ends at `tip`."""
    canvas, rim = ImageDraw.Draw(image), 2 * OVERSIZE
    left, top, right, bottom = box
    base = min(max(tip[0], left + 20 * OVERSIZE), right - 20 * OVERSIZE)
    tail = [(base - 9 * OVERSIZE, bottom - rim), (base + 9 * OVERSIZE, bottom - rim), tip]
    # All the ink comes before all the white, so that no line runs between bubble and tail.
    canvas.rounded_rectangle((left - rim, top - rim, right + rim, bottom + rim), 16 * OVERSIZE, INK)
    canvas.line([*tail, tail[0]], INK, 2 * rim, joint="curve")
    canvas.rounded_rectangle(box, 14 * OVERSIZE, "white")
    canvas.polygon(tail, "white")
