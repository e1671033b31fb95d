"""The writer of prepared annotation files: records, what was left out, and the manifest that tells their story.

Every record is checked before it is written. What cannot become a record is a problem, which stops the run or is
quarantined; what carries nothing to learn from (a name without words) is left out. Both are counted, and stand with
place, reason and original content in `NAME.left_out.jsonl`. Nothing about sources.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meme_llava.cli import setting, to_plain
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER
from meme_llava.dataset.records import name_source, parse_record
from meme_llava.errors import UserError, count, list_by_cause
from meme_llava.storage.files import hash_file, open_alone, to_line, write_json, write_whole
from meme_llava.storage.run_record import describe_environment
from meme_llava.terminal import print_table

# Wordings of questions. A model asked in one wording only stumbles over every other, so each record draws its own.
# For captions: what is seen, what is written, what is meant.
DESCRIBE = (
    "这张表情包写了什么，是什么意思？",
    "请描述一下这张表情包。",
    "这张表情包想表达什么？",
    "请解读这张表情包的内容和含义。",
    "图里画了什么，写了什么字，想表达什么意思？",
    "这张图的笑点在哪里？请结合画面和文字说一说。",
    "看看这张表情包，说说它的画面和意思。",
    "这张图是什么意思？请详细讲讲。",
)
# For transcriptions: the words in the image, and nothing else.
READ = (
    "请读出图中的文字。",
    "图里写了什么字？",
    "这张图上的文字是什么？",
    "把图片里的文字抄写下来。",
    "图中有哪些文字？只回答文字。",
    "请识别图片中的文字。",
)


@dataclass(kw_only=True)
class OutputSettings:
    output: Path = setting("annotation file to write: .jsonl for JSONL, else a JSON array")
    overwrite: bool = setting("replace the output if it is there", False)
    bad_records: Literal["error", "quarantine"] = setting(
        "problems stop the run, or go to OUTPUT's .left_out.jsonl and are counted", "error"
    )


@dataclass(kw_only=True)
class SourceSettings(OutputSettings):
    image_folder: Path = setting("the one folder that all image paths start from")


@dataclass(kw_only=True)
class DrawingSettings(SourceSettings):
    seed: int = setting("draws the wording of the questions", 0)


@dataclass(kw_only=True)
class ImagesSettings(DrawingSettings):
    images: list[str] = setting("subfolders of the image folder with the images, searched recursively")


def make_record(
    record_id: str, image: str, answer: str, source: dict, seed: int, text: str | None = None, question: str = ""
) -> dict:
    """A record of one question about one image.

    Args:
        text: the words known to stand in the image. An answer that is just these is asked for as such.
        question: in place of a drawn one.
    """
    if not question:
        wordings = READ if answer == text else DESCRIBE
        # The draw depends on seed and id alone: adding a file changes no other record.
        digest = hashlib.sha256(f"{seed} {record_id}".encode("utf-8", "surrogatepass")).digest()
        question = wordings[int.from_bytes(digest[:8], "big") % len(wordings)]
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


def make_unique(wanted: str, taken: set[str]) -> str:
    """`wanted`, `wanted_2`, `wanted_3`, …: the first that is not `taken`, which it is from now on."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number + 1}", number + 1
    taken.add(name)
    return name


class AnnotationWriter:
    """Writes one annotation file and what belongs to it, record by record, under temporary names.

    `close` brings everything to the disk; `publish` puts the manifest in place, then the left-out file, the annotations
    last.
    So a killed run leaves the old file or none, or the new one with its manifest; a manifest whose sha256 differs from
    its file's belongs to a run that was killed between two renames.

    Args:
        inputs: the files that the records come from, none of which may be replaced.
    """

    def __init__(self, settings: OutputSettings, inputs: Iterable[Path] = ()):
        self.output, self._settings = settings.output, settings
        self.left_out_file = self.output.with_name(f"{self.output.stem}.left_out.jsonl")
        self.manifest_file = self.output.with_name(f"{self.output.stem}.manifest.json")
        self.inputs, self.notes, self.left_out, self.by_source = [], Counter(), Counter(), Counter()
        self.records = 0
        self.hint = ""
        self.problems: list[tuple[str, str]] = []  # (kind, line of a message)
        self._left_out_lines, self._images = [], set()
        self._check_output(inputs)
        self._temporary = self.output.with_name(f".{self.output.name}.incomplete")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_alone(self._temporary, self.output)
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be written there ({error.strerror or error})") from error
        self._is_published = False
        try:
            # Another run may have written it before this one had the file for itself.
            self._check_output(inputs)
        except UserError:
            self.__exit__()
            raise
        self._is_jsonl = self.output.suffix == ".jsonl"

    def _check_output(self, inputs: Iterable[Path]) -> None:
        where = f"--output {self.output}:"
        if self.output.resolve() in {path.resolve() for path in inputs}:
            raise UserError(f"{where} is an input too; choose another name")
        if self.output.suffix not in (".json", ".jsonl"):
            raise UserError(f"{where} expected a name that ends in .json or .jsonl")
        if self.output.is_dir():
            raise UserError(f"{where} is a directory, expected a file to write")
        if self.output.exists() and not self._settings.overwrite:
            raise UserError(f"{where} is there already. Choose another, or pass --overwrite to replace it.")
        other = self.output.with_suffix(".jsonl" if self.output.suffix == ".json" else ".json")
        if other.exists() and self.manifest_file.exists():
            raise UserError(
                f"{where} {self.manifest_file.name} belongs to {other.name}; choose a name that differs in more than "
                "its ending"
            )

    def __enter__(self) -> "AnnotationWriter":
        return self

    def __exit__(self, *error) -> None:
        if not self._is_published:
            self._temporary.unlink(missing_ok=True)
        # On a full disk the last lines cannot be written, and closing says so once more.
        with contextlib.suppress(OSError):
            self._file.close()

    def note_input(self, path: Path, rows: Iterable) -> Iterator:
        """Pass on the rows of a file, and remember it for the manifest at their end."""
        count = 0
        for row in rows:
            count += 1
            yield row
        self.inputs.append({"file": str(path), "sha256": hash_file(path), "rows": count})

    def add(self, record: dict, place: str) -> None:
        """Write a record if it can be trained on as far as its structure tells; else it is a problem."""
        try:
            images = parse_record(record, place).images
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            self.report_problem("not Unicode", place, f"holds half a character: {error.object[error.start]!r}", record)
            return
        except ValueError as error:
            self.report_problem("not a record", place, str(error), record)
            return
        before = b"" if self._is_jsonl else b",\n" if self.records else b"[\n"
        self._file.write(before + line + (b"\n" if self._is_jsonl else b""))
        self.records += 1
        # A set of paths would take hundreds of megabytes for large sets.
        self._images.update(map(hash, images))
        self.by_source.update({name_source(source) for source in record.get("sources") or []})

    def report_problem(self, kind: str, place: str, reason: str, original) -> None:
        """Something that should have become a record and cannot."""
        self.problems.append((kind, f"{place}: {reason}"))
        self.leave_out(kind, place, reason, original)

    def leave_out(self, kind: str, place: str, reason: str, original) -> None:
        """Something that was not meant to become a record; counted by `kind`."""
        self.left_out[kind] += 1
        self._left_out_lines.append(to_line({"place": place, "reason": reason, "original": original}, default=repr))

    def finish(self) -> None:
        """Close, publish and summarise the one output of a run."""
        self.close()
        self.publish()
        self.print_summary()

    def stop_on_problems(self, records: int) -> None:
        """Raise UserError, with examples of every kind, if there are problems under "error" or `records` is 0."""
        lines = filter(None, (list_by_cause("problem", self.problems), self.hint))
        listed = "".join(f"\n{line}" for line in lines)
        if self.problems and self._settings.bad_records == "error":
            without = f", or pass --bad_records quarantine to leave them out (listed in {self.left_out_file.name})"
            raise UserError(
                f"{count(len(self.problems), 'problem')}, nothing was written:{listed}\n"
                f"Fix them{without if records else ''}."
            )
        if not records:
            counts = ", ".join(f"{number:,} {kind}" for kind, number in self.left_out.items()) or "nothing was found"
            raise UserError(f"{self.output}: there is no record to write ({counts}){listed}")

    def close(self) -> None:
        """Bring the file to the disk. Raises as `stop_on_problems` does."""
        self.stop_on_problems(self.records)
        if not self._is_jsonl:
            self._file.write(b"\n]\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self, **facts) -> None:
        """Put everything in place; `facts` go into the manifest too."""
        manifest = {
            "command": sys.argv,
            "settings": to_plain(self._settings),
            "inputs": self.inputs,
            "output": {"file": self.output.name, "sha256": hash_file(self._temporary)},
            "left_out_file": self.left_out_file.name if self.left_out else None,
            "counts": {
                "records": self.records,
                "images": len(self._images),
                "left_out": self.left_out,
                "problems": len(self.problems),
                "noted": self.notes,
                "records_by_source": self.by_source,
            },
            "environment": describe_environment(),
        }
        write_json(self.manifest_file, {**manifest, **facts})
        if self.left_out:
            write_whole(self.left_out_file, b"".join(self._left_out_lines))
        else:
            # One of an earlier run would be taken for this one's.
            self.left_out_file.unlink(missing_ok=True)
        self._temporary.replace(self.output)
        self._is_published = True

    def print_summary(self) -> None:
        """What was written and what was not, and where it is."""
        rows = [("records", self.records), ("images", len(self._images))]
        rows += [(f"records of {name}", number) for name, number in sorted(self.by_source.items())]
        rows += [(f"left out: {kind}", number) for kind, number in sorted(self.left_out.items())]
        print_table(self.output.name, ("what", "count"), [*rows, *self.notes.items()])
        print(f"annotations in {self.output}, how they came to be in {self.manifest_file}")
        if self.left_out:
            print(f"what was left out, and why, in {self.left_out_file}")
