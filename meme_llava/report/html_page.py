"""What our self-contained HTML pages have in common: escaping, small images, look.

A page needs no network, and its content security policy lets no script run but its own.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.cells import cell_len

from meme_llava import count_cores
from meme_llava.dataset.images import open_image

FOLDER = Path(__file__).parent
THUMBNAIL_SIDE = 200  # pixels of the longer side
THUMBNAIL_QUALITY = 75
# Every thread holds one decoded image, so this bounds the memory.
THUMBNAIL_THREADS = min(4, count_cores())
LONG_TEXT = 120  # columns, a Chinese letter takes two; shorter texts never need folding
# Controls that reorder, hide or break text, and half characters, which no file can hold.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


@dataclass(frozen=True)
class Thumbnail:
    """A small image in a data: URL, or why there is none."""

    name: str
    url: str = ""  # data: URL, empty if the file cannot be shown
    size: str = ""  # of the image itself
    reason: str = ""  # why it cannot be shown


def make_thumbnails(paths: Sequence[Path], max_pixels: int) -> list[Thumbnail]:
    """A small image of every file, in their order; images of more pixels are not decoded."""
    with ThreadPoolExecutor(THUMBNAIL_THREADS) as pool:
        return list(pool.map(partial(_make_thumbnail, max_pixels=max_pixels), paths))


def render_page(template: str, title: str, filters: dict | None = None, **values) -> str:
    """The page of a template of this folder, which fills the blocks of html_page.html; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sha256": _hash_script, "is_long": _is_long, **(filters or {})}
    environment.globals |= {"label": _label} | {
        name: Markup((FOLDER / file).read_text(encoding="utf-8"))
        for name, file in (("style", "html_page.css"), ("gallery_script", "gallery.js"))
    }
    return environment.get_template(template).render(title=title, **values)


def _make_thumbnail(path: Path, max_pixels: int) -> Thumbnail:
    try:
        image = open_image(path, max_pixels=max_pixels)
    except ValueError as error:
        return Thumbnail(path.name, reason=str(error).removeprefix(f"{path}: "))
    size = f"{image.width}×{image.height}"
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=THUMBNAIL_QUALITY)
    url = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(path.name, url, size)


def make_visible(value):
    """Text as it may be shown: a control that would reorder or hide its neighbours is written out instead."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", value)


def _label(english: str, chinese: str) -> Markup:
    """A heading or button in both languages."""
    template = Markup('<span class="label">{} <span class="zh" lang="zh-CN">{}</span></span>')
    return template.format(make_visible(english), make_visible(chinese))


def _hash_script(script: Markup) -> str:
    """What a content security policy calls the script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _is_long(text: str) -> bool:
    return cell_len(text) > LONG_TEXT or text.count("\n") > 1
