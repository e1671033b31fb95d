"""Image files, opened: formats, transparency, EXIF, animation, size.

The same functions serve preparation, check, training and inference, so a model sees in use what it saw in training.
Nothing about prompts or batches.
"""

import base64
import io
import math
import os
import stat
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from meme_llava.dataset.findings import MAX_PIXELS, RecordFault
from meme_llava.dataset.image_files import ACCEPTED_FORMATS, identify_file_type, read_start
from meme_llava.errors import UserError, is_utf8

# Our own limit stands in front of every decoding; Pillow's would only warn up to twice its own.
Image.MAX_IMAGE_PIXELS = None
ORIENTATION_TAG = 0x0112
# How an image is turned upright, by its orientation tag; 0 is not a value of the standard, and common.
_TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {tag: Image.Transpose[name] for tag, name in enumerate(_TURN_NAMES.split(), start=2)}
# What Pillow's parsers were seen to raise, or may, on damaged files.
PARSER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError)
PARSER_ERRORS += (ArithmeticError, RuntimeError, struct.error)
# Pillow reads the image all the same, and a broken tag is treated as none.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin", category=UserWarning)

Resize = Literal["squash", "pad", "crop"]


@dataclass(frozen=True)
class ImagePolicy:
    """How an image of any shape becomes the square a vision tower expects.

    squash: the whole image is resized to the square, as Chinese-CLIP does.
    pad: it is put on a square of the mean colour, then resized, as LLaVA-1.5 does.
    crop: its shorter side is resized, and what the longer side has beyond the square is cut off, as CLIP does.
    """

    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC
    resize: Resize = "squash"

    @classmethod
    def from_image_processor(cls, image_processor, source: str) -> "ImagePolicy":
        """Read the policy from a transformers image processor; `source` names its folder in errors."""
        crops = bool(getattr(image_processor, "do_center_crop", False))
        pads = bool(getattr(image_processor, "do_pad", False))
        size = {key: value for key, value in dict(image_processor.size).items() if value is not None}
        if crops and pads:
            raise UserError(f"{source}: the image processor pads and crops, expected one of them")
        if crops:
            cut = dict(image_processor.crop_size)
            if set(size) != {"shortest_edge"} or not cut["height"] == cut["width"] == size["shortest_edge"]:
                raise UserError(
                    f"{source}: the image processor resizes to {size} and crops {cut}, expected a shortest edge and a "
                    "square of the same length. Build the model with build_base_model.py."
                )
            side = size["shortest_edge"]
        elif set(size) == {"height", "width"} and size["height"] == size["width"]:
            side = size["height"]
        else:
            raise UserError(
                f"{source}: the image processor resizes to {size}, expected a square such as "
                "{'height': 336, 'width': 336}. Build the model with build_base_model.py."
            )
        resize = "crop" if crops else "pad" if pads else "squash"
        resample = Image.Resampling(image_processor.resample)
        return cls(side, tuple(image_processor.image_mean), tuple(image_processor.image_std), resample, resize)

    def measure_reduction(self, width: int, height: int) -> float:
        """How many pixels of an image become one, along the side that is reduced least."""
        return (max if self.resize == "pad" else min)(width, height) / self.size


def resolve_image_path(image: str, image_folder: Path) -> Path:
    """The file of a record's `image`, which must lie inside `image_folder` (symbolic links followed).

    Raises:
        RecordFault: the path is absolute, a URL, leaves the folder, or is not a name that a file can have.
    """
    if "\0" in image or "://" in image or "\\" in image or os.path.isabs(image):
        advice = "; write / in place of \\" if "\\" in image else ""
        raise RecordFault("unsafe_path", f"image {image!r} is not a path relative to the image folder{advice}")
    try:
        os.fsencode(image)
    except UnicodeEncodeError as error:
        why = "holds half a character, as no name does"
        if is_utf8(image):
            why = f"has no name in {sys.getfilesystemencoding()}, in which this system writes names; set PYTHONUTF8=1"
        raise RecordFault("missing_image", f"image {image!r} {why}") from error
    root = image_folder.resolve()
    try:
        path = (root / image).resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a loop of links
        raise RecordFault("unsafe_path", f"image {image!r} cannot be followed ({error})") from error
    if not path.is_relative_to(root):
        raise RecordFault("unsafe_path", f"image {image!r} leaves the image folder {root}")
    return path


def open_image(path: Path, policy: ImagePolicy | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a file as the RGB image a person would see.

    The first frame of an animation, EXIF rotation applied, transparency on white, 16-bit grey scaled to 8 bits.

    Args:
        policy: what the image is opened for. A JPEG more than four times too large is decoded at 1/2, 1/4 or 1/8 of
            its size, never below twice what the policy needs, which takes a fraction of the time.

    Raises:
        RecordFault: with a reason a person can act on (missing, not an image, truncated, too large).
    """
    image = open_header(path, max_pixels)
    try:
        with image:
            if policy is not None and image.format == "JPEG":
                factor = policy.measure_reduction(*image.size) / 2
                if factor >= 2:
                    image.draft(None, (math.ceil(image.width / factor), math.ceil(image.height / factor)))
            image.load()
            # ImageOps.exif_transpose also writes the tags anew, which fails where another one of them is damaged.
            turn = TURNS.get(image.getexif().get(ORIENTATION_TAG))
            return _to_rgb(image if turn is None else image.transpose(turn))
    except PARSER_ERRORS as error:
        raise RecordFault("damaged_image", f"{path}: the image is damaged ({error})") from error


def fit_to_square(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    """Make an RGB image of any shape size x size pixels, as the policy says."""
    size = policy.size
    width, height = image.size
    if policy.resize == "crop":
        shorter = min(width, height)
        # Rounded down as transformers does, so that both cut at the same pixel.
        image = image.resize((int(size * width / shorter), int(size * height / shorter)), policy.resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))
    if policy.resize == "pad" and width != height:
        side = max(width, height)
        # The mean is rounded down as transformers' LlavaImageProcessor does.
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in policy.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return image.resize((size, size), policy.resample)


def to_data_url(image: Image.Image, kind: Literal["JPEG", "PNG", "WEBP"], quality: int = 75) -> str:
    """The image as a file of this kind, in a data: URL; PNG knows no quality."""
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def open_header(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file without decoding it. Raises RecordFault unless format and size are accepted."""
    try:
        # A pipe would block for ever, a device would never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecordFault("unreadable_file", f"{path}: not a regular file")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordFault("missing_image", f"{path}: {error.strerror}") from error
    except OSError as error:
        raise RecordFault("unreadable_file", f"{path}: {error.strerror or error}") from error
    try:
        image = Image.open(path, formats=ACCEPTED_FORMATS)
    except UnidentifiedImageError as error:
        kind, what = identify_file_type(read_start(path))
        raise RecordFault(kind, f"{path}: {what}") from error
    except PARSER_ERRORS as error:
        # Pillow's own errors about a header have no errno; those of the file system do.
        kind = "unreadable_file" if getattr(error, "errno", None) else "damaged_image"
        raise RecordFault(kind, f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if image.format == "MPO":
        # Phones append previews and depth maps to a JPEG; its beginning is the image.
        image.format = "JPEG"
    if math.prod(image.size) > max_pixels:
        width, height = image.size
        image.close()
        raise RecordFault(
            "too_many_pixels", f"{path}: {width}x{height} pixels, more than the limit of {max_pixels:,}; scale it down"
        )
    return image


def list_header_notes(image: Image.Image) -> Iterator[tuple[str, str]]:
    """What is unusual about an opened image and how it is taken, as (kind of finding, detail)."""
    if image.mode == "CMYK":
        yield "cmyk", "CMYK"
    elif image.mode.startswith("I") or any(";16" in str(tile.args) for tile in image.tile):
        yield "sixteen_bit", image.mode
    elif image.mode == "P":
        yield "palette", image.mode
    if image.has_transparency_data:
        yield "transparent", image.mode
    orientation = image.getexif().get(ORIENTATION_TAG)
    if orientation in TURNS:
        yield "exif_rotation", f"orientation {orientation}"
    # Last, since counting goes through all frames, and a damaged one leaves the image in its middle.
    try:
        frames = getattr(image, "n_frames", 1)
    except PARSER_ERRORS as error:
        yield "damaged_animation", f"its frames cannot be counted ({error})"
        return
    # A photo that carries its preview or its depth (MPO) does not move.
    if frames > 1 and image.format != "JPEG":
        yield "animated", f"{frames} frames"


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
        background = Image.new("RGBA", transparent.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, transparent).convert("RGB")
    return image.convert("RGB")
