"""A stage of run.sh as a command with flags, and the folder of its result."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_llava.storage.run_record import RUN_RECORD

Flags = dict[str, list[str]]


@dataclass(frozen=True)
class Stage:
    """A line of run.sh: `python SCRIPT` and what else stands before the first flag, and the flags with their values."""

    name: str
    program: list[str]
    flags: Flags

    @property
    def arguments(self) -> list[str]:
        return [word for name, values in self.flags.items() for word in (f"--{name}", *values)]

    @property
    def command(self) -> list[str]:
        return [*self.program, *self.arguments]

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.flags["output_dir"][0])

    @property
    def note(self) -> Path:
        """The file beside the result that says what it was made from."""
        return Path(f"{self.folder}.command")

    @property
    def is_made(self) -> bool:
        return (self.folder / RUN_RECORD).is_file()

    @property
    def is_finished(self) -> bool:
        return self.is_made and self.note.is_file()

    @property
    def is_interrupted(self) -> bool:
        """Whether there are checkpoints to resume from."""
        return not self.is_finished and any(self.folder.glob("checkpoint-[0-9]*"))

    @property
    def resume_flags(self) -> list[str]:
        return ["--resume_from_checkpoint", "latest"] if self.is_interrupted else []

    def change(self, **values: str) -> "Stage":
        """The stage with other values of some flags."""
        return dataclasses.replace(self, flags=self.flags | {name: [value] for name, value in values.items()})


def split_flags(words: Iterable[str]) -> tuple[list[str], Flags]:
    """What stands before the first flag, and flag → values; of a flag that comes twice, the last, as argparse does."""
    values = before = []
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            values = flags[name.replace("-", "_")] = [value] if has_value else []
        else:
            values.append(word)
    return before, flags


def split_stages(words: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages that run.sh declares, each after its number of words, and what stands after a 0."""
    stages, rest = [], list(words)
    while count := int(rest.pop(0)):
        stages.append(Stage(rest[0], *split_flags(rest[1:count])))
        del rest[:count]
    return stages, rest
