"""Scenery: images without a letter that stand behind and beside the text of pages, and what is known about them.

Figures of our own in every mood, faces drawn with a few strokes, colours and shapes, photographs if there are any.
"""

import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from meme_characters import CHARACTERS, MOODS, PROPS, draw_figure
from meme_images import draw_background
from PIL import Image, ImageDraw, ImageOps

SIZE = 128  # pixels a side
KINDS = ("figure", "cartoon", "photo")
MOOD_NAMES, FIGURE_NAMES, PROP_NAMES = list(MOODS), list(CHARACTERS), [None, *PROPS]


@dataclass
class Scenery:
    """Images in the order of their kinds.

    Args:
        pixels: (images, 4, SIZE, SIZE) uint8, red, green, blue, opacity.
        starts: for each kind the number of its first image, then the number of all.
        facts: (images, 3) int64, places in MOOD_NAMES, FIGURE_NAMES and PROP_NAMES; -1 where there is no figure.
    """

    pixels: torch.Tensor
    starts: list[int]
    facts: torch.Tensor


def fit(image: Image.Image) -> Image.Image:
    """The image in the middle of a transparent square, as large as fits."""
    image = ImageOps.contain(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square


def draw_own_figure(rng: random.Random) -> tuple[Image.Image, tuple[int, int, int]]:
    """One of our figures, and which mood, figure and prop it has."""
    mood, name = rng.randrange(len(MOOD_NAMES)), rng.randrange(len(FIGURE_NAMES))
    prop = rng.randrange(1, len(PROP_NAMES)) if rng.random() < 0.3 else 0
    figure, mood_name = CHARACTERS[FIGURE_NAMES[name]], MOOD_NAMES[mood]
    glasses = mood_name == "得意" and rng.random() < 0.4
    drawing = draw_figure(figure, MOODS[mood_name], rng.choice(figure.skins), glasses, PROP_NAMES[prop])
    if rng.random() < 0.25:
        drawing = drawing.rotate(rng.choice((-12, -8, 8, 12)), Image.Resampling.BICUBIC, expand=True)
    return fit(drawing), (mood, name, prop)


def draw_cartoon(rng: random.Random) -> Image.Image:
    """A head of a few strokes, perhaps with a body, hair, blots and scribbles."""
    side = 2 * SIZE
    image = Image.new("RGBA", (side, side))
    canvas = ImageDraw.Draw(image)
    ink = rng.choice(((0, 0, 0), (0, 0, 0), (30, 26, 24), tuple(rng.randrange(120) for _ in range(3))))
    skin = rng.choice(
        ((255, 255, 255), (255, 255, 255), (250, 244, 236), tuple(rng.randrange(120, 256) for _ in range(3)))
    )
    line = rng.randrange(2, 9)
    x, y = side * rng.uniform(0.35, 0.65), side * rng.uniform(0.3, 0.5)
    wide, high = side * rng.uniform(0.18, 0.34), side * rng.uniform(0.18, 0.3)
    if rng.random() < 0.7:
        body = rng.choice((ink, skin, tuple(rng.randrange(256) for _ in range(3))))
        across = wide * rng.uniform(0.5, 1.1)
        canvas.rounded_rectangle((x - across, y + high * 0.6, x + across, side * 1.1), across * 0.6, body, ink, line)
    if rng.random() < 0.6:
        for way in (-1, 1):
            ear, at = wide * rng.uniform(0.25, 0.45), x + way * wide * 0.75
            canvas.ellipse((at - ear, y - high - ear * 0.6, at + ear, y - high + ear * 1.4), ink, ink, line)
    canvas.ellipse((x - wide, y - high, x + wide, y + high), skin, ink, line)
    for way in (-1, 1):
        eye, at = wide * rng.uniform(0.06, 0.25), x + way * wide * rng.uniform(0.3, 0.5)
        flat = eye * rng.uniform(0.3, 1)
        canvas.ellipse((at - eye, y - flat, at + eye, y + flat), rng.choice((ink, "white", None)), ink, line // 2 + 1)
        brow = y - high * rng.uniform(0.3, 0.5)
        canvas.line((at - eye * 1.4, brow, at + eye * 1.4, brow + rng.uniform(-12, 12)), ink, line)
    mouth = wide * rng.uniform(0.15, 0.5)
    start = rng.choice((0, 180))
    canvas.arc((x - mouth, y + high * 0.25, x + mouth, y + high * 0.7), start, start + 180, ink, line)
    for _ in range(rng.randrange(9)):
        draw_scribble(rng, canvas, ink, line, side)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def draw_scribble(rng: random.Random, canvas: ImageDraw.ImageDraw, ink: tuple, line: int, side: int) -> None:
    """A bent stroke, a blot, or a few lines side by side."""
    x, y, way, length = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 6.3), rng.uniform(0.05, 0.5) * side
    color = rng.choice((ink, ink, tuple(rng.randrange(256) for _ in range(3))))
    kind = rng.randrange(3)
    if kind == 0:
        points = []
        for _ in range(12):
            points.append((x, y))
            way += rng.uniform(-0.7, 0.7)
            x, y = x + length / 12 * math.cos(way), y + length / 12 * math.sin(way)
        canvas.line(points, color, line, joint="curve")
    elif kind == 1:
        wide, high = length * rng.uniform(0.1, 0.5), length * rng.uniform(0.1, 0.5)
        canvas.ellipse((x - wide, y - high, x + wide, y + high), color)
    else:
        for step in range(rng.randrange(2, 6)):
            away = step * line * 3
            canvas.line(
                (x + away, y, x + away + length * math.cos(way) / 2, y + length * math.sin(way) / 2), color, line
            )


def draw_scene(rng: random.Random, photos: list[Image.Image]) -> Image.Image:
    """A piece of a photograph, or colours and shapes in the place of one."""
    if photos and rng.random() < 0.6:
        photo = rng.choice(photos)
        side = rng.uniform(0.25, 1) * min(photo.size)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        image = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        image = image.rotate(rng.choice((0, 0, 90, 180, 270)))
        channels = list(image.split())
        rng.shuffle(channels)
        return (Image.merge("RGB", channels) if rng.random() < 0.5 else image).convert("RGBA")
    kind = rng.choices(("photo", "pale", "strong", "night"), (6, 1, 2, 1))[0]
    image = draw_background(rng, (2 * SIZE, 2 * SIZE), kind).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image.alpha_composite(draw_cartoon(rng))
    return image


def draw_part(photo_folder: Path | None, counts: tuple[int, int, int], seed: int) -> tuple[list[np.ndarray], list]:
    """Pixels (images, SIZE, SIZE, 4) of each kind, and the facts about the figures."""
    rng = random.Random(seed)
    photos = [Image.open(path).convert("RGB") for path in sorted(photo_folder.iterdir())] if photo_folder else []
    figures = [draw_own_figure(rng) for _ in range(counts[0])]
    cartoons = [draw_cartoon(rng) for _ in range(counts[1])]
    scenes = [draw_scene(rng, photos) for _ in range(counts[2])]
    drawn = ([figure for figure, _ in figures], cartoons, scenes)
    return [np.stack([np.asarray(image) for image in images]) for images in drawn], [fact for _, fact in figures]


def make_scenery(photo_folder: Path | None, counts: tuple[int, int, int], seed: int, processes: int = 1) -> Scenery:
    """So many images of each kind, rounded up to a multiple of 16."""
    parts = 16
    each = tuple(-(-count // parts) for count in counts)
    with ProcessPoolExecutor(processes) as pool:
        drawn = list(pool.map(partial(draw_part, photo_folder, each), range(seed * parts, (seed + 1) * parts)))
    kinds = [np.concatenate([images[kind] for images, _ in drawn]) for kind in range(len(KINDS))]
    facts = torch.tensor([fact for _, part in drawn for fact in part])
    others = torch.full((parts * (each[1] + each[2]), 3), -1)
    pixels = torch.from_numpy(np.concatenate(kinds)).permute(0, 3, 1, 2).contiguous()
    starts = [0, parts * each[0], parts * (each[0] + each[1]), parts * sum(each)]
    return Scenery(pixels, starts, torch.cat([facts, others]))
