"""Rows of JSON, JSONL and CSV files, each with its place; a broken row never stops the file."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.records import RecordFault, iterate_values
from meme_llava.errors import UserError


@dataclass(frozen=True)
class Row:
    """A value of a file. `position` is {"line": n} counted from 1, or {"row": n} of an array counted from 0."""

    file: str
    position: dict
    value: object  # a RecordFault with the reason if the row is broken

    @property
    def original(self) -> object:
        """What stands in the file, for the list of what was left out."""
        return self.value.content if isinstance(self.value, RecordFault) else self.value

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        (kind, number), *_ = self.position.items()
        return f"{self.file} {kind} {number}"


def read_json_rows(path: Path) -> Iterator[Row]:
    """The values of a JSONL file (its name ends in .jsonl) or a JSON array.

    Raises:
        UserError: the file is missing, not UTF-8, or no JSON array.
    """
    for place, value in iterate_values(path):
        *_, kind, number = place.split(" ")
        yield Row(path.name, {"line" if kind == "line" else "row": int(number)}, value)


def read_csv_rows(path: Path) -> Iterator[Row]:
    """The cells of every row of a CSV file (tab-separated if its name ends in .tsv), header included, as lists.

    Raises:
        UserError: the file is missing, not UTF-8, or its quotes are broken.
    """
    reader = csv.reader(
        io.StringIO(_read_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    # The module's limit of 131,072 characters a cell is meant for guarding memory; the file is in memory already.
    csv.field_size_limit(2**31 - 1)
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield Row(path.name, {"line": start}, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error})") from error


def read_table_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    """The rows of a CSV, TSV, JSONL or JSON table, as {column: value}.

    Raises:
        UserError: a CSV lacks one of the columns, or the file cannot be read.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from read_json_rows(path)
        return
    rows = read_csv_rows(path)
    header = next(rows, None)
    names = [name.strip() for name in header.value] if header else []
    if missing := [column for column in columns if column not in names]:
        raise UserError(
            f"{path}: has no column {', '.join(missing)}; its first line has {', '.join(names) or 'nothing'}"
        )
    for row in rows:
        if len(row.value) == len(names):
            yield Row(row.file, row.position, dict(zip(names, row.value, strict=True)))
        else:
            detail = f"has {len(row.value)} cells, the first line has {len(names)}"
            yield Row(row.file, row.position, RecordFault("malformed", detail, ",".join(row.value)))


def _read_text(path: Path) -> str:
    try:
        # Excel and Notepad put a byte order mark in front; utf-8-sig takes the file either way.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. Is the path right?") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error}). Convert it, e.g. iconv -f GB18030 -t UTF-8 {path.name} > converted"
        ) from error
