"""Images of several figures, from which a model learns moods sooner than from memes, which show one each."""

import random
from dataclasses import dataclass

from meme_images import OVERSIZE, Box, Meme, choose_figure, choose_ground, draw_background, place_figure, wear_out
from meme_pages import SIDE, mark_figure, write_field
from PIL import Image

FIGURES_A_ROW = (1, 2, 3)


@dataclass(frozen=True)
class Group:
    """1, 4 or 9 figures in rows, as many rows as columns."""

    identifier: str
    figures: list[Meme]

    @property
    def field(self) -> str:
        """What stands at each patch: a mood, or nothing."""
        return write_field(map(mark_figure, self.figures, self.list_boxes()))

    def list_boxes(self) -> list[Box]:
        """The part of the image that each figure has, in pixels, row by row."""
        in_a_row = round(len(self.figures) ** 0.5)
        cell = SIDE / in_a_row
        corners = [(column * cell, row * cell) for row in range(in_a_row) for column in range(in_a_row)]
        return [(left, top, left + cell, top + cell) for left, top in corners]


def plan_group(identifier: str, rng: random.Random) -> Group:
    count = rng.choice(FIGURES_A_ROW) ** 2
    return Group(identifier, [choose_figure(rng, identifier) for _ in range(count)])


def draw_group(rng: random.Random, group: Group) -> Image.Image:
    """The group as an image of 160 x 160 pixels."""
    side = SIDE * OVERSIZE
    image = draw_background(rng, (side, side), choose_ground(rng, "page"))
    for figure, box in zip(group.figures, group.list_boxes(), strict=True):
        left, top, right, bottom = (OVERSIZE * edge for edge in box)
        room = (right - left) * rng.choice((0, 0.05, 0.15)) / 2
        place_figure(rng, image, figure, (left + room, top + room, right - room, bottom - room), 0.5)
    return wear_out(rng, image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
