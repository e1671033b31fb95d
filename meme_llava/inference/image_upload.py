"""Knows how a picture is sent to a server: as training sees it, as JPEG, in a data URL."""

import base64
import io
from pathlib import Path

from PIL import Image

from meme_llava.dataset.images import open_image

JPEG_QUALITY = 90


def encode_picture(path: Path, max_side: int) -> bytes:
    """The picture as training sees it, scaled down to `max_side` pixels if it is larger, as JPEG.

    Raises:
        ValueError: the file is no picture; with the reason.
    """
    picture = open_image(path)
    longest = max(picture.size)
    if longest > max_side:
        size = tuple(max(1, round(side * max_side / longest)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def make_data_url(jpeg: bytes) -> str:
    """A JPEG as the address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
