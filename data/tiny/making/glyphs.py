"""Glyph atlas: every character of every font as a small image, in the sizes that pages need.

A cell is a square with the character's em box in its middle. Cells are kept in several sizes in one flat tensor, so
that a page of any letter size is composed by looking pixels up.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from meme_fonts import FONT_FOLDER, FontFace
from PIL import Image, ImageDraw, ImageFont

# Debian: apt install fonts-noto-cjk fonts-noto-cjk-extra fonts-wqy-zenhei fonts-wqy-microhei fonts-arphic-ukai
# fonts-arphic-uming fonts-arphic-gkai00mp fonts-arphic-gbsn00lp fonts-lxgw-wenkai fonts-smiley-sans fonts-klee
# fonts-seto. The face is the one with the forms of mainland China.
KNOWN_FONTS = (
    ("opentype/noto/NotoSansCJK-Regular.ttc", 2),  # the first draws what others lack
    ("opentype/noto/NotoSansCJK-Black.ttc", 2),
    ("opentype/noto/NotoSansCJK-Bold.ttc", 2),
    ("opentype/noto/NotoSansCJK-Medium.ttc", 2),
    ("opentype/noto/NotoSansCJK-Light.ttc", 2),
    ("truetype/wqy/wqy-microhei.ttc", 0),
    ("truetype/wqy/wqy-zenhei.ttc", 0),
    ("opentype/noto/NotoSerifCJK-Black.ttc", 2),
    ("opentype/noto/NotoSerifCJK-Bold.ttc", 2),
    ("opentype/noto/NotoSerifCJK-Regular.ttc", 2),
    ("truetype/arphic/ukai.ttc", 0),
    ("truetype/arphic/uming.ttc", 0),
    ("truetype/arphic-gkai00mp/gkai00mp.ttf", 0),
    ("truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf", 0),
    ("truetype/lxgw-wenkai/LXGWWenKai-Bold.ttf", 0),
    ("truetype/smiley-sans/SmileySans-Oblique.ttf", 0),
    ("truetype/klee/KleeOne-SemiBold.ttf", 0),
    ("truetype/seto/setofont.ttf", 0),
)
SANS_FONTS = 7  # the first of them, which most memes use
CELL, EM = 64, 48  # pixels
LEVELS = (64, 48, 36, 27, 20, 15)  # cell sizes that are kept
CHARACTERS = Path(__file__).parent / "characters.txt"
STRANGER = "〇"  # what stands for a character that is not to be known


def read_characters(path: Path = CHARACTERS) -> list[str]:
    """The characters of a file, the most frequent first."""
    return list("".join(path.read_text(encoding="utf-8").split()))


def list_strangers(known: list[str]) -> list[str]:
    """Characters that are drawn but not to be known: rare and traditional ones, kana, Cyrillic."""
    rare = [bytes([0xD8 + row, 0xA1 + cell]).decode("gb2312") for row in range(32) for cell in range(0, 94, 5)]
    traditional = "說話時還進過這個們來嗎為會對東車馬鳥魚門開關見貝頁風飛電腦體學覺驚嚇歡樂氣點麼聽買賣讓誰請謝龍龜"
    foreign = "あいうえおかきくけこのはひふへほアイウエオカキクケコЖДФЯЮБШ"
    return [character for character in dict.fromkeys([*rare, *traditional, *foreign]) if character not in set(known)]


def find_faces(folder: Path | None) -> list[FontFace]:
    """The font files of a folder by name, or the known ones that are installed."""
    if folder:
        faces = [(path, 0) for path in sorted(folder.iterdir())]
    else:
        faces = [(FONT_FOLDER / name, index) for name, index in KNOWN_FONTS if (FONT_FOLDER / name).is_file()]
    if not faces:
        raise SystemExit(f"error: no font was found in {folder or FONT_FOLDER}; apt install fonts-noto-cjk")
    return faces


@dataclass
class Atlas:
    """Cells of all sizes, and which cell shows a character in a face.

    Args:
        pixels: (bytes,) uint8, level after level, in each cell after cell, row by row.
        starts: (levels,) int64, where a level begins in `pixels`.
        cells: (faces, characters) int64, the cell's number in every level; character 0 is a blank.
        advances: (faces, characters) float32, how far the next letter is, in ems.
    """

    pixels: torch.Tensor
    starts: torch.Tensor
    cells: torch.Tensor
    advances: torch.Tensor

    def to(self, device: str) -> "Atlas":
        return Atlas(*(tensor.to(device) for tensor in (self.pixels, self.starts, self.cells, self.advances)))


def draw_cells(characters: list[str], face: FontFace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells (characters, CELL, CELL) of a face, advances in ems, and which characters the face has."""
    font = ImageFont.truetype(face[0], EM, face[1], layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox("国", anchor="ls")
    baseline = CELL / 2 - (top + bottom) / 2
    missing = bytes(font.getmask("\U0010ffff"))
    cells = np.zeros((len(characters), CELL, CELL), np.uint8)
    advances, has = np.ones(len(characters), np.float32), np.zeros(len(characters), bool)
    for number, character in enumerate(characters):
        shape = bytes(font.getmask(character))
        if not any(shape) or shape == missing:
            continue
        has[number], advances[number] = True, font.getlength(character) / EM
        cell = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(cell).text(((CELL - advances[number] * EM) / 2, baseline), character, 255, font, "ls")
        cells[number] = np.asarray(cell)
    return cells, advances, has


def make_atlas(faces: list[FontFace], characters: list[str], processes: int = 1) -> Atlas:
    """Draw all characters in all faces; the first face draws what another lacks."""
    with ProcessPoolExecutor(processes) as pool:
        drawn = list(pool.map(partial(draw_cells, characters), faces))
    cells, advances, has = (np.stack(parts) for parts in zip(*drawn, strict=True))
    count = len(characters)
    numbers = np.arange(1, 1 + has.size).reshape(has.shape)
    numbers = np.where(has, numbers, numbers[:1])
    advances = np.where(has, advances, advances[:1])
    blank = np.zeros((1, CELL, CELL), np.uint8)
    whole = torch.from_numpy(np.concatenate([blank, cells.reshape(-1, CELL, CELL)]))[:, None]  # (cells, 1, CELL, CELL)
    levels, starts, start = [], [], 0
    for side in LEVELS:
        level = whole if side == CELL else shrink(whole, side)
        levels.append(level.flatten())
        starts.append(start)
        start += level.numel()
    first = np.zeros((len(faces), 1))
    return Atlas(
        torch.cat(levels),
        torch.tensor(starts),
        torch.from_numpy(np.concatenate([first, numbers], 1)).long(),
        torch.from_numpy(np.concatenate([first + 0.5, advances], 1)).float().reshape(len(faces), count + 1),
    )


def shrink(cells: torch.Tensor, side: int) -> torch.Tensor:
    """Cells (cells, 1, CELL, CELL) made smaller with every pixel counted."""
    parts = [
        torch.nn.functional.interpolate(part.float(), size=(side, side), mode="bilinear", antialias=True)
        for part in cells.split(8192)
    ]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


def choose_level(pixels_per_em: torch.Tensor) -> torch.Tensor:
    """The smallest level that is not enlarged, for letters of so many pixels an em."""
    ems = torch.tensor([EM * side / CELL for side in LEVELS[1:]], device=pixels_per_em.device)
    return (pixels_per_em[..., None] * math.sqrt(0.9) <= ems).sum(-1)
