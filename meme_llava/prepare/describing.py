"""Settings, prompt and progress of data/describe.py: what is asked about which images of a folder.

The asking stands in `captioning`, the captions file in `caption_file`.
"""

import hashlib
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from meme_llava.cli import check_setting, describe
from meme_llava.dataset.inspection import IMAGE_SUFFIXES
from meme_llava.errors import UserError
from meme_llava.inference.endpoints import PRESETS
from meme_llava.prepare.caption_file import CaptionLedger
from meme_llava.storage.files import try_hash_file
from meme_llava.terminal import SECONDS_BETWEEN_LINES, print_table

# The words first: they are what a reader of memes must learn. A model that may say "unreadable" invents less.
DEFAULT_PROMPT = """请用中文描述这张表情包，写成一段通顺的话，依次说清三件事：
一、图中的文字：一字不差地照抄，放在引号“”里，不改字，不翻译；看不清的字写“（看不清）”；没有字就说明图中没有文字。
二、画面：是什么人物、动物或物品，长什么样，什么表情，在做什么；认不出是谁就只描述外貌，不要猜名字。
三、含义：表达了什么意思或情绪，一般在什么时候用。
只写图中能看到的内容和由此能确定的意思，不要编造。不要写标题、序号和开场白。"""
FILE_NAME_HINT = "\n这张图的文件名是“{name}”，其中可能有图中的文字，也可能有错，以图为准。"

MAX_LISTED = 10  # images set aside that are shown one by one
LONGEST_LISTED = 100  # characters of the reason

DESCRIBED = "described"
NOT_ASKED = "not asked yet"
# Why an image was set aside. Without an answer nothing was paid, so a later run asks again by itself.
UNANSWERED = "unanswered"
REASONS = {
    "refusal": "the model refused each time",
    "loop": "the answer repeats itself without end",
    "cut": "the answer was cut off at --max_new_tokens",
    "empty": "the answers held no text",
    "rejected": "the server does not take this image",
    "unreadable": "the file cannot be read as an image",
    UNANSWERED: "no answer came; the next run asks again",
}


@dataclass
class DescribeArguments:
    images: Path = field(metadata=describe("folder of images, subfolders included"))
    output: Path = field(metadata=describe("captions file (.jsonl); an unfinished one of the same settings goes on"))
    preset: Literal[tuple(PRESETS)] | None = field(
        default=None, metadata=describe("base URL, model and key variable of a provider")
    )
    base_url: str | None = field(default=None, metadata=describe("another OpenAI-compatible endpoint"))
    model: str | None = field(default=None, metadata=describe("another model of the endpoint"))
    key_variable: str | None = field(
        default=None, metadata=describe("name of the environment variable that holds the key")
    )
    prompt_file: Path | None = field(default=None, metadata=describe("UTF-8 text to ask in place of our prompt"))
    use_file_name: bool = field(default=False, metadata=describe("tell the model the file's name, as a hint"))
    max_images: int | None = field(default=None, metadata=describe("only the first N images of the folder"))
    max_tokens_total: int | None = field(
        default=None, metadata=describe("start no image once --output has cost this many tokens, all runs together")
    )
    max_new_tokens: int = field(default=1024, metadata=describe("an answer is cut off here; then it is set aside"))
    max_side: int = field(default=1024, metadata=describe("larger images are scaled to this many pixels a side"))
    concurrency: int = field(default=4, metadata=describe("images asked about at the same time"))
    timeout: float = field(default=60.0, metadata=describe("seconds to wait for an answer"))
    attempts: int = field(default=5, metadata=describe("requests for an image while none brings an answer"))
    attempts_on_refusal: int = field(default=2, metadata=describe("answers bought of an image while they are no good"))
    retry_set_aside: bool = field(default=False, metadata=describe("ask again about the images that were set aside"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        counts = ("max_new_tokens", "max_side", "concurrency", "attempts", "attempts_on_refusal")
        for name in (*counts, "max_images", "max_tokens_total"):
            value = getattr(self, name)
            check_setting(self, name, value is None or value >= 1, "at least 1")
        check_setting(self, "timeout", self.timeout > 0, "seconds above 0")


@dataclass(frozen=True)
class Prompt:
    """What is asked about every image."""

    text: str
    use_file_name: bool

    @property
    def fingerprint(self) -> str:
        """Differs when anything that is asked differs."""
        asked = self.text + (FILE_NAME_HINT if self.use_file_name else "")
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def fill(self, name: str) -> str:
        """The text for an image, with a hint from its file name if there is one in it."""
        # Sets number their files; the number says nothing about the image.
        stem = re.sub(r"^\d+", "", Path(name).stem).strip(" _-")
        return self.text + (FILE_NAME_HINT.format(name=stem) if self.use_file_name and stem else "")


def read_prompt(path: Path | None, use_file_name: bool) -> Prompt:
    """Our prompt, or the text of a file."""
    if path is None:
        return Prompt(DEFAULT_PROMPT, use_file_name)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path}: cannot be read as UTF-8 text ({error})") from error
    if not text:
        raise UserError(f"--prompt_file {path}: is empty")
    return Prompt(text, use_file_name)


def list_images(folder: Path, limit: int | None) -> tuple[list[str], int]:
    """Names of the images below a folder relative to it, in order, and how many other files lie there.

    Raises:
        UserError: no folder, no image, or a name that no caption file can hold.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    paths = [Path(parent, file) for parent, _, files in os.walk(folder) for file in files]
    names = sorted(str(path.relative_to(folder)) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise UserError(f"--images {folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    broken = [name for name in names if not _is_utf8(name)]
    if broken:
        raise UserError(
            f"--images {folder}: {len(broken)} file names are not UTF-8, the first is {broken[0]!r}; "
            "rename them (for names from a Chinese Windows: convmv -f gbk -t utf-8)"
        )
    return names[:limit], len(paths) - len(names)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def choose_open_images(names: list[str], arguments: DescribeArguments, ledger: CaptionLedger) -> list[str]:
    """The images to ask about: without a line, changed since theirs, unanswered, or set aside and asked for again."""
    chosen = []
    for name in names:
        entry = ledger.entries.get(name)
        is_open = (
            entry is None
            or entry.get("set_aside") == UNANSWERED
            or ("set_aside" in entry and arguments.retry_set_aside)
            or entry.get("sha256") != try_hash_file(arguments.images / name)
        )
        if is_open:
            chosen.append(name)
    return chosen


def count_statuses(names: list[str], ledger: CaptionLedger) -> Counter[str]:
    """How many images are described, set aside for each reason, and not asked about."""
    entries = [ledger.entries.get(name) for name in names]
    return Counter(
        NOT_ASKED if entry is None else DESCRIBED if "description" in entry else entry["set_aside"] for entry in entries
    )


class Progress:
    """A bar on a terminal, plain lines elsewhere; use it with `with`.

    Args:
        total: how many images this run asks about.
    """

    def __init__(self, total: int):
        self.total = total
        self.done = self.tokens = self.listed = 0
        self.statuses: Counter[str] = Counter()
        self._is_terminal = sys.stderr.isatty()
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, desc="describe", unit="image", dynamic_ncols=True, disable=not self._is_terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def advance(self, entry: dict) -> None:
        """Count a line that was written, and show the first ones that set an image aside."""
        self.done += 1
        self.tokens += (entry["prompt_tokens"] or 0) + (entry["completion_tokens"] or 0)
        self.statuses[entry.get("set_aside", DESCRIBED)] += 1
        if "set_aside" in entry:
            self.listed += 1
            if self.listed <= MAX_LISTED:
                self.say(f"set aside {entry['picName']}: {entry['set_aside']} ({_shorten(entry['detail'])})")
            elif self.listed == MAX_LISTED + 1:
                self.say("further ones are counted, and listed in the captions file")
        self._bar.set_postfix_str(self._describe_counts(), refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        if not self._is_terminal and (now - self._last_line >= SECONDS_BETWEEN_LINES or self.done == self.total):
            self._last_line = now
            left = tqdm.format_interval((self.total - self.done) * (now - self._start) / self.done)
            self.say(f"describe: {self.done:,} of {self.total:,}, {self._describe_counts()}, {left} left")

    def say(self, text: str) -> None:
        """A line of its own above the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _describe_counts(self) -> str:
        return f"{self.done - self.statuses[DESCRIBED]:,} set aside, {self.tokens:,} tokens"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LISTED else line[:LONGEST_LISTED] + "…"


def print_summary(statuses: Counter[str], ledger: CaptionLedger, tokens_of_run: int) -> None:
    """A table of what became of all images, and what it cost."""
    rows = [(DESCRIBED, statuses[DESCRIBED], "")]
    rows += [(reason, statuses[reason], meaning) for reason, meaning in REASONS.items() if statuses[reason]]
    rows += [(NOT_ASKED, statuses[NOT_ASKED], "")] * bool(statuses[NOT_ASKED])
    print_table("Images", ("status", "images", ""), [*rows, ("all", statuses.total(), "")])
    counts = [ledger.tokens[name] for name in ("prompt_tokens", "completion_tokens")]
    print(
        f"tokens: {tokens_of_run:,} in this run; {counts[0]:,} of prompts and {counts[1]:,} of answers in all of "
        f"{ledger.path}",
        flush=True,
    )
