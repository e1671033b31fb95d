"""Images on their way to a server: as training sees them, as JPEG, in a data URL."""

import base64
import io
from pathlib import Path

from PIL import Image

from meme_llava.dataset.images import open_image

JPEG_QUALITY = 90


def encode_image(path: Path, max_side: int) -> bytes:
    """The image as training sees it, scaled down to `max_side` pixels if it is larger, as JPEG.

    Raises:
        ValueError: the file is not an image; with the reason.
    """
    image = open_image(path)
    longest = max(image.size)
    if longest > max_side:
        size = tuple(max(1, round(side * max_side / longest)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def make_data_url(jpeg: bytes) -> str:
    """A JPEG as the address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
