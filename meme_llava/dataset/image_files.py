"""What files are by their names and first bytes: images that are opened, images that are not, something else.

Nothing about what an image shows.
"""

import re

# Only parsers for images that memes come in; PostScript, PSD and the like stay closed.
ACCEPTED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
EXTENSIONS = {
    "JPEG": {".jpg", ".jpeg", ".jfif", ".jpe"},
    "PNG": {".png", ".apng"},
    "GIF": {".gif"},
    "WEBP": {".webp"},
    "BMP": {".bmp", ".dib"},
}
IMAGE_SUFFIXES = frozenset().union(*EXTENSIONS.values())
START_LENGTH = 32  # bytes that tell what a file is
# What files of the accepted formats begin with.
_ACCEPTED = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n",
    "GIF": rb"GIF8",
    "WEBP": rb"RIFF(.{4}WEBP|.{0,7}$)",  # other files of Microsoft's begin so, too
    "BMP": rb"BM.{4}\0{4}",
}
# How files that are not images begin, in lower case.
_NOT_IMAGES = {
    "a web page: a failed download": (b"<!doctype html", b"<html"),
    "XML or SVG": (b"<?xml",),
    "SVG": (b"<svg",),
    "JSON: an error message instead of a download": (b"{",),
    "a git-lfs pointer; run git lfs pull": (b"version https://git-lfs",),
    "PostScript": (b"%!ps",),
    "PDF": (b"%pdf",),
    "a zip archive": (b"pk\x03\x04",),
    "a gzip archive": (b"\x1f\x8b",),
}
# Images of formats whose parsers stay closed, in lower case.
_CLOSED = {
    "PSD": (b"8bps",),
    "TIFF": (b"ii*\x00", b"mm\x00*"),
    "AVIF": (b"ftypavi",),
    "HEIF": (b"ftyphei", b"ftypmif1"),
    "JPEG 2000": (b"\x00\x00\x00\x0cjp  ",),
    "JPEG XL": (b"\xff\x0a", b"\x00\x00\x00\x0cjxl "),
    "ICO": (b"\x00\x00\x01\x00",),
}


def has_image_name(text: str) -> bool:
    """Whether a text ends as the names of image files do, or is an image in a data: URL."""
    return text.lower().endswith(tuple(IMAGE_SUFFIXES)) or text.startswith("data:image/")


def find_accepted_format(start: bytes) -> str | None:
    """The format of a file that begins like an image that is accepted; None for every other."""
    return next((name for name, mark in _ACCEPTED.items() if re.match(mark, start, re.DOTALL)), None)


def identify_file_type(start: bytes) -> tuple[str, str]:
    """The kind of finding about a file that Pillow does not know, and what it is.

    Args:
        start: its first bytes, `START_LENGTH` of them if it has that many.
    """
    if not start:
        return "empty_file", "the file is empty"
    accepted, lower = "/".join(ACCEPTED_FORMATS), start.lower()
    text = lower.removeprefix(b"\xef\xbb\xbf").lstrip()
    # A length stands in front of this mark.
    binary = lower[4:] if lower[4:8] == b"ftyp" else lower
    for what, marks in _NOT_IMAGES.items():
        if text.startswith(marks):
            return "not_an_image", f"not a {accepted} image but {what}"
    # Pillow does not know the file all the same.
    if name := find_accepted_format(start):
        return "damaged_image", f"a {name} image whose header is truncated or damaged"
    for name, marks in _CLOSED.items():
        if binary.startswith(marks):
            return "unaccepted_format", f"an image in {name} format; convert it to one of {', '.join(ACCEPTED_FORMATS)}"
    return "not_an_image", f"not a {accepted} image (starts with {start[:16]!r})"
