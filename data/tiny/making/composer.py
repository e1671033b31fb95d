"""Page composer: images of many pages at once, from layouts, glyphs and scenery, on a GPU or a CPU.

Letters are sampled at twice the page's resolution, where outlines are grown, too; everything else at the page's own.
Images are (B, 3, SIDE, SIDE), from 0 to 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from glyphs import CELL, EM, LEVELS, Atlas, choose_level
from layout import ROWS, SIDE, Dice, Layout
from scenery import Scenery
from style import Style, choose_style, make_plain, measure_rows
from wear import wear_out

FINE = 2 * SIDE  # pixels a side where letters are drawn
FAR = 10_000.0  # pixels, more than the longest row has
REACH = 0.72  # how far from its middle a row is looked for, in ems


def compose(
    dice: Dice, layout: Layout, atlas: Atlas, scenery: Scenery, plain: float = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of pages, the facts (B, 3) about their figures (see Scenery), and the figures' middles (B, 2).

    A share of `plain` pages is black on white, with nothing behind the letters and nothing worn.
    """
    extents = measure_rows(layout)
    style = choose_style(dice, layout, scenery, extents)
    is_plain = dice.happens(plain, len(layout.letters))
    make_plain(style, is_plain)
    alpha, row = draw_letters(layout, atlas)
    letters, outline = grow(alpha, style.bold), grow(alpha, style.bold + style.outline)
    letters, outline = F.avg_pool2d(letters, 2), F.avg_pool2d(outline, 2)  # (B, 1, SIDE, SIDE)
    page = paint_ground(style)
    page, middles = paint_image(dice, page, style, scenery)
    page = paint_bars(page, style, layout, extents)
    opacity = style.opacity.gather(1, row.flatten(1)).view_as(row)[:, None]
    has_outline = (style.outline > 0).view(-1, 1, 1, 1)
    page = torch.lerp(page, color_rows(style.edge, row), outline * has_outline * opacity)
    page = torch.lerp(page, color_rows(style.fill, row), letters * opacity)
    facts = torch.where((style.image >= 0)[:, None], scenery.facts[style.image.clamp(min=0)], -1)
    return torch.where(is_plain.view(-1, 1, 1, 1), page, wear_out(dice, page)), facts, middles


def draw_letters(layout: Layout, atlas: Atlas) -> tuple[torch.Tensor, torch.Tensor]:
    """Opacity of letters (B, 1, FINE, FINE), and the row (B, SIDE, SIDE) that each pixel is nearest to."""
    count, device = len(layout.letters), layout.letters.device
    axis = torch.arange(SIDE, device=device) + 0.5
    best = torch.full((count, SIDE, SIDE), 9.0, device=device)
    row = torch.zeros(count, SIDE, SIDE, dtype=torch.long, device=device)
    used, reach = layout.lengths > 0, layout.lengths / 2 + 2
    for number in range(ROWS):
        shown = used[:, number].nonzero().flatten()
        if not len(shown):
            continue
        pages = Pixels(shown[:, None, None], number, axis[None, None, :], axis[None, :, None])
        along, across = pages.measure(layout)
        score = across.abs() / layout.em[shown, number, 1, None, None]
        score = torch.where(along.abs() > reach[shown, number, None, None], 9.0, score)
        nearer = score < best[shown]
        best[shown] = torch.where(nearer, score, best[shown])
        row[shown] = torch.where(nearer, number, row[shown])
    page, line, column = (best < REACH).nonzero().unbind(-1)
    opacity = torch.zeros(count, FINE, FINE, device=device)
    row_of_pixel = row[page, line, column]
    for down in (0, 1):
        for over in (0, 1):
            x, y = column + 0.25 + over / 2, line + 0.25 + down / 2
            pixels = Pixels(page, row_of_pixel, x, y)
            opacity[page, 2 * line + down, 2 * column + over] = sample_letters(layout, atlas, pixels)
    return opacity[:, None], row


@dataclass
class Pixels:
    """Places x, y on pages, and the rows that they belong to."""

    page: torch.Tensor
    row: torch.Tensor | int
    x: torch.Tensor
    y: torch.Tensor

    def measure(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the places are from the middles of their rows, along and across."""
        middle, angle = layout.middles[self.page, self.row], layout.angles[self.page, self.row]
        dx, dy = self.x - middle[..., 0], self.y - middle[..., 1]
        cos, sin = angle.cos(), angle.sin()
        level, plumb = dx * cos + dy * sin, dy * cos - dx * sin
        vertical = layout.vertical[self.page]
        return torch.where(vertical, plumb, level), torch.where(vertical, level, plumb)


def sample_letters(layout: Layout, atlas: Atlas, pixels: Pixels) -> torch.Tensor:
    """Opacity (pixels,) at places of rows."""
    along, across = pixels.measure(layout)
    place = (pixels.page, pixels.row)
    ends, lengths = layout.advances.cumsum(-1), layout.lengths  # (B, R, L), (B, R)
    start = along + lengths[place] / 2
    letter = find_letters(ends, pixels, start)
    middle = (ends - layout.advances / 2)[(*place, letter)]
    cell = atlas.cells[layout.faces[place], layout.letters[(*place, letter)]]
    level = choose_level(layout.em.amin(-1).clamp(min=1) * FINE / SIDE)[place]
    side = torch.tensor(LEVELS, device=along.device)[level]
    em = layout.em[place]
    x, y = (start - middle) / em[:, 0], across / em[:, 1]  # ems from the letter's middle
    vertical = layout.vertical[pixels.page]
    x, y = torch.where(vertical, y, x), torch.where(vertical, x, y)
    x, y = (value * side * (EM / CELL) + side / 2 - 0.5 for value in (x, y))
    inside = (start >= 0) & (start < lengths[place])
    return bilinear(atlas.pixels, atlas.starts[level] + cell * side * side, side, x, y) * inside


def find_letters(ends: torch.Tensor, pixels: Pixels, start: torch.Tensor) -> torch.Tensor:
    """Which letter (pixels,) of its row each pixel lies in, so far from the row's start; `ends` (B, R, L) of letters.

    All rows are searched as one line, on which each begins FAR behind the one before.
    """
    count, rows, letters = ends.shape
    line = ends.double().flatten(0, 1) + FAR * torch.arange(count * rows, device=ends.device)[:, None]
    row = pixels.page * rows + pixels.row
    found = torch.searchsorted(line.flatten(), start.double().clamp(-1, FAR - 1) + FAR * row, right=True)
    return (found - row * letters).clamp(max=letters - 1)


def bilinear(
    pixels: torch.Tensor, first: torch.Tensor, side: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Values from 0 to 1 at places of cells that begin at `first` and have `side` pixels a side."""
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    value = torch.zeros_like(x)
    for over in (0, 1):
        for down in (0, 1):
            column, line = left.long() + over, top.long() + down
            inside = (column >= 0) & (column < side) & (line >= 0) & (line < side)
            share = (right_share if over else 1 - right_share) * (lower_share if down else 1 - lower_share)
            value += pixels[torch.where(inside, first + line * side + column, 0)] * (share * inside)
    return value / 255


def grow(alpha: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Opacity (B, 1, FINE, FINE) with each page's letters grown by so many pixels, up to 4."""
    result = alpha.clone()
    chosen, grown = torch.arange(len(alpha), device=alpha.device), alpha
    for radius in range(1, 5):
        still = (pixels[chosen] >= radius).nonzero().flatten()
        if not len(still):
            break
        chosen, grown = chosen[still], F.max_pool2d(grown[still], 3, 1, 1)
        if radius % 2 == 0:  # an octagon is rounder than a square
            grown = torch.minimum(grown, F.avg_pool2d(grown, 3, 1, 1) * 1.6)
        result[chosen] = grown
    return result


def color_rows(colors: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """(B, 3, SIDE, SIDE) each pixel in the colour (B, R, 3) of its row."""
    index = row.flatten(1)[..., None].expand(-1, -1, 3)
    return colors.gather(1, index).transpose(1, 2).reshape(len(row), 3, SIDE, SIDE)


def paint_ground(style: Style) -> torch.Tensor:
    """(B, 3, SIDE, SIDE) the pages' colours, from top to bottom."""
    share = torch.linspace(0, 1, SIDE, device=style.ground.device).view(1, 1, SIDE, 1)
    page = torch.lerp(style.ground[:, :, None, None], style.shade[:, :, None, None], share)
    return page.expand(-1, -1, -1, SIDE)


def paint_image(dice: Dice, page: torch.Tensor, style: Style, scenery: Scenery) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages with their images, and the middles (B, 2) of these in pixels."""
    count = len(page)
    size = (style.box[:, 2:] - style.box[:, :2]).clamp(min=8)
    across = size.amin(1, keepdim=True) * dice.uniform(0.8, 1.12, count, 1)
    half = across * torch.exp(0.08 * dice.normal(count, 2)) / 2
    middle = style.box[:, :2] + size / 2 + (size - 2 * half).clamp(min=0) * dice.uniform(-0.4, 0.4, count, 2)
    full = style.full[:, None]
    half, middle = torch.where(full, SIDE / 2, half), torch.where(full, SIDE / 2, middle)
    theta = torch.zeros(count, 2, 3, device=page.device)
    turn = torch.where(style.flip, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = turn * SIDE / 2 / half[:, 0], SIDE / 2 / half[:, 1]
    offset = (SIDE / 2 - middle) / half
    theta[:, 0, 2], theta[:, 1, 2] = turn * offset[:, 0], offset[:, 1]
    grid = F.affine_grid(theta, [count, 4, SIDE, SIDE], align_corners=False)
    cut = F.grid_sample(scenery.pixels[style.image.clamp(min=0)].float() / 255, grid, align_corners=False)
    dimmed = torch.where(style.full, dice.uniform(0.45, 1.05, count), 1.0).view(-1, 1, 1, 1)
    opacity = cut[:, 3:] * (style.image >= 0).view(-1, 1, 1, 1)
    color = (cut[:, :3] / cut[:, 3:].clamp(min=0.02)).clamp(0, 1) * dimmed
    return torch.lerp(page, color.clamp(0, 1), opacity), middle


def paint_bars(page: torch.Tensor, style: Style, layout: Layout, extents: torch.Tensor) -> torch.Tensor:
    """Pages with bars across them, or bubbles, behind the text at either edge."""
    axis = torch.arange(SIDE, device=page.device) + 0.5
    above = torch.arange(ROWS, device=page.device) < layout.split[:, None]  # (B, R)
    for group in (above, ~above):
        low = torch.where(group[..., None], extents[..., :2], 9999.0).amin(1) - 4  # (B, 2)
        high = torch.where(group[..., None], extents[..., 2:], -9999.0).amax(1) + 4
        low[:, 0] = torch.where(style.bar == 1, -99.0, low[:, 0])
        high[:, 0] = torch.where(style.bar == 1, SIDE + 99.0, high[:, 0])
        middle, half = (low + high) / 2, (high - low) / 2
        x = (axis[None, None, :] - middle[:, 0, None, None]).abs() - half[:, 0, None, None] + 6
        y = (axis[None, :, None] - middle[:, 1, None, None]).abs() - half[:, 1, None, None] + 6
        away = (x.clamp(min=0) ** 2 + y.clamp(min=0) ** 2).sqrt() - 6  # negative inside
        there = (style.bar > 0)[:, None, None] & (half[:, 1] > 0)[:, None, None]
        rim = ((1.5 - away).clamp(0, 1) * (there & (style.bar == 2)[:, None, None]))[:, None]
        inside = ((0.5 - away).clamp(0, 1) * there)[:, None]
        page = torch.lerp(page, style.bar_edge[:, :, None, None], rim)
        page = torch.lerp(page, style.bar_fill[:, :, None, None], inside)
    return page
