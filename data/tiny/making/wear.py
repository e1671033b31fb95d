"""Wear: what images go through before they are seen. Blur, lost resolution, JPEG, noise, faded colours."""

import math

import torch
import torch.nn.functional as F
from layout import Dice

# The quantisation table of the JPEG standard, annex K.1, for brightness.
QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def wear_out(dice: Dice, pages: torch.Tensor) -> torch.Tensor:
    """Pages (B, 3, SIDE, SIDE), some of them worn; from 0 to 1, in steps of 1/255."""
    count = len(pages)

    def some(probability: float, low: float, high: float) -> torch.Tensor:
        """(B, 1, 1, 1) a strength for that share of the pages, 0 for the others."""
        return (dice.happens(probability, count) * dice.uniform(low, high, count)).view(-1, 1, 1, 1)

    pages = ((pages - 0.5) * (1 - some(0.3, 0, 0.35)) + 0.5 + some(0.3, -0.12, 0.12)).clamp(0, 1)
    gray = pages.mean(1, keepdim=True)
    pages = torch.lerp(pages, gray.expand_as(pages), some(0.06, 1, 1))
    pages = lose_resolution(pages, some(0.2, 0.4, 1))
    blurred = F.avg_pool2d(F.pad(pages, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # Beyond 0 is a blur, below it the sharpness that resampling adds.
    pages = torch.lerp(pages, blurred, some(0.3, 0, 1) - some(0.35, 0, 0.7)).clamp(0, 1)
    is_worn = dice.happens(0.4, count).view(-1, 1, 1, 1)
    pages = torch.where(is_worn, compress(pages, dice.uniform(0.25, 2.5, count)), pages)
    pages = pages + some(0.15, 0.01, 0.06) * dice.normal(count, 1, *pages.shape[2:])
    return (pages.clamp(0, 1) * 255).round() / 255


def lose_resolution(pages: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Pages mixed with themselves at seven tenths of their size."""
    side = pages.shape[-1]
    small = F.interpolate(pages, size=round(side * 0.7), mode="bilinear", antialias=True)
    return torch.lerp(pages, F.interpolate(small, size=side, mode="bilinear"), shares)


def compress(pages: torch.Tensor, coarseness: torch.Tensor) -> torch.Tensor:
    """Pages whose blocks of 8 x 8 pixels have lost what JPEG drops; `coarseness` (B,) is the table's factor."""
    count, channels, height, width = pages.shape
    numbers = torch.arange(8, device=pages.device)
    waves = ((2 * numbers[None, :] + 1) * numbers[:, None] * math.pi / 16).cos() / 2  # (frequency, pixel)
    waves[0] /= math.sqrt(2)
    blocks = (pages * 255 - 128).reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = torch.tensor(QUANTISATION, device=pages.device) * coarseness.view(-1, 1, 1, 1, 1, 1)
    kept = ((waves @ blocks @ waves.T) / steps).round() * steps
    blocks = (waves.T @ kept @ waves).transpose(3, 4)
    return ((blocks.reshape(count, channels, height, width) + 128) / 255).clamp(0, 1)
