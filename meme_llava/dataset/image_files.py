"""What files are by their names and first bytes: images that are opened, images that are not, something else.

Nothing about what an image shows.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

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


def _find_closed_format(start: bytes) -> str | None:
    # A length stands in front of this mark.
    mark = start.lower()[4 if start[4:8] == b"ftyp" else 0 :]
    return next((name for name, marks in _CLOSED.items() if mark.startswith(marks)), None)


def identify_file_type(start: bytes) -> tuple[str, str]:
    """The kind of finding about a file that Pillow does not know, and what it is.

    Args:
        start: its first bytes, `START_LENGTH` of them if it has that many.
    """
    if not start:
        return "empty_file", "the file is empty"
    accepted, text = "/".join(ACCEPTED_FORMATS), start.lower().removeprefix(b"\xef\xbb\xbf").lstrip()
    for what, marks in _NOT_IMAGES.items():
        if text.startswith(marks):
            return "not_an_image", f"not a {accepted} image but {what}"
    # Pillow does not know the file all the same.
    if name := find_accepted_format(start):
        return "damaged_image", f"a {name} image whose header is truncated or damaged"
    if name := _find_closed_format(start):
        return "unaccepted_format", f"an image in {name} format; convert it to one of {', '.join(ACCEPTED_FORMATS)}"
    return "not_an_image", f"not a {accepted} image (starts with {start[:16]!r})"


def find_images(folder: Path, subfolders: bool = True) -> tuple[list[Path], dict[str, list[Path]]]:
    """The images of a folder, sorted, and what is left out, by reason.

    A file is an image by its ending or, with another ending or none, by its first bytes.

    Args:
        subfolders: look into them, too.
    """
    images, left_out = [], defaultdict(list)
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if reason := _find_reason(path, subfolders):
                left_out[reason].append(path)
            elif not path.is_dir():
                images.append(path)
        folders[:] = [name for name in folders if subfolders and not name.startswith(".")]
    return sorted(images), {reason: sorted(left_out[reason]) for reason in sorted(left_out)}


def _raise(error: OSError) -> None:
    raise error


def read_start(path: Path) -> bytes:
    """The first bytes of a file, which tell what it is."""
    with path.open("rb") as file:
        return file.read(START_LENGTH)


def _find_reason(path: Path, subfolders: bool) -> str:
    """Why a file is no image to be opened, or a folder is not looked into; empty if it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "subfolder(s) not looked into" if not subfolders else "behind a link" if path.is_symlink() else ""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ""
    try:
        # A pipe would block for ever.
        start = read_start(path) if path.is_file() else b""
    except OSError:
        return "unreadable"
    if find_accepted_format(start):
        return ""
    name = _find_closed_format(start)
    return f"in {name} format, to be converted" if name else "not an image"


def describe_left_out(left_out: Mapping[str, Sequence[Path]]) -> str:
    """What `find_images` leaves out, for a message: "2 hidden, e.g. .a.jpg; 1 not an image, e.g. b.txt"."""
    return "; ".join(f"{len(paths):,} {reason}, e.g. {paths[0].name}" for reason, paths in left_out.items())
