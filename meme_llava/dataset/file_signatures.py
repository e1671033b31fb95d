"""Names of file types by the way a file begins, for files that are not images of an accepted format."""

from collections.abc import Sequence

START_LENGTH = 32  # bytes that tell
SHOWN_LENGTH = 16
# What a file that is not an image starts with, and what it then is.
SIGNATURES = (
    (b"<!doctype html", "a web page: a failed download"),
    (b"<html", "a web page: a failed download"),
    (b"<?xml", "XML or SVG"),
    (b"<svg", "SVG"),
    (b"{", "JSON: an error message instead of a download"),
    (b"version https://git-lfs", "a git-lfs pointer; run git lfs pull"),
    (b"%!ps", "PostScript"),
    (b"%pdf", "PDF"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
)
# What the accepted formats start with: if Pillow does not know such a file, its header is damaged.
ACCEPTED_MARKS = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n", "PNG"), (b"GIF8", "GIF"), (b"RIFF", "WEBP"))
# Images of formats whose parsers stay closed: (place of the mark, mark, name).
CLOSED_FORMATS = (
    (0, b"8bps", "PSD"),
    (0, b"ii*\x00", "TIFF"),
    (0, b"mm\x00*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\x00\x00\x00\x0cjp  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjxl ", "JPEG XL"),
    (0, b"\x00\x00\x01\x00", "ICO"),
)


def identify_file_type(start: bytes, accepted_formats: Sequence[str]) -> tuple[str, str]:
    """The kind of finding about a file that Pillow does not know, and what it is.

    Args:
        start: its first bytes, `START_LENGTH` of them if it has that many.
        accepted_formats: what it should have been.
    """
    if not start:
        return "empty_file", "the file is empty"
    accepted = "/".join(accepted_formats)
    lower = start.lower()
    text = lower.removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, what in SIGNATURES:
        if text.startswith(mark):
            return "not_an_image", f"not a {accepted} image but {what}"
    for mark, name in ACCEPTED_MARKS:
        if start.startswith(mark):
            return "damaged_image", f"a {name} image whose header is truncated or damaged"
    for place, mark, name in CLOSED_FORMATS:
        if lower[place:].startswith(mark):
            return "unaccepted_format", f"a {name} image; convert it to one of {', '.join(accepted_formats)}"
    return "not_an_image", f"not a {accepted} image (starts with {start[:SHOWN_LENGTH]!r})"
