"""Style of pages: colours, outlines, bars and images that leave the text legible."""

from dataclasses import dataclass

import torch
from layout import ROWS, SIDE, Dice, Layout
from scenery import Scenery

BRIGHT = ((1.0, 0.95, 0.48), (1.0, 0.82, 0.88), (0.79, 0.97, 1.0), (0.55, 0.95, 0.4), (1.0, 0.6, 0.2))
DARK = ((0.7, 0.15, 0.12), (0.12, 0.3, 0.61), (0.42, 0.18, 0.61), (0.08, 0.4, 0.24), (0.85, 0.1, 0.35))


@dataclass
class Style:
    """How a page looks.

    Args:
        fill, edge: (B, R, 3) colours of letters and outlines.
        outline: (B,) int64 pixels of FINE, 0 for none.
        bold: (B,) int64, likewise, of the letters themselves.
        opacity: (B, R) of letters.
        ground: (B, 3) colour of the page; shade: (B, 3) the one at the other end of a gradient.
        image: (B,) int64 number in the scenery, -1 for none.
        full: (B,) bool, whether the image fills the page.
        box: (B, 4) otherwise: left, top, right and bottom of the room it has.
        flip: (B,) bool.
        bar: (B,) int64, 0 for none, 1 for bars behind the text, 2 for bubbles.
        bar_fill, bar_edge: (B, 3).
    """

    fill: torch.Tensor
    edge: torch.Tensor
    outline: torch.Tensor
    bold: torch.Tensor
    opacity: torch.Tensor
    ground: torch.Tensor
    shade: torch.Tensor
    image: torch.Tensor
    full: torch.Tensor
    box: torch.Tensor
    flip: torch.Tensor
    bar: torch.Tensor
    bar_fill: torch.Tensor
    bar_edge: torch.Tensor


def measure_rows(layout: Layout) -> torch.Tensor:
    """(B, R, 4) left, top, right and bottom of every row; a row without letters lies outside of everything."""
    half = torch.stack([layout.lengths / 2, layout.em[..., 1] * 0.55], dim=-1)
    half = torch.where(layout.vertical[:, None, None], half.flip(-1), half)
    box = torch.cat([layout.middles - half, layout.middles + half], dim=-1)
    nowhere = torch.tensor([9999.0, 9999.0, -9999.0, -9999.0], device=box.device)
    return torch.where(layout.labelled[..., None], box, nowhere)


def find_room(layout: Layout, extents: torch.Tensor) -> torch.Tensor:
    """(B, 4) the largest of the parts of each page above, below, between or beside its text."""
    outer_low, outer_high = extents[..., :2].amin(1), extents[..., 2:].amax(1)  # (B, 2)
    sides = torch.tensor([0.0, 0.0, SIDE, SIDE], device=extents.device).expand(len(extents), 4)
    above, below, between, left, right = (sides.clone() for _ in range(5))
    above[:, 3], below[:, 1] = outer_low[:, 1], outer_high[:, 1]
    between[:, 1], between[:, 3] = extents[:, 0, 3], extents[:, 1:-1, 1].amin(1)
    between[:, 3] = torch.where(layout.split == 1, between[:, 3], between[:, 1])
    left[:, 2], right[:, 0] = outer_low[:, 0], outer_high[:, 0]
    rooms = torch.stack([above, below, between, left, right], dim=1).clamp(0, SIDE)  # (B, 5, 4)
    areas = (rooms[..., 2:] - rooms[..., :2]).clamp(min=0).prod(-1)
    return rooms[torch.arange(len(rooms), device=rooms.device), areas.argmax(1)]


def choose_style(dice: Dice, layout: Layout, scenery: Scenery, extents: torch.Tensor) -> Style:
    """Colours, image and outlines that leave the text legible."""
    count, device = len(layout.letters), dice.device
    kind = dice.choose((0.36, 0.29, 0.24, 0.11), count)  # figure, cartoon, photo, nothing
    starts = torch.tensor([*scenery.starts, scenery.starts[-1]], device=device)
    low, high = starts[kind], starts[(kind + 1).clamp(max=3)]
    image = (low + (dice.uniform(0, 1, count) * (high - low)).long()).clamp(max=scenery.starts[-1] - 1)
    image = torch.where(kind == 3, -1, image)
    room = find_room(layout, extents)
    small = (room[:, 2:] - room[:, :2]).amin(1) < 30
    anywhere = small | dice.happens(0.12, count)
    full = (kind == 2) & dice.happens(0.8, count)
    image = torch.where(anywhere & ~full & dice.happens(0.6, count), -1, image)
    wide = dice.uniform(60, 150, count)
    x, y = dice.uniform(0, 1, count) * (SIDE - wide), dice.uniform(0, 1, count) * (SIDE - wide)
    box = torch.where(anywhere[:, None], torch.stack([x, y, x + wide, y + wide], dim=1), room)
    ground, is_dark = choose_ground(dice, count)
    busy = full | (anywhere & (image >= 0))
    fill, edge, outlined = choose_inks(dice, count, is_dark, busy)
    bar = dice.choose((0.82, 0.1, 0.08), count) * (layout.kinds == 1)
    bar_dark = dice.happens(0.4, count)
    black, white = torch.zeros(count, 3, device=device), torch.ones(count, 3, device=device)
    bar_fill = torch.where((bar_dark & (bar == 1))[:, None], black, white)
    bar_ink = torch.where((bar_dark & (bar == 1))[:, None], white, black)
    fill = torch.where((bar > 0)[:, None, None], bar_ink[:, None], fill)
    size = layout.em[:, :-1].amin(-1).clamp(max=60).amax(1)  # (B,)
    outline = (size * 2 * dice.uniform(0.035, 0.085, count)).round().long().clamp(1, 3) * (outlined & (bar == 0))
    bold = ((size > 17) & dice.happens(0.08, count)).long()
    opacity = torch.ones(count, ROWS, device=device)
    opacity[:, -1] = dice.uniform(0.25, 0.8, count)
    shade = torch.where(dice.happens(0.2, count)[:, None], (ground + 0.18 * dice.normal(count, 3)).clamp(0, 1), ground)
    return Style(
        fill,
        edge,
        outline,
        bold,
        opacity,
        ground,
        shade,
        image,
        full,
        box,
        dice.happens(0.5, count),
        bar,
        bar_fill,
        black,
    )


def choose_ground(dice: Dice, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours (B, 3): white, pale, any, dark; and whether (B,) letters on it have to be bright."""
    way = dice.choose((0.62, 0.14, 0.14, 0.1), count)[:, None]
    color = dice.uniform(0, 1, count, 3)
    ground = torch.where(way == 0, 1 - 0.05 * color**4, torch.where(way == 1, 0.8 + 0.2 * color, color))
    ground = torch.where(way == 3, 0.2 * color, ground)
    luminance = ground @ torch.tensor([0.3, 0.59, 0.11], device=dice.device)
    return ground, luminance < 0.5


def choose_inks(
    dice: Dice, count: int, is_dark: torch.Tensor, busy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colours of letters and outlines (B, R, 3), and whether (B,) there are outlines."""
    dark, bright = (torch.tensor(colors, device=dice.device) for colors in (DARK, BRIGHT))
    colored = dice.happens(0.16, count, 1)
    near_black = 0.16 * dice.uniform(0, 1, count, 1) ** 2 * torch.ones(1, 3, device=dice.device)
    dark = torch.where(colored, dark[dice.below(len(dark), count)], near_black)
    bright = torch.where(colored, bright[dice.below(len(bright), count)], 1 - near_black)
    outlined = torch.where(busy, dice.happens(0.75, count), dice.happens(0.12, count))
    swapped = outlined & dice.happens(0.2, count)
    use_bright = (is_dark | busy) ^ swapped
    fill = torch.where(use_bright[:, None], bright, dark)
    edge = torch.where(use_bright[:, None], near_black, 1 - near_black)
    return fill[:, None].repeat(1, ROWS, 1), edge[:, None].repeat(1, ROWS, 1), outlined


def make_plain(style: Style, is_plain: torch.Tensor) -> None:
    """Black on white on these pages (B,)."""
    for name, value in (("fill", 0.0), ("ground", 1.0), ("shade", 1.0), ("image", -1), ("outline", 0), ("bar", 0)):
        tensor = getattr(style, name)
        setattr(style, name, torch.where(is_plain.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
