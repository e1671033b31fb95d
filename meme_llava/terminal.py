"""Tables and progress on a terminal."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

LONGEST_NAME = 40  # characters of a first column that is never broken
HEAD_WIDTHS = (14, 10, 8)  # characters of the lines above a column of figures, which is never broken itself
FIGURES = re.compile(r"[\d.,%–\n]+")
SECONDS_BETWEEN_LINES = 10.0  # of progress, where the output is not a terminal


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print rows under their columns; numbers stand on the right. Figures and words stay whole as long as they can."""
    rows = [[cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
    console = Console(highlight=False)
    cells = list(zip(*rows, strict=True)) or [()] * len(columns)
    # A figure that is broken in its middle would read as another one.
    figures = [index for index in range(1, len(columns)) if all(map(FIGURES.fullmatch, cells[index]))]
    heads = _choose_heads(columns, rows, figures, console.width)
    has_text = any(
        index not in figures and _measure_width(cells[index]) > LONGEST_NAME for index in range(1, len(columns))
    )
    keeps_names = _measure_width(cells[0]) <= LONGEST_NAME and (has_text or _fits(heads, rows, console.width))
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, head in enumerate(heads):
        is_number = all(cell.replace(",", "").isdigit() for cell in cells[index])
        table.add_column(
            head,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number or index in figures or (index == 0 and keeps_names),
        )
    for row in rows:
        # Cells are plain text: a square bracket in a file name is not markup.
        table.add_row(*[Text(cell) for cell in row])
    console.print(table)


def _choose_heads(
    columns: Sequence[str], rows: Sequence[Sequence[str]], figures: Sequence[int], width: int
) -> Sequence[str]:
    """The heads; those of the columns of `figures` in short lines where the table would be too wide."""
    if _fits(columns, rows, width):
        return columns
    for widest in HEAD_WIDTHS:
        heads = [_break_head(head, widest) if index in figures else head for index, head in enumerate(columns)]
        # The first column may be broken between its words.
        words, *others = ([_find_longest_word(first), *rest] for first, *rest in (heads, *rows))
        if _fits(words, others, width):
            break
    return heads


def _fits(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a table needs no line broken; beside each column stand a blank on both sides and a line."""
    return sum(_measure_width(column) + 3 for column in zip(heads, *rows, strict=True)) + 1 <= width


def _find_longest_word(text: str) -> str:
    return max(text.split(), key=cell_len, default="")


def _measure_width(texts: Sequence[str]) -> int:
    """Columns of the terminal that the widest line takes."""
    return max((cell_len(line) for text in texts for line in text.splitlines()), default=0)


def _break_head(head: str, widest: int) -> str:
    """A long head, such as a folder, in lines that leave room for other columns, broken between words where it can."""
    lines = [""]
    for word in re.findall(rf"[^ /_-]{{1,{widest - 1}}}[ /_-]?|[ /_-]", head):
        if len(lines[-1]) + len(word.rstrip()) > widest:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def show_bytes(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with speed and time left; plain lines where standard error is not a terminal.

    Yields the function that takes how many bytes were done.
    """
    with _show_progress(title, total, "B", _format_bytes) as advance:
        yield advance


@contextlib.contextmanager
def show_count(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Like `show_bytes`, for things that are counted; `title` says what they are."""
    with _show_progress(title, total, "", _format_count) as advance:
        yield advance


@contextlib.contextmanager
def _show_progress(
    title: str, total: int, unit: str, describe: Callable[[float], str]
) -> Iterator[Callable[[int], None]]:
    is_terminal = sys.stderr.isatty()
    start = last_line = time.perf_counter()
    scales = unit == "B"
    with tqdm(
        total=total, desc=title, unit=unit, unit_scale=scales, dynamic_ncols=True, disable=not is_terminal
    ) as bar:
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.update(count)
            now = time.perf_counter()
            if not is_terminal and (now - last_line >= SECONDS_BETWEEN_LINES or done == total):
                last_line = now
                speed = done / max(now - start, 1e-9)
                left = tqdm.format_interval((total - done) / speed) if speed else "?"
                print(
                    f"{title}: {describe(done)} of {describe(total)}, {describe(speed)}/s, {left} left",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance


def _format_count(count: float) -> str:
    # A large model gives less than an answer a second.
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"


def _format_bytes(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
