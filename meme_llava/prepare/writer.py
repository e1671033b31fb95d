"""The writer of prepared annotation files: records, what was left out, and the manifest that tells their story.

Every record is checked before it is written. What cannot become a record is a problem, which stops the run or is
quarantined; what carries nothing to learn from (a name without words) is left out. Both are counted, and stand with
place, reason and original content in `NAME.left_out.jsonl`. Nothing about sources.
"""

import contextlib
import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import describe
from meme_llava.dataset.check import MAX_LISTED as MAX_LISTED_PROBLEMS
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER
from meme_llava.dataset.records import name_source, parse_record
from meme_llava.errors import UserError
from meme_llava.prepare.questions import DESCRIBE, READ, draw_question
from meme_llava.storage.files import hash_file, to_line, write_json
from meme_llava.storage.run_record import describe_environment
from meme_llava.terminal import print_table


@dataclass(kw_only=True)
class OutputSettings:
    output: Path = field(metadata=describe("annotation file to write: .jsonl for JSONL, else a JSON array"))
    overwrite: bool = field(default=False, metadata=describe("replace the output if it is there"))
    bad_records: Literal["error", "quarantine"] = field(
        default="error", metadata=describe("problems stop the run, or go to OUTPUT's .left_out.jsonl and are counted")
    )


@dataclass(kw_only=True)
class SourceSettings(OutputSettings):
    image_folder: Path = field(metadata=describe("the one folder that all image paths start from"))


@dataclass(kw_only=True)
class DrawingSettings(SourceSettings):
    seed: int = field(default=0, metadata=describe("draws the wording of the questions"))


def make_record(
    record_id: str, image: str, answer: str, source: dict, seed: int, text: str | None = None, question: str = ""
) -> dict:
    """A record of one question about one image.

    Args:
        text: the words known to stand in the image. An answer that is just these is asked for as such.
        question: in place of a drawn one.
    """
    templates = READ if text is not None and answer == text else DESCRIBE
    question = question or draw_question(templates, seed, record_id)
    record = {
        "id": record_id,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
        "sources": [source],
    }
    return record if text is None else {**record, "text": text}


class UniqueIds:
    """Gives every record an id of its own: the wanted one, or that with a number after it."""

    def __init__(self):
        self._taken = set()

    def take(self, wanted: str) -> str:
        """`wanted`, `wanted_2`, `wanted_3`, …: the first that nobody has."""
        number, record_id = 1, wanted
        while record_id in self._taken:
            number += 1
            record_id = f"{wanted}_{number}"
        self._taken.add(record_id)
        return record_id


class AnnotationWriter:
    """Writes one annotation file and what belongs to it, record by record, under temporary names.

    `close` brings everything to the disk; `publish` renames the left-out file, then the manifest, the annotations last.
    So a killed run leaves the old file or none, or the new one with its manifest; a manifest whose sha256 differs from
    its file's belongs to a run that was killed between two renames.
    """

    def __init__(self, settings: OutputSettings):
        self.output, self.bad_records = settings.output, settings.bad_records
        self.left_out_file = self.output.with_name(f"{self.output.stem}.left_out.jsonl")
        self.manifest_file = self.output.with_name(f"{self.output.stem}.manifest.json")
        self.inputs, self.notes, self.left_out, self.by_source = [], Counter(), Counter(), Counter()
        self.records = self.rows_with_problems = 0
        self.hint = ""
        self._settings, self._problems, self._images = settings, [], set()
        check_output(self.output, settings.overwrite)
        self._check_manifest()
        self._temporary = self.output.with_name(f".{self.output.name}.incomplete")
        self._left_out_temporary = self.left_out_file.with_name(f".{self.left_out_file.name}.incomplete")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
            self._left_out_lines = self._left_out_temporary.open("wb")
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be written there ({error.strerror or error})") from error
        self._is_jsonl = self.output.suffix == ".jsonl"

    def _check_manifest(self) -> None:
        other = self.output.with_suffix({".json": ".jsonl", ".jsonl": ".json"}[self.output.suffix])
        if other.exists() and self.manifest_file.exists():
            raise UserError(
                f"--output {self.output}: {self.manifest_file.name} belongs to {other.name}; choose a name that "
                "differs in more than its ending"
            )

    def __enter__(self) -> "AnnotationWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._temporary.unlink(missing_ok=True)
        self._left_out_temporary.unlink(missing_ok=True)
        for file in (self._file, self._left_out_lines):
            # On a full disk the last lines cannot be written, and closing says so once more.
            with contextlib.suppress(OSError):
                file.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{self.output}: the disk is full. Free some, or choose another place.") from error

    def note_input(self, path: Path, rows: int) -> None:
        """Remember a file that was read, for the manifest."""
        self.inputs.append({"file": str(path), "sha256": hash_file(path), "rows": rows})

    def add(self, record: dict, place: str) -> bool:
        """Write a record if it can be trained on as far as its structure tells; else it is a problem."""
        try:
            parsed = parse_record(record, place)
            line = json.dumps(record, ensure_ascii=False)
            line.encode()
        except UnicodeEncodeError as error:
            self.report_problem("not Unicode", place, f"holds half a character: {error.object[error.start]!r}", record)
            return False
        except ValueError as error:
            self.report_problem("not a record", place, str(error), record)
            return False
        before = "" if self._is_jsonl else ",\n" if self.records else "[\n"
        self._file.write(before + line + ("\n" if self._is_jsonl else ""))
        self.records += 1
        # A set of paths would take hundreds of megabytes for large sets.
        self._images.update(hash(image) for image in parsed.images)
        for name in {name_source(source) for source in record.get("sources", [])}:
            self.by_source[name] += 1
        return True

    def report_problem(self, kind: str, place: str, reason: str, original) -> None:
        """Something that should have become a record and cannot."""
        self.rows_with_problems += 1
        if len(self._problems) < MAX_LISTED_PROBLEMS:
            self._problems.append(f"{place}: {reason}")
        self.leave_out(kind, place, reason, original)

    def leave_out(self, kind: str, place: str, reason: str, original) -> None:
        """Something that was not meant to become a record; counted by `kind`."""
        self.left_out[kind] += 1
        line = {"place": place, "reason": reason, "original": original}
        self._left_out_lines.write(to_line(line, default=repr))

    @property
    def images(self) -> int:
        """How many different images the records have."""
        return len(self._images)

    def close(self) -> None:
        """Bring the file to the disk.

        Raises:
            UserError: there are problems under "error", or there is no record.
        """
        listed = "\n".join(f"  {problem}" for problem in self._problems)
        more = self.rows_with_problems - len(self._problems)
        listed += f"\n  … and {more:,} more" if more else ""
        hint = f"\n{self.hint}" if self.hint else ""
        if self.rows_with_problems and self.bad_records == "error":
            raise UserError(
                f"{self.rows_with_problems:,} problems, nothing was written:\n{listed}{hint}\n"
                f"Fix them, or pass --bad_records quarantine to leave them out (listed in {self.left_out_file.name})."
            )
        if not self.records:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.items()) or "nothing was found"
            raise UserError(f"{self.output}: there is no record to write ({counts})\n{listed}{hint}".rstrip())
        if not self._is_jsonl:
            self._file.write("\n]\n")
        for file in (self._file, self._left_out_lines):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def publish(self, **facts) -> None:
        """Rename everything into place; `facts` go into the manifest too."""
        manifest = {**self._describe(), **facts}
        if self.left_out:
            self._left_out_temporary.replace(self.left_out_file)
        else:
            # One of an earlier run would be taken for this one's.
            self.left_out_file.unlink(missing_ok=True)
        write_json(self.manifest_file, manifest, default=str)
        self._temporary.replace(self.output)

    def _describe(self) -> dict:
        return {
            "command": sys.argv,
            "settings": asdict(self._settings),
            "inputs": self.inputs,
            "output": {"file": self.output.name, "sha256": hash_file(self._temporary)},
            "left_out_file": self.left_out_file.name if self.left_out else None,
            "counts": {
                "records": self.records,
                "images": self.images,
                "left_out": dict(self.left_out),
                "problems": self.rows_with_problems,
                "noted": dict(self.notes),
                "records_by_source": dict(self.by_source),
            },
            "environment": describe_environment(),
        }

    def print_summary(self) -> None:
        """What was written and what was not, and where it is."""
        rows = [("records", self.records), ("images", self.images)]
        rows += [(f"records of {name}", count) for name, count in sorted(self.by_source.items())]
        rows += [(f"left out: {kind}", count) for kind, count in sorted(self.left_out.items())]
        rows += [(kind, count) for kind, count in self.notes.items()]
        print_table(self.output.name, ("what", "count"), rows)
        print(f"annotations in {self.output}, how they came to be in {self.manifest_file}")
        if self.left_out:
            print(f"what was left out, and why, in {self.left_out_file}")


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless `output` may be written."""
    if output.suffix not in (".json", ".jsonl"):
        raise UserError(f"--output {output}: expected a name that ends in .json or .jsonl")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory, expected a file to write")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: is there already. Choose another, or pass --overwrite to replace it.")


def check_not_input(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise UserError if an output would replace an input."""
    inputs = {path.resolve() for path in inputs}
    for output in outputs:
        if output.resolve() in inputs:
            raise UserError(f"--output {output}: is an input too; choose another name")


def finish(writer: AnnotationWriter) -> None:
    """Close, publish and summarise the one output of a run."""
    writer.close()
    writer.publish()
    writer.print_summary()
