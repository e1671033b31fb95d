"""What our self-contained HTML pages have in common: escaping, small images, look, and charts by matplotlib as SVG.

A page needs no network, and its content security policy lets no script run but its own.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.cells import cell_len

from meme_llava import count_cores
from meme_llava.dataset.images import open_image, to_data_url

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
MAX_POINTS = 240  # of a line in a chart
COLOURS = 8  # of the page, var(--c0) to var(--c7)
# What matplotlib draws with, and what the page has in its place.
_LINE, _QUIET, _ACCENT = "#010101", "#020202", "#030303"
_VARIABLES = {_LINE: "line", _QUIET: "quiet", _ACCENT: "accent"} | {f"#0a0a0{n}": f"c{n}" for n in range(COLOURS)}
_STYLE = {
    "svg.fonttype": "none",  # texts stay texts, in a font of the reader's
    "svg.hashsalt": "meme-llava",  # equal charts are equal files
    "font.size": 9,
    "font.sans-serif": "DejaVu Sans",  # comes with matplotlib, which measures with it; the page has its own
    "grid.color": _LINE,
    "axes.grid.axis": "y",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _QUIET),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
}


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
    return Thumbnail(path.name, to_data_url(image, "WEBP", THUMBNAIL_QUALITY), size)


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


def draw_bars(edges: Sequence[int], counts: Sequence[int], unit: str) -> Markup:
    """Bars from 0 up; `counts[i]` values of this unit lie from `edges[i]` to below `edges[i + 1]`."""

    def draw(axes) -> None:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        widths = [0.9 * (high - low) for low, high in zip(edges, edges[1:], strict=False)]
        # A single value among thousands is still to be seen.
        heights = [count and max(count, 0.015 * max(counts)) for count in counts]
        bars = axes.bar(edges[:-1], heights, widths, align="edge", color=_ACCENT)
        for bar, low, high, count in zip(bars, edges, edges[1:], counts, strict=False):
            bar.set_gid(f"title:{low:,} – {high:,} {unit}: {count:,}")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(unit)

    return _draw(draw)


def draw_lines(lines: Sequence[tuple[int, str, Sequence[tuple[float, float]]]]) -> Markup:
    """Lines over optimizer steps, each as (number of its colour, name, points)."""
    last_step = max((x for _, _, points in lines for x, _ in points), default=1)
    # All lines alike: one that is smoothed more than another looks less noisy than it is.
    steps = math.ceil(last_step / MAX_POINTS)

    def draw(axes) -> None:
        for column, name, points in lines:
            if points := [(x, y) for x, y in thin(points, steps) if math.isfinite(y)]:
                (line,) = axes.plot(*zip(*points, strict=True), lw=1.3, color=f"#0a0a0{column % COLOURS}")
                line.set_marker("o" if len(points) == 1 else "")
                line.set_gid(f"title:{name}: {points[-1][1]:.3g} at the end")
        axes.set_xlim(0, last_step)
        axes.set_ylim(bottom=0)

    return _draw(draw)


def thin(points: Sequence[tuple[float, float]], steps: int) -> list[tuple[float, float]]:
    """The means of every N steps, where their last one stands: more points than that cannot be seen."""
    groups = (list(group) for _, group in groupby(points, key=lambda point: (point[0] - 1) // steps))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _draw(draw: Callable) -> Markup:
    # It takes most of a second, and not every check has charts.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.1), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
            axis.get_major_locator().set_params(nbins=6)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    # Within a page an SVG needs no namespaces; a title is shown under the pointer.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(make_visible(svg))
