"""Layouts of pages, many at once: where the rows stand, how large their letters are, and what each patch holds.

B pages of R rows with at most L letters each; lengths are in pixels of a square of SIDE pixels. "Along" is the
direction of reading in a row, "across" the other one.
"""

import math
from dataclasses import dataclass

import torch
from glyphs import SANS_FONTS, Atlas
from meme_pages import PATCHES, SIDE
from texts import Alphabet, TextBank

ROWS = 10  # nine of text and a watermark
SLOTS = 3  # letters of a patch that are told apart
KINDS = ("none", "caption", "page", "column", "crowd")
SHARES = (0.1, 0.5, 0.16, 0.07, 0.17)
SMALLEST = 8.5  # pixels an em


@dataclass
class Layout:
    """Rows of letters and where they stand. Rows are in reading order; the last one is a watermark.

    Args:
        letters: (B, R, L) int64, numbers of the alphabet, 0 for none.
        labelled: (B, R) bool, whether a row is part of the text.
        faces: (B, R) int64.
        em: (B, R, 2) pixels an em along and across.
        advances: (B, R, L) pixels along that each letter takes.
        middles: (B, R, 2) x and y of the row's middle.
        angles: (B, R) radians.
        vertical: (B,) bool, whether rows are columns.
        split: (B,) int64, rows from here on stand at the other edge of the page.
        kinds: (B,) int64, which of KINDS.
    """

    letters: torch.Tensor
    labelled: torch.Tensor
    faces: torch.Tensor
    em: torch.Tensor
    advances: torch.Tensor
    middles: torch.Tensor
    angles: torch.Tensor
    vertical: torch.Tensor
    split: torch.Tensor
    kinds: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """(B, R) pixels along."""
        return self.advances.sum(-1)

    def place_letters(self) -> torch.Tensor:
        """(B, R, L, 2) x and y of every letter's middle."""
        along = self.advances.cumsum(-1) - self.advances / 2 - self.lengths[..., None] / 2
        angles = torch.where(self.vertical[:, None], self.angles + math.pi / 2, self.angles)[..., None]
        return self.middles[:, :, None] + torch.stack([along * angles.cos(), along * angles.sin()], dim=-1)


class Dice:
    """Random numbers of pages, from one generator."""

    def __init__(self, seed: int, device: str):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def happens(self, probability: float, *shape: int) -> torch.Tensor:
        return self.uniform(0, 1, *shape) < probability

    def below(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)

    def choose(self, weights: tuple[float, ...], *shape: int) -> torch.Tensor:
        """Numbers of weights, each as likely as its weight."""
        edges = torch.tensor(weights, device=self.device).cumsum(0)
        return torch.bucketize(self.uniform(0, float(edges[-1]), *shape), edges).clamp(max=len(weights) - 1)


def pick(values: list[float], kinds: torch.Tensor) -> torch.Tensor:
    """The value of each page's kind (B, 1)."""
    return torch.tensor(values, device=kinds.device)[kinds][:, None]


def plan_layout(
    dice: Dice,
    bank: TextBank,
    atlas: Atlas,
    count: int,
    shares: tuple[float, ...] = SHARES,
    aligned: tuple[float, float] = (0, 0),
) -> Layout:
    """Layouts of `count` pages; `aligned` is the share of those with a letter a patch, and how loose (see align)."""
    kinds = dice.choose(shares, count)
    vertical = kinds == KINDS.index("column")
    crowded = kinds == KINDS.index("crowd")
    most = dice.choose((0.5, 0.34, 0.16), count) + 1
    more = dice.below(4, count) + 2
    row_count = torch.where(kinds == 2, more, torch.where(crowded, ROWS - 1, most)) * (kinds > 0)
    active = torch.arange(ROWS, device=dice.device) < row_count[:, None]
    active[:, -1] = dice.happens(0.1, count) & (row_count < ROWS - 1)
    chosen = dice.below(bank.first_long, count, ROWS)
    long = bank.first_long + dice.below(len(bank.rows) - bank.first_long, count, ROWS)
    is_long = crowded[:, None] | dice.happens(0.08, count, ROWS)
    letters = bank.rows[torch.where(is_long, long, chosen)].long() * active[..., None]
    size = draw_sizes(dice, kinds, count)
    faces = choose_faces(dice, atlas.cells.shape[0], count)
    stretch = torch.exp(0.13 * dice.normal(count, 1)).clamp(0.6, 1.7)
    stretch = torch.where(dice.happens(0.12, count, 1), dice.uniform(0.6, 1.7, count, 1), stretch)
    em = torch.stack([size * torch.where(vertical[:, None], 1, stretch)] * 2, dim=-1)
    em[..., 1] = size * torch.where(vertical[:, None], stretch, 1)
    tracking = torch.where(
        dice.happens(0.07, count, 1), dice.uniform(1.1, 1.6, count, 1), 1 + 0.04 * dice.normal(count, 1).abs()
    )
    advances = atlas.advances[faces[..., None], letters] * (letters > 0) * tracking[..., None]  # ems
    letters, em, advances = fit_rows(dice, letters, em, advances)
    layout = stack_rows(dice, Layout(letters, active, faces, em, advances, em, size, vertical, most, kinds), row_count)
    layout.labelled[:, -1] = False
    if aligned[0]:
        align(layout, dice.happens(aligned[0], count).nonzero().flatten(), bank, dice, aligned[1])
    return layout


def align(layout: Layout, pages: torch.Tensor, bank: TextBank, dice: Dice, looseness: float) -> None:
    """Fill these pages (any,) with letters in the middles of all patches but those of the last row and column.

    Fully loose (1), the whole grid is shifted by up to a patch, and its letters are up to a sixth larger or smaller.
    """
    most = PATCHES - 1
    step = SIDE / PATCHES * torch.exp(looseness * dice.uniform(-0.17, 0.1, len(pages), 1))  # (pages, 1)
    long = bank.first_long + dice.below(len(bank.rows) - bank.first_long, len(pages), ROWS)
    letters = bank.rows[long].long()
    letters[:, most:], letters[:, :, most:] = 0, 0
    layout.letters[pages], layout.labelled[pages] = letters, (letters > 0).any(-1)
    layout.em[pages], layout.advances[pages] = step[..., None], (letters > 0) * step[..., None]
    shift = looseness * SIDE / PATCHES * dice.uniform(0, 1, len(pages), 1, 2)
    lines = torch.stack([torch.full((ROWS,), most / 2), torch.arange(ROWS) + 0.5], dim=-1).to(pages.device)
    layout.middles[pages] = (lines * step[..., None] + shift).clamp(max=SIDE - 8)
    layout.angles = layout.angles.clone()
    layout.angles[pages], layout.vertical[pages], layout.split[pages] = 0.0, False, ROWS


def draw_sizes(dice: Dice, kinds: torch.Tensor, count: int) -> torch.Tensor:
    """(B, R) pixels an em."""
    low, high = pick([9.0, 10.5, 9.0, 11.0, 8.5], kinds), pick([20.0, 34.0, 22.0, 38.0, 17.0], kinds)
    size = torch.exp(low.log() + (high / low).log() * dice.uniform(0, 1, count, 1)).expand(count, ROWS).clone()
    other = size * dice.uniform(0.55, 1.6, count, ROWS)
    size = torch.where(dice.happens(0.12, count, 1) & dice.happens(0.6, count, ROWS), other, size)
    size[:, -1] = dice.uniform(4.5, 8, count)
    return size


def choose_faces(dice: Dice, face_count: int, count: int) -> torch.Tensor:
    """(B, R) faces: mostly the same on a page, mostly without serifs."""
    sans = dice.below(min(SANS_FONTS, face_count), count, 1)
    page = torch.where(dice.happens(0.6, count, 1), sans, dice.below(face_count, count, 1))
    return torch.where(dice.happens(0.08, count, 1), dice.below(face_count, count, ROWS), page.expand(count, ROWS))


def fit_rows(
    dice: Dice, letters: torch.Tensor, em: torch.Tensor, advances: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that are too long get smaller letters, down to SMALLEST, or are cut. Advances come in ems, go in pixels."""
    count = len(letters)
    limit = torch.where(dice.happens(0.7, count, 1), 157.0, dice.uniform(100, 157, count, 1))
    share = (limit / (advances.sum(-1) * em[..., 0]).clamp(min=1)).clamp(max=1)  # (B, R)
    share = torch.where(dice.happens(0.85, count, 1), share[:, :-1].amin(1, keepdim=True).expand_as(share), share)
    share = torch.where(dice.happens(0.6, count, 1), share, 1.0)
    share[:, -1] = 1
    em = em * torch.maximum(share, (SMALLEST / em[..., 1]).clamp(max=1))[..., None]
    advances = advances * em[..., :1]
    fits = advances.cumsum(-1) <= limit[..., None]
    return letters * fits, em, advances * fits


def stack_rows(dice: Dice, layout: Layout, row_count: torch.Tensor) -> Layout:
    """Give rows their places: one under the other, at the upper edge, at the lower one, or at both."""
    count = len(layout.letters)
    is_caption = layout.kinds == KINDS.index("caption")
    lead = dice.uniform(1.08, 1.35, count, 1) + torch.where(
        dice.happens(0.2, count, 1), dice.uniform(0, 0.5, count, 1), 0
    )
    used = layout.labelled & (layout.lengths > 0)
    heights = layout.em[..., 1] * lead * used
    heights[:, -1] = 0
    shrink = (154 / heights.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)  # (B, 1)
    layout.em, layout.advances, heights = (
        layout.em * shrink[..., None],
        layout.advances * shrink[..., None],
        heights * shrink,
    )
    whole = heights.sum(1)
    way = dice.choose((0.6, 0.2, 0.2), count)  # below, above, both
    split = torch.where(way == 0, 0, torch.where(way == 1, ROWS, 1))
    split = torch.where(is_caption, split, ROWS)
    above = torch.arange(ROWS, device=dice.device) < split[:, None]  # (B, R)
    room = (SIDE - whole).clamp(min=2)
    edge = torch.minimum(dice.uniform(1, 11, count), room / 2)
    start = torch.where(is_caption, edge, room * dice.uniform(0.02, 0.98, count))
    before = heights.cumsum(1) - heights / 2
    across = torch.where(above, start[:, None] + before, SIDE - edge[:, None] - (whole[:, None] - before))
    lengths = layout.lengths
    low, high = lengths / 2 + 1, SIDE - 1 - lengths / 2
    align = dice.choose((0.66, 0.18, 0.16), count)[:, None]
    left = low + dice.uniform(0, 14, count, 1)
    free = low + (high - low) * dice.uniform(0, 1, count, ROWS)
    along = torch.where(align == 0, 80 + 2 * dice.normal(count, 1), torch.where(align == 1, left, free))
    along[:, -1], across[:, -1] = free[:, -1], dice.uniform(5, 155, count)
    along = torch.minimum(torch.maximum(along, low), high)
    vertical = layout.vertical[:, None]
    layout.middles = torch.stack(
        [torch.where(vertical, SIDE - across, along), torch.where(vertical, along, across)], -1
    )
    turned = dice.happens(0.1, count, 1) & ~vertical
    layout.angles = (0.09 * dice.normal(count, 1) * turned).clamp(-0.3, 0.3).expand(count, ROWS)
    layout.split, layout.labelled = split, used
    return layout


@dataclass
class Labels:
    """What pages say.

    Args:
        slots: (B, patches, SLOTS) int64, the letters whose middles lie in each patch, in reading order, 0 for none.
        places: (B, patches, SLOTS, 2), where in the patch a letter's middle is, from -0.5 to 0.5.
        text: (B, T) int64, all letters in reading order, 0 behind their end.
    """

    slots: torch.Tensor
    places: torch.Tensor
    text: torch.Tensor

    @property
    def text_lengths(self) -> torch.Tensor:
        return (self.text > 0).sum(1)


def make_label_table(alphabet: Alphabet, device: str) -> torch.Tensor:
    """(numbers,) int64: what is to be answered for each drawn character."""
    return torch.tensor([0] + [alphabet.label(number) for number in range(1, len(alphabet.drawn) + 1)], device=device)


def label_pages(layout: Layout, table: torch.Tensor) -> Labels:
    """The labels of pages; letters that are cut off by the page's edge count where their middle is inside."""
    count, patches = len(layout.letters), PATCHES**2
    answers = table[layout.letters] * layout.labelled[..., None]  # (B, R, L)
    answers, xy = answers.reshape(count, -1), layout.place_letters().reshape(count, -1, 2)
    cell = (xy * PATCHES / SIDE).clamp(0, PATCHES - 1e-3)
    patch = cell[..., 1].long() * PATCHES + cell[..., 0].long()
    patch = torch.where(answers > 0, patch, patches)
    # A letter's slot is how many letters before it lie in its patch.
    order = patch.argsort(dim=1, stable=True)
    in_order = patch.gather(1, order)
    place = torch.arange(patch.shape[1], device=patch.device).expand_as(patch)
    first = torch.searchsorted(in_order, in_order)
    slot = torch.empty_like(patch).scatter_(1, order, place - first)
    keep = (answers > 0) & (slot < SLOTS)
    target = torch.where(keep, patch * SLOTS + slot, patches * SLOTS)
    slots = torch.zeros(count, patches * SLOTS + 1, dtype=torch.long, device=patch.device).scatter_(1, target, answers)
    places = torch.zeros(count, patches * SLOTS + 1, 2, device=patch.device)
    places.scatter_(1, target[..., None].expand(-1, -1, 2), cell - cell.floor() - 0.5)
    has = answers > 0
    text = torch.zeros(count, has.shape[1] + 1, dtype=torch.long, device=patch.device)
    text.scatter_(1, torch.where(has, has.cumsum(1) - 1, has.shape[1]), answers)
    return Labels(
        slots[:, :-1].reshape(count, patches, SLOTS), places[:, :-1].reshape(count, patches, SLOTS, 2), text[:, :-1]
    )
