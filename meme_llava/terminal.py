"""Tables, progress and durations as a person reads them."""

import contextlib
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from meme_llava.errors import printable

FIGURES = re.compile(r"[\d.,%–\n]+")
LONGEST_NAME = 40  # columns of the terminal
NARROWEST_HEAD = 10  # columns of the terminal
SECONDS_BETWEEN_LINES = 10.0  # of progress, where the output is not a terminal
SPEED_SECONDS = 600.0  # the speed is that of so long; rich's half a minute may be less than one batch of answers takes


def format_number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{float(f'{value:.3g}'):,}".removesuffix(".0")


def format_seconds(seconds: float) -> str:
    """A duration: 0.42 s, 3 min 05 s, 5 h 12 min."""
    if seconds < 60:
        return f"{format_number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def format_bytes(size: float) -> str:
    """A size: 4.2 KB, 512.0 MB, 3.2 GB."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:,.1f} {unit}"
    return f"{size / 1e3:.1f} KB"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print rows under their columns; numbers stand on the right. Figures stay whole as long as they can."""
    rows = [[printable(cell) if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    console = Console(highlight=False)
    table = _make_table(title, columns, rows)
    if console.measure(table, options=console.options.update(width=10_000)).maximum > console.width:
        table = _make_table(title, columns, rows, max(NARROWEST_HEAD, console.width // len(columns) - 3))
    console.print(table)


def _make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], head_width: int | None = None
) -> Table:
    """The table; with `head_width`, lines of the heads above figures are at most so wide."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    columns_of_cells = [[head, *(row[index] for row in rows)] for index, head in enumerate(columns)]
    widths = [max(cell_len(line) for cell in cells for line in cell.split("\n")) for cells in columns_of_cells]
    for index, (head, *cells) in enumerate(columns_of_cells):
        # A figure that is broken in its middle would read as another one.
        is_figure = index > 0 and all(map(FIGURES.fullmatch, cells))
        if is_figure and head_width is not None:
            # Such a head often is a folder.
            lines = textwrap.wrap(re.sub("([/_-])", r"\1 ", head), head_width)
            head = "\n".join(re.sub("([/_-]) ", r"\1", line) for line in lines)
        # Longer texts beside names are broken first.
        is_name = index == 0 and widths[0] <= LONGEST_NAME and widths[0] < max(widths)
        table.add_column(
            head,
            justify="right" if all(cell.replace(",", "").isdigit() for cell in cells) else "left",
            overflow="fold",
            no_wrap=is_figure or is_name,
        )
    for row in rows:
        # Cells are plain text: a square bracket in a file name is not markup.
        table.add_row(*map(Text, row))
    return table


def show_bytes(title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A bar in bytes with speed and time left; plain lines where standard error is not a terminal.

    Yields the function that takes how many bytes were done.
    """
    return _show_progress(title, total, DownloadColumn(), TransferSpeedColumn())


def show_count(title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Like `show_bytes`, for things that are counted; `title` says what they are."""
    return _show_progress(title, total, MofNCompleteColumn(), _CountSpeedColumn())


class _CountSpeedColumn(ProgressColumn):
    def render(self, task: Task) -> str:
        # A large model gives less than an answer a second.
        return f"{task.finished_speed or task.speed or 0:,.1f}/s"


@contextlib.contextmanager
def _show_progress(title: str, total: int, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    bar = [BarColumn()] if console.is_terminal else []
    left = [TimeRemainingColumn(), TextColumn("left")]
    columns = (TextColumn("{task.description}"), *bar, *columns, *left)
    progress = Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)
    task = progress.add_task(title, total=total)
    last_line = time.monotonic()

    def advance(count: int) -> None:
        nonlocal last_line
        progress.advance(task, count)
        if not console.is_terminal and (progress.finished or time.monotonic() - last_line >= SECONDS_BETWEEN_LINES):
            last_line = time.monotonic()
            console.print(progress)

    with progress if console.is_terminal else contextlib.nullcontext():
        yield advance
