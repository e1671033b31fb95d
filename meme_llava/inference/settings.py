"""Settings of infer.py and demo.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, setting
from meme_llava.dataset.conversation import is_blank
from meme_llava.errors import UserError

DEFAULT_QUESTION = "这张表情包写了什么，是什么意思？"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # names by which a machine reaches itself
DTYPE_HELP = "auto: bfloat16 on a GPU that has it, float32 on a CPU"
TEMPERATURE_HELP = "0 makes answers repeatable; some models that think take only 1"


@dataclass
class InferArguments:
    model: Path = setting("merged model, base model, or output_dir / checkpoint of train.py")
    image: list[Path] = setting("image files, or folders of images", [])
    annotations: Path | None = setting(
        "in place of --image: ask the records' own questions and show the reference answers", None
    )
    image_folder: Path | None = setting("with --annotations: where its images are", None)
    limit: int | None = setting("with --annotations: only the first N records", None, expected="at least 1")
    quarantine: Path | None = setting(
        "with --annotations: quarantine.jsonl of training; its records are not asked", None
    )
    question: str | None = setting(f"what to ask about each --image ({DEFAULT_QUESTION})", None)
    system: str | None = setting("system turn in place of the default one", None)
    max_new_tokens: int = setting("an answer stops here if not by itself", 512, expected="at least 1")
    json: bool = setting("one JSON object an image in place of streamed text", False)
    base_model: Path | None = setting("an adapter's base, only if it moved", None)
    device: str = setting("auto: the GPU if there is one, else the CPU", "auto")
    dtype: Dtype = setting(DTYPE_HELP, "auto")

    def __post_init__(self) -> None:
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
        check_setting(self, "question", not is_blank(self.question), "not empty")


@dataclass
class DemoArguments:
    model: Path = setting("merged model, base model, or output_dir / checkpoint of train.py")
    compare_with: Path | None = setting("a second model, which answers every question beside the first", None)
    base_model: Path | None = setting("an adapter's base, only if it moved", None)
    host: str = setting("address to listen on; 0.0.0.0: every one, for whoever reaches this machine", "127.0.0.1")
    port: int = setting("port to listen on", 7860)
    system: str | None = setting("system turn in place of the default one", None)
    max_new_tokens: int = setting("an answer stops here if not by itself", 512, expected="at least 1")
    device: str = setting("auto: the GPU if there is one, else the CPU", "auto")
    dtype: Dtype = setting(DTYPE_HELP, "auto")

    def __post_init__(self) -> None:
        check_setting(self, "port", 0 < self.port < 65536, "1 to 65535")
