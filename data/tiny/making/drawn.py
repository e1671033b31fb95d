"""Drawn memes: images of draw_memes.py's kind with lines of every known character, kept in memory."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draw_memes import FORMATS, TEXTLESS_SHARE
from layout import SIDE
from meme_fonts import FontFace
from meme_images import Meme, draw_meme, save_image
from PIL import Image
from scenery import FIGURE_NAMES, MOOD_NAMES, PROP_NAMES
from texts import GAP, ROW, RowWriter

LONGEST = 12  # letters
KINDS = ("words", "line", "line", "line", "chance", "few")


@dataclass
class DrawnMemes:
    """Images (memes, 3, SIDE, SIDE) uint8, texts (memes, ROW) of numbers, facts (memes, 3), see Scenery."""

    pixels: torch.Tensor
    texts: torch.Tensor
    facts: torch.Tensor


def draw_one(rng: random.Random, writer: RowWriter, faces: list[FontFace]) -> tuple[np.ndarray, list[int], tuple]:
    """A meme as the tower sees it, its text, and the facts about its figure."""
    mood, name = rng.randrange(len(MOOD_NAMES)), rng.randrange(len(FIGURE_NAMES))
    prop = rng.randrange(1, len(PROP_NAMES)) if rng.random() < 0.3 else 0
    line = ""
    if rng.random() > 1 / TEXTLESS_SHARE:
        line = writer.write(rng.choice(KINDS), rng.randrange(1, LONGEST + 1))[:LONGEST]
        strangers = {*writer.alphabet.strangers, GAP, " "}
        line = "".join(character for character in line if character not in strangers)
    image_format = rng.choice(FORMATS)
    meme = Meme("meme", FIGURE_NAMES[name], MOOD_NAMES[mood], PROP_NAMES[prop], line, image_format)
    file = io.BytesIO()
    file.name = meme.file_name
    save_image(rng, draw_meme(rng, meme, faces), meme, file)
    image = Image.open(file).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    seen = ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(seen), [writer.alphabet.numbers[character] for character in line], (mood, name, prop)


def draw_part(writer: RowWriter, faces: list[FontFace], count: int, seed: int, path: Path) -> None:
    """`count` memes into a file: images (count, SIDE, SIDE, 3), texts (count, ROW), facts (count, 3)."""
    rng = random.Random(seed)
    writer.rng.seed(seed)
    texts = np.zeros((count, ROW), np.int64)
    images, facts = [], []
    for number in range(count):
        image, text, fact = draw_one(rng, writer, faces)
        texts[number, : len(text)] = text
        images.append(image)
        facts.append(fact)
    parts = [torch.from_numpy(part) for part in (np.stack(images), texts, np.array(facts))]
    torch.save(parts, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
