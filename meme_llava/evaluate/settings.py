"""Settings of evaluate.py, judge.py and report.py.

How settings are parsed stands in `arguments`.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe, parse_arguments
from meme_llava.errors import UserError
from meme_llava.inference.endpoints import PRESETS


@dataclass
class EvaluateArguments:
    annotations: Path = field(metadata=describe("records with the questions and their reference answers"))
    image_folder: Path = field(metadata=describe("where their images are"))
    output_dir: Path = field(metadata=describe("gets predictions.jsonl and metrics.json; goes on there"))
    model: str | None = field(
        default=None,
        metadata=describe(
            "merged model, base model, or output_dir / checkpoint of train.py; another's hub id, folder or name, as "
            "--answer_with says"
        ),
    )
    answer_with: Literal["meme_llava", "transformers", "endpoint", "rapidocr"] = field(
        default="meme_llava",
        metadata=describe(
            "who answers: a model of ours, an image-text-to-text model of transformers (such as LLaVA-1.5), an "
            "OpenAI-compatible endpoint, a text recogniser"
        ),
    )
    preset: Literal[tuple(PRESETS)] | None = field(
        default=None, metadata=describe("endpoint: base URL, model and key variable of a provider")
    )
    base_url: str | None = field(default=None, metadata=describe("endpoint: any other one"))
    key_variable: str | None = field(
        default=None, metadata=describe("endpoint: name of the environment variable that holds the key")
    )
    timeout: float = field(default=60.0, metadata=describe("endpoint: seconds to wait for an answer"))
    batch_size: int = field(default=16, metadata=describe("questions answered at once"))
    limit: int | None = field(default=None, metadata=describe("only the first N records"))
    max_new_tokens: int = field(default=128, metadata=describe("an answer stops here if not by itself"))
    compare_with: list[Path] = field(
        default_factory=list, metadata=describe("output_dirs of other evaluations, whose scores are printed too")
    )
    base_model: Path | None = field(default=None, metadata=describe("an adapter's base, only if it moved"))
    device: str = field(default="auto", metadata=describe("auto: the GPU if there is one, else the CPU"))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=describe("auto: bfloat16 on a GPU that has it, float32 on a CPU")
    )
    overwrite: bool = field(default=False, metadata=describe("start anew in a non-empty output_dir"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        _check_amounts(self)
        needs_model = self.answer_with in ("meme_llava", "transformers")
        if needs_model and self.model is None:
            raise UserError(f"--answer_with {self.answer_with} needs --model")
        # A setting that would do nothing is a mistake.
        idle = {
            "model": self.answer_with == "rapidocr",
            "base_model": self.answer_with != "meme_llava",
            "device": not needs_model,
            "dtype": not needs_model,
            **dict.fromkeys(("preset", "base_url", "key_variable", "timeout"), self.answer_with != "endpoint"),
        }
        for setting in dataclasses.fields(self):
            if idle.get(setting.name) and getattr(self, setting.name) != setting.default:
                raise UserError(f"--{setting.name} has no use with --answer_with {self.answer_with}; leave it out")


@dataclass
class JudgeArguments:
    first: Path = field(metadata=describe("output_dir of evaluate.py with the one answers"))
    second: Path = field(metadata=describe("output_dir of evaluate.py with the others"))
    output_dir: Path = field(metadata=describe("gets judgements.jsonl and metrics.json; goes on there"))
    preset: Literal[tuple(PRESETS)] | None = field(
        default=None, metadata=describe("base URL, model and key variable of the judge's provider")
    )
    base_url: str | None = field(default=None, metadata=describe("another OpenAI-compatible endpoint"))
    model: str | None = field(default=None, metadata=describe("another model of the endpoint; it must see images"))
    key_variable: str | None = field(
        default=None, metadata=describe("name of the environment variable that holds the key")
    )
    task: str | None = field(default=None, metadata=describe("judge only answers to this task of the records"))
    limit: int | None = field(default=None, metadata=describe("only the first N pairs"))
    batch_size: int = field(default=4, metadata=describe("pairs judged at once"))
    max_new_tokens: int = field(default=1024, metadata=describe("a verdict is cut off here; judges may think aloud"))
    timeout: float = field(default=60.0, metadata=describe("seconds to wait for a verdict"))
    overwrite: bool = field(default=False, metadata=describe("start anew in a non-empty output_dir"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        _check_amounts(self)


@dataclass
class ReportArguments:
    runs: list[str] = field(
        metadata=describe(
            "OUTPUT_DIRs of run.sh and output_dirs of evaluate.py, as FOLDER or NAME=FOLDER; --runs may be left out in "
            "front of them"
        )
    )
    output: Path = field(
        default=Path("report.html"), metadata=describe("gets the page; its tables go beside it, as .csv")
    )
    title: str = field(default="Meme-LLaVA experiments", metadata=describe("heads the page"))
    max_answers: int = field(
        default=500, metadata=describe("show at most N questions; first those whose answers disagree")
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "output", self.output.suffix == ".html", "a file name that ends in .html")
        check_setting(self, "max_answers", self.max_answers > 0, "at least 1")


def _check_amounts(arguments: EvaluateArguments | JudgeArguments) -> None:
    for name in ("batch_size", "max_new_tokens"):
        check_setting(arguments, name, getattr(arguments, name) > 0, "at least 1")
    check_setting(arguments, "limit", arguments.limit is None or arguments.limit > 0, "at least 1")
    check_setting(arguments, "timeout", arguments.timeout > 0, "seconds above 0")


def parse_report_arguments(argv: list[str] | None, description: str) -> ReportArguments:
    """Like `parse_arguments`; runs that stand first need no --runs."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--runs", *words]
    elif not any(word.partition("=")[0] in ("--runs", "-h", "--help") for word in words):
        raise UserError("which runs? For example: python report.py output output_b")
    return parse_arguments(ReportArguments, words, description)
