"""Settings of evaluate.py, judge.py and report.py."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, parse_arguments, setting
from meme_llava.errors import UserError
from meme_llava.inference.endpoints import PRESETS
from meme_llava.inference.settings import DTYPE_HELP, TEMPERATURE_HELP, Dtype

# By --answer_with, of the settings that not all of them use.
USED_SETTINGS = {
    "meme_llava": {"model", "base_model", "device", "dtype"},
    "transformers": {"model", "device", "dtype"},
    "endpoint": {"model", "preset", "base_url", "key_variable", "timeout", "temperature"},
    "rapidocr": set(),
}


@dataclass
class EvaluateArguments:
    annotations: Path = setting("records with the questions and their reference answers")
    image_folder: Path = setting("where their images are")
    output_dir: Path = setting("gets predictions.jsonl and metrics.json; goes on there")
    model: str | None = setting(
        "merged model, base model, or output_dir / checkpoint of train.py; another's hub id, folder or name, as "
        "--answer_with says",
        None,
    )
    answer_with: Literal["meme_llava", "transformers", "endpoint", "rapidocr"] = setting(
        "who answers: a model of ours, an image-text-to-text model of transformers (such as LLaVA-1.5), an "
        "OpenAI-compatible endpoint, a text recogniser",
        "meme_llava",
    )
    preset: Literal[tuple(PRESETS)] | None = setting("endpoint: base URL, model and key variable of a provider", None)
    base_url: str | None = setting("endpoint: any other one", None)
    key_variable: str | None = setting("endpoint: name of the environment variable that holds the key", None)
    timeout: float = setting("endpoint: seconds to wait for an answer", 60.0, expected="greater than 0")
    temperature: float = setting(f"endpoint: {TEMPERATURE_HELP}", 0.0, expected="0 or more")
    batch_size: int = setting("questions answered at once", 16, expected="at least 1")
    limit: int | None = setting("only the first N records", None, expected="at least 1")
    max_new_tokens: int = setting("an answer stops here if not by itself", 128, expected="at least 1")
    compare_with: list[Path] = setting("output_dirs of other evaluations, whose scores are printed too", [])
    base_model: Path | None = setting("an adapter's base, only if it moved", None)
    device: str = setting("auto: the GPU if there is one, else the CPU", "auto")
    dtype: Dtype = setting(DTYPE_HELP, "auto")
    overwrite: bool = setting("start anew in a non-empty output_dir", False)

    def __post_init__(self) -> None:
        used = USED_SETTINGS[self.answer_with]
        if "device" in used and self.model is None:
            raise UserError(f"--answer_with {self.answer_with} needs --model")
        # A setting that would do nothing is a mistake.
        idle = set().union(*USED_SETTINGS.values()) - used
        for one in dataclasses.fields(self):
            if one.name in idle and getattr(self, one.name) != one.default:
                raise UserError(f"--{one.name} has no use with --answer_with {self.answer_with}; leave it out")


@dataclass
class JudgeArguments:
    first: Path = setting("output_dir of evaluate.py with the one answers")
    second: Path = setting("output_dir of evaluate.py with the others")
    output_dir: Path = setting("gets judgements.jsonl and metrics.json; goes on there")
    preset: Literal[tuple(PRESETS)] | None = setting("base URL, model and key variable of the judge's provider", None)
    base_url: str | None = setting("another OpenAI-compatible endpoint", None)
    model: str | None = setting("another model of the endpoint; it must see images", None)
    key_variable: str | None = setting("name of the environment variable that holds the key", None)
    task: str | None = setting("judge only answers to this task of the records", None)
    limit: int | None = setting("only the first N pairs", None, expected="at least 1")
    batch_size: int = setting("pairs judged at once", 4, expected="at least 1")
    max_new_tokens: int = setting("a verdict is cut off here; judges may think aloud", 1024, expected="at least 1")
    timeout: float = setting("seconds to wait for a verdict", 60.0, expected="greater than 0")
    temperature: float = setting(TEMPERATURE_HELP, 0.0, expected="0 or more")
    overwrite: bool = setting("start anew in a non-empty output_dir", False)


@dataclass
class ReportArguments:
    runs: list[str] = setting(
        "OUTPUT_DIRs of run.sh and output_dirs of evaluate.py, as FOLDER or NAME=FOLDER; --runs may be left out in "
        "front of them"
    )
    output: Path = setting("gets the page; its tables go beside it, as .csv", Path("report.html"))
    title: str = setting("heads the page", "Meme-LLaVA experiments")
    max_answers: int = setting(
        "show at most N questions; first those whose answers disagree", 500, expected="at least 1"
    )

    def __post_init__(self) -> None:
        check_setting(self, "output", self.output.suffix == ".html", "a file name that ends in .html")


def parse_report_arguments(argv: list[str] | None, description: str) -> ReportArguments:
    """Like `parse_arguments`; runs that stand first need no --runs."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--runs", *words]
    elif not any(word.partition("=")[0] in ("--runs", "-h", "--help") for word in words):
        raise UserError("which runs? For example: python report.py output output_b")
    return parse_arguments(ReportArguments, words, description)
