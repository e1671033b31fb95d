"""Settings of infer.py and demo.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.errors import UserError

DEFAULT_QUESTION = "这张表情包写了什么，是什么意思？"


@dataclass
class InferArguments:
    model: Path = field(metadata=describe("merged model, base model, or output_dir / checkpoint of train.py"))
    image: list[Path] = field(default_factory=list, metadata=describe("image files, or folders of images"))
    annotations: Path | None = field(
        default=None,
        metadata=describe("in place of --image: ask the records' own questions and show the reference answers"),
    )
    image_folder: Path | None = field(default=None, metadata=describe("with --annotations: where its images are"))
    limit: int | None = field(default=None, metadata=describe("with --annotations: only the first N records"))
    quarantine: Path | None = field(
        default=None, metadata=describe("with --annotations: quarantine.jsonl of training; its records are not asked")
    )
    question: str | None = field(
        default=None, metadata=describe(f"what to ask about each --image ({DEFAULT_QUESTION})")
    )
    system: str | None = field(default=None, metadata=describe("system turn in place of the default one"))
    max_new_tokens: int = field(default=512, metadata=describe("an answer stops here if not by itself"))
    json: bool = field(default=False, metadata=describe("one JSON object an image in place of streamed text"))
    base_model: Path | None = field(default=None, metadata=describe("an adapter's base, only if it moved"))
    device: str = field(default="auto", metadata=describe("auto: the GPU if there is one, else the CPU"))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=describe("auto: bfloat16 on a GPU that has it, float32 on a CPU")
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "max_new_tokens", self.max_new_tokens > 0, "at least 1")
        check_setting(self, "limit", self.limit is None or self.limit > 0, "at least 1")
        if bool(self.image) == (self.annotations is not None):
            raise UserError("give either --image or --annotations")
        if (self.annotations is None) != (self.image_folder is None):
            raise UserError("--annotations and --image_folder go together")
        for name in ("limit", "quarantine"):
            if self.annotations is None and getattr(self, name) is not None:
                raise UserError(f"--{name} goes with --annotations")
        if self.annotations is not None and self.question is not None:
            raise UserError("--question goes with --image; the records of --annotations bring their own")
        if self.question is None:
            self.question = DEFAULT_QUESTION
        check_setting(self, "question", bool(self.question.strip()), "not empty")


@dataclass
class DemoArguments:
    model: Path = field(metadata=describe("merged model, base model, or output_dir / checkpoint of train.py"))
    compare_with: Path | None = field(
        default=None, metadata=describe("a second model, which answers every question beside the first")
    )
    base_model: Path | None = field(default=None, metadata=describe("an adapter's base, only if it moved"))
    host: str = field(
        default="127.0.0.1",
        metadata=describe("address to listen on; 0.0.0.0: every one, for whoever reaches this machine"),
    )
    port: int = field(default=7860, metadata=describe("port to listen on"))
    system: str | None = field(default=None, metadata=describe("system turn in place of the default one"))
    max_new_tokens: int = field(default=512, metadata=describe("an answer stops here if not by itself"))
    device: str = field(default="auto", metadata=describe("auto: the GPU if there is one, else the CPU"))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=describe("auto: bfloat16 on a GPU that has it, float32 on a CPU")
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "max_new_tokens", self.max_new_tokens > 0, "at least 1")
        check_setting(self, "port", 0 < self.port < 65536, "1 to 65535")
