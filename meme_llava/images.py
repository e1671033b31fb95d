"""Knows how an image file becomes pixels: formats, transparency, EXIF, animation, size.

The same functions serve training, inference and every check, so a model sees in use what it saw in training.
Knows nothing about prompts or batches.
"""

import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from meme_llava.errors import UserError

# Only parsers for pictures that memes come in; PostScript, PSD and the like stay closed.
ACCEPTED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
# A header can promise more pixels than memory holds; real memes stay far below.
MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)
# Pillow reads the picture all the same, and a broken tag is treated as none.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


@dataclass(frozen=True)
class ImagePolicy:
    """How a picture of any shape becomes the square a vision tower expects.

    The whole picture is resized to the square ("squash"): a centre crop would cut words off wide memes.
    """

    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_image_processor(cls, image_processor, source: str) -> "ImagePolicy":
        """Read the policy from a transformers image processor; `source` names its folder in errors."""
        size = dict(image_processor.size)
        if size.get("height") != size.get("width") or not size.get("height"):
            raise UserError(
                f"{source}: the image processor resizes to {size}, expected a square such as "
                "{'height': 336, 'width': 336}. Build the model with build_base_model.py."
            )
        if getattr(image_processor, "do_center_crop", False):
            raise UserError(
                f"{source}: the image processor crops the centre, which cuts words off wide memes. "
                "Build the model with build_base_model.py, which stores the whole-picture policy."
            )
        resample = Image.Resampling(image_processor.resample)
        return cls(size["height"], tuple(image_processor.image_mean), tuple(image_processor.image_std), resample)


def resolve_image_path(image: str, image_folder: Path) -> Path:
    """The file of a record's `image`, which must lie inside `image_folder` (symbolic links followed).

    Raises:
        ValueError: the path is absolute, a URL, or leaves the folder.
    """
    if "\0" in image or "://" in image or "\\" in image or os.path.isabs(image):
        raise ValueError(f"image {image!r} is not a path relative to the image folder")
    root = image_folder.resolve()
    try:
        path = (root / image).resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a loop of links
        raise ValueError(f"image {image!r} cannot be followed ({error})") from error
    if not path.is_relative_to(root):
        raise ValueError(f"image {image!r} leaves the image folder {root}")
    return path


def open_image(path: Path) -> Image.Image:
    """Open a file as the RGB picture a person would see.

    The first frame of an animation, EXIF rotation applied, transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: with a reason a person can act on (missing, not a picture, truncated, too large).
    """
    image = _open_header(path)
    try:
        with image:
            image.load()
            upright = ImageOps.exif_transpose(image) if image.getexif() else image
            return _to_rgb(upright)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: the picture is damaged ({error})") from error


def check_image(path: Path) -> None:
    """Raise ValueError if `path` is not a picture of an accepted format and size; reads the header only."""
    _open_header(path).close()


def to_pixel_values(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize and normalise an RGB picture. Returns float32 of shape (3, size, size)."""
    squashed = image.resize((policy.size, policy.size), policy.resample)
    pixels = np.asarray(squashed, dtype=np.float32) / 255.0  # (size, size, 3)
    pixels = (pixels - np.float32(policy.mean)) / np.float32(policy.std)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _open_header(path: Path) -> Image.Image:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    # A pipe would block for ever, a device would never end.
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file")
    try:
        image = Image.open(path, formats=ACCEPTED_FORMATS)
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            start = file.read(16)
        if not start:
            raise ValueError(f"{path}: the file is empty") from error
        raise ValueError(f"{path}: not a {'/'.join(ACCEPTED_FORMATS)} picture (starts with {start!r})") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if math.prod(image.size) > MAX_PIXELS:
        width, height = image.size
        image.close()
        raise ValueError(f"{path}: {width}x{height} pixels, more than the limit of {MAX_PIXELS:,}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey to white instead of scaling it.
        values = np.asarray(image)
        grey = (values / np.float32(257.0)).round().clip(0, 255).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey, mode="L").convert("RGB")
    if image.has_transparency_data:
        # Stickers keep arbitrary colours under transparent pixels; white is what chat windows show.
        transparent = image.convert("RGBA")
        background = Image.new("RGBA", transparent.size, (*WHITE, 255))
        return Image.alpha_composite(background, transparent).convert("RGB")
    return image.convert("RGB")
