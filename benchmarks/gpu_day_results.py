"""Results of the rows of gpu_day.py: a line of JSON on standard output for each.

A result is pass, fail or "not run", its figures, and a note for a person.
"""

import argparse
import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
MARK = "RESULT "
LAST_WORDS = 600  # characters of an error that are kept


@dataclass
class Result:
    """What one row of the table says."""

    row: str
    status: str = PASS
    figures: dict = field(default_factory=dict)
    note: str = ""

    def print(self) -> None:
        """Hand the result to gpu_day.py."""
        print(MARK + json.dumps(asdict(self), ensure_ascii=False), flush=True)


def read_results(output: str) -> list[Result]:
    """The results in a row's standard output, those of a row that was killed among them."""
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    results = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # half a line
            results.append(Result(**json.loads(line)))
    return results


@contextlib.contextmanager
def reporting(row: str) -> Iterator[Result]:
    """A result that is printed when the block ends; an exception makes it a failure, and goes no further."""
    result = Result(row)
    try:
        yield result
    except Exception as error:
        traceback.print_exc()
        result.status = FAIL
        result.note = f"{type(error).__name__}: {error}"[-LAST_WORDS:]
    result.print()


def parse_row_arguments(description: str, *switches: str) -> argparse.Namespace:
    """What gpu_day.py tells a row; `switches` are flags of its own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work_dir", type=Path, default=Path("gpu_day_work"))
    parser.add_argument("--seconds", type=float, default=600, help="the row is ended behind so many")
    for switch in switches:
        parser.add_argument(switch, action="store_true")
    return parser.parse_args()


def describe_figures(figures: dict) -> str:
    """Figures in one line, nested ones left to the JSON file."""
    return ", ".join(
        f"{name.replace('_', ' ')} {format_figure(value)}"
        for name, value in figures.items()
        if not isinstance(value, (dict, list))
    )


def format_figure(value) -> str:
    """Numbers with as many digits as a reader can use."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.3g}"
