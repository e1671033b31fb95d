"""Images as tensors: uint8 pixels for batches, normalised values for a vision tower."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meme_llava.dataset.images import MAX_PIXELS, ImagePolicy, fit_to_square, open_image


def read_pixels(path: Path, policy: ImagePolicy, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Pixels of a file in a model's square, uint8 (3, size, size); raises as `open_image` does."""
    return to_pixels(open_image(path, policy, max_pixels), policy)


def to_pixels(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize an RGB image. Returns uint8 of shape (3, size, size)."""
    pixels = np.asarray(fit_to_square(image, policy))  # (size, size, 3)
    # Copied by NumPy, which starts no threads: loader processes share the CPUs already.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def normalise(pixels: torch.Tensor, policy: ImagePolicy) -> torch.Tensor:
    """Pixels as a vision tower takes them: uint8 (…, 3, size, size) to float32 of the same shape, on their device."""
    # A number instead of the first would make CUDA multiply by its inverse, which differs in the last bit. The copies
    # need not wait until a GPU has done all that it was asked to before.
    largest, mean, std = (
        torch.tensor(numbers).to(pixels.device, non_blocking=True).view(-1, 1, 1)
        for numbers in ((255.0,), policy.mean, policy.std)
    )
    return (pixels.float() / largest - mean) / std


def to_pixel_values(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize and normalise an RGB image. Returns float32 of shape (3, size, size)."""
    return normalise(to_pixels(image, policy), policy)
