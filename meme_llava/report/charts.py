"""Charts as SVG for an HTML page, drawn by matplotlib in the page's own colours and font, light and dark."""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import groupby

from markupsafe import Markup

from meme_llava.report.html_page import make_visible

MAX_POINTS = 240  # of a line
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
