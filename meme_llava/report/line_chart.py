"""The layout of a line chart: where its lines and ticks stand on a page. Nothing about what is drawn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_POINTS = 240  # of a line


@dataclass(frozen=True)
class Line:
    """Points of one experiment: `column` is its place, which gives the colour."""

    column: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over optimizer steps, with a title in two languages."""

    title: str
    chinese_title: str
    lines: Sequence[Line]


def lay_out_chart(chart: Chart) -> dict:
    """Where everything stands, in per cent of the plot from its upper left corner."""
    right = max((x for line in chart.lines for x, _ in line.points), default=1)
    # All lines alike: one that is smoothed more than another looks less noisy than it is.
    steps = math.ceil(right / MAX_POINTS)
    points = [[point for point in _thin(line.points, steps) if math.isfinite(point[1])] for line in chart.lines]
    highest = max((y for line in points for _, y in line), default=1)
    top, step = find_round_marks(highest)
    return {
        "title": chart.title,
        "chinese_title": chart.chinese_title,
        "lines": [
            {
                "column": line.column,
                "points": " ".join(f"{100 * x / right:.2f},{100 - 100 * y / top:.2f}" for x, y in thinned),
                "last": f"{thinned[-1][1]:.3g}" if thinned else "",
                "is_dot": len(thinned) == 1,
            }
            for line, thinned in zip(chart.lines, points, strict=True)
        ],
        "y_marks": list(_list_marks(step, top)),
        "x_marks": list(_list_marks(find_round_marks(right)[1], right)),
    }


def find_round_marks(highest: float, smallest_step: float = 0.0) -> tuple[float, float]:
    """The top of an axis from zero and the distance of its marks: 1, 2 or 5 times a power of ten, at most five."""
    if highest <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(factor * power for factor in (0.2, 0.5, 1, 2) if highest <= 5 * factor * power)
    step = max(step, smallest_step)
    return math.ceil(highest / step - 1e-9) * step, step


def _list_marks(step: float, end: float) -> Iterator[tuple[float, str]]:
    """Place in per cent and text of every multiple of the step, and of the end of the axis."""
    values = [index * step for index in range(math.ceil(end / step - 1e-9))]
    # A mark that would touch the one at the end is left out.
    for value in [*(value for value in values if end - value > 0.4 * step), end]:
        yield round(100 * value / end, 3), f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _thin(points: Sequence[tuple[float, float]], steps: int) -> list[tuple[float, float]]:
    """The means of every N steps, where their last one stands: more points than that cannot be seen."""
    groups = (list(group) for _, group in groupby(points, key=lambda point: (point[0] - 1) // steps))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
