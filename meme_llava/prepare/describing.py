"""Captions bought from a vision model: what is asked about which images of a folder, and when to stop.

How a server is asked stands in `inference.asking`, the captions file in `caption_file`.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meme_llava.cli import setting
from meme_llava.dataset.conversation import is_blank
from meme_llava.dataset.image_files import describe_left_out, find_images
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import find_loop, find_refusal
from meme_llava.dataset.user_files import check_file_names, read_text
from meme_llava.errors import UserError, printable
from meme_llava.inference.endpoints import PRESETS, Endpoint
from meme_llava.inference.questions import Prediction, Question
from meme_llava.inference.settings import TEMPERATURE_HELP
from meme_llava.prepare.caption_file import CaptionLedger
from meme_llava.storage.files import try_hash_file
from meme_llava.terminal import print_table, show_count

# The words first: they are what a reader of memes must learn. A model that may say "unreadable" invents less.
DEFAULT_PROMPT = """请用中文描述这张表情包，写成一段通顺的话，依次说清三件事：
一、图中的文字：一字不差地照抄，放在引号“”里，不改字，不翻译；看不清的字写“（看不清）”；没有字就说明图中没有文字。
二、画面：是什么人物、动物或物品，长什么样，什么表情，在做什么；认不出是谁就只描述外貌，不要猜名字。
三、含义：表达了什么意思或情绪，一般在什么时候用。
只写图中能看到的内容和由此能确定的意思，不要编造。不要写标题、序号和开场白。"""
FILE_NAME_HINT = "\n这张图的文件名是“{name}”，其中可能有图中的文字，也可能有错，以图为准。"

MAX_LISTED = 10  # images set aside that are shown one by one
LONGEST_LISTED = 100  # characters of the reason
# This many images set aside in a row, with none answered between them, are not an accident.
LONGEST_BAD_RUN = 10

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
NOTHING_PAID = {"prompt_tokens": None, "completion_tokens": None, "attempts": 0, "seconds": 0.0}
FREE_REASONS = ("rejected", "unreadable", UNANSWERED)  # without an answer that was paid for


@dataclass
class DescribeArguments:
    images: Path = setting("folder of images, subfolders included")
    output: Path = setting("captions file (.jsonl); an unfinished one of the same settings goes on")
    preset: Literal[tuple(PRESETS)] | None = setting("base URL, model and key variable of a provider", None)
    base_url: str | None = setting("another OpenAI-compatible endpoint", None)
    model: str | None = setting("another model of the endpoint", None)
    key_variable: str | None = setting("name of the environment variable that holds the key", None)
    prompt_file: Path | None = setting("UTF-8 text to ask in place of our prompt", None)
    use_file_name: bool = setting("tell the model the file's name, as a hint", False)
    max_images: int | None = setting("only the first N images of the folder", None, expected="at least 1")
    max_tokens_total: int | None = setting(
        "start no image once --output has cost this many tokens, all runs together", None, expected="at least 1"
    )
    max_new_tokens: int = setting("an answer is cut off here; then it is set aside", 1024, expected="at least 1")
    max_side: int = setting("larger images are scaled to this many pixels a side", 1024, expected="at least 1")
    concurrency: int = setting("images asked about at the same time", 4, expected="at least 1")
    timeout: float = setting("seconds to wait for an answer", 60.0, expected="greater than 0")
    temperature: float | None = setting(
        f"{TEMPERATURE_HELP}; the server's own if not given", None, expected="0 or more"
    )
    attempts: int = setting("requests for an image while none brings an answer", 5, expected="at least 1")
    attempts_on_refusal: int = setting("answers bought of an image while they are no good", 2, expected="at least 1")
    retry_set_aside: bool = setting("ask again about the images that were set aside", False)


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
    if is_blank(text := read_text(path).strip()):
        raise UserError(f"--prompt_file {path}: is empty")
    return Prompt(text, use_file_name)


def describe_purchase(arguments: DescribeArguments, endpoint: Endpoint, prompt: Prompt) -> dict:
    """What makes two captions of an image the same purchase; a file holds captions of one kind only."""
    sent = {} if arguments.temperature is None else {"temperature": arguments.temperature}
    return {"model": endpoint.model, "prompt": prompt.fingerprint, **sent}


def list_images(folder: Path, limit: int | None) -> tuple[list[str], str]:
    """Names of the images below a folder relative to it, in order, and what else lies there, as a message says it.

    Raises UserError for no folder, no image, or a name that no caption file can hold.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    images, left_out = find_images(folder)
    others = describe_left_out(left_out)
    if not images:
        raise UserError(f"--images {folder}: holds no image ({others or 'nothing'})")
    check_file_names("--images", folder, images)
    return sorted(str(path.relative_to(folder)) for path in images)[:limit], others


def choose_open_images(names: list[str], arguments: DescribeArguments, ledger: CaptionLedger) -> list[str]:
    """The images to ask about: without a line, changed since theirs, unanswered, or set aside and asked for again."""

    def is_open(name: str) -> bool:
        entry = ledger.entries.get(name)
        return (
            entry is None
            or entry.get("set_aside") == UNANSWERED
            or ("set_aside" in entry and arguments.retry_set_aside)
            or entry.get("sha256") != try_hash_file(arguments.images / name)
        )

    return [name for name in names if is_open(name)]


class CaptionRun:
    """One run over images of a folder; the ledger gets a line for every one that is described or set aside.

    Attributes:
        stop_reason: why not all images were asked about though nothing failed, or None.
    """

    def __init__(self, arguments: DescribeArguments, endpoint: Endpoint, prompt: Prompt, ledger: CaptionLedger):
        self._arguments, self._endpoint, self._prompt, self._ledger = arguments, endpoint, prompt, ledger
        self.stop_reason: str | None = None
        self._error: str | None = None
        self._set_aside = self._bad_run = 0
        self._asked: list[tuple[str, str | None]] = []  # name and hash of every image, in the order of the questions

    def describe(self, names: list[str]) -> None:
        """Ask about the images. Raises UserError where going on would only burn images or money."""
        # openai is installed by those who ask servers.
        from meme_llava.inference.asking import ask_all

        arguments = self._arguments
        answers = ask_all(
            self._endpoint,
            self._list_questions(names),
            arguments.concurrency,
            arguments.max_new_tokens,
            arguments.timeout,
            temperature=arguments.temperature,
            retries=arguments.attempts - 1,
            tries=arguments.attempts_on_refusal,
            max_side=arguments.max_side,
            check=find_problem,
        )
        with show_count("images", len(names)) as self._advance:
            for place, prediction, cost in answers:
                self._settle(*self._asked[place], prediction, cost)
        if self._error is not None:
            raise UserError(self._error)

    def _list_questions(self, names: list[str]) -> Iterator[Question]:
        budget = self._arguments.max_tokens_total
        for name in names:
            if budget is not None and (spent := self._ledger.tokens.total()) >= budget:
                self.stop_reason = f"{spent:,} tokens reach --max_tokens_total {budget:,}"
            if self.stop_reason is not None or self._error is not None:
                return
            digest = try_hash_file(self._arguments.images / name)
            try:
                path = resolve_image_path(name, self._arguments.images)
            except ValueError as error:
                nowhere = Prediction(Question(Path(name), ""), "", problem=f"unreadable: {error}")
                self._settle(name, digest, nowhere, NOTHING_PAID)
                continue
            self._asked.append((name, digest))
            yield Question(path, self._prompt.fill(name))

    def _settle(self, name: str, digest: str | None, prediction: Prediction, cost: dict) -> None:
        """Write the line of an image, and stop where the next ones would have none of use."""
        origin = {"endpoint": self._endpoint.host, **describe_purchase(self._arguments, self._endpoint, self._prompt)}
        reason, line = None, {"description": prediction.text}
        if prediction.problem is not None:
            reason, _, detail = prediction.problem.partition(": ")
            # Where the folder lies on this machine is not business of the file's readers.
            detail = detail.removeprefix(f"{prediction.question.image}: ")
            answer = None if reason in FREE_REASONS else prediction.text
            line = {"set_aside": reason, "detail": detail, "answer": answer}
            self._set_aside += 1
            if self._set_aside <= MAX_LISTED:
                shown = " ".join(detail.split())[:LONGEST_LISTED]
                print(printable(f"set aside {name}: {reason} ({shown})"), file=sys.stderr)
        self._ledger.append({"picName": name, **line, **origin, **cost, "sha256": digest})
        self._advance(1)
        if reason != "unreadable":
            self._bad_run = 0 if reason is None else self._bad_run + 1
        if self._bad_run >= LONGEST_BAD_RUN:
            again = "" if reason == UNANSWERED else " with --retry_set_aside"
            self._error = self._error or (
                f"{LONGEST_BAD_RUN} images in a row were set aside, the last as {reason}: {detail}; "
                f"fix the cause, then start the same command again{again}, or one with another --model and --output"
            )
        is_counted = reason in FREE_REASONS or None not in (cost["prompt_tokens"], cost["completion_tokens"])
        if self._arguments.max_tokens_total is not None and not is_counted:
            self._error = "the server does not say how many tokens an answer took, so --max_tokens_total cannot be kept"


def find_problem(prediction: Prediction) -> str | None:
    """Why an answer is not a caption, or None if it is one."""
    if refused := find_refusal(prediction.text):
        return f"refusal: {refused}"
    # Before the length: a loop runs into the limit too, but may end when asked again.
    if piece := find_loop(prediction.text):
        return f"loop: {piece}"
    return f"cut: {prediction.tokens or 'its'} tokens were not enough" if prediction.stopped is False else None


def print_summary(names: list[str], ledger: CaptionLedger, tokens_of_run: int) -> Counter[str]:
    """Print what became of all images and what it cost; return how many are described, set aside, and not asked."""
    entries = [ledger.entries.get(name) for name in names]
    statuses = Counter(NOT_ASKED if entry is None else entry.get("set_aside", DESCRIBED) for entry in entries)
    rows = [(DESCRIBED, statuses[DESCRIBED], "")]
    rows += [(reason, statuses[reason], meaning) for reason, meaning in REASONS.items() if statuses[reason]]
    rows += [(NOT_ASKED, statuses[NOT_ASKED], "")] * bool(statuses[NOT_ASKED])
    print_table("Images", ("status", "images", ""), [*rows, ("all", statuses.total(), "")])
    print(
        f"tokens: {tokens_of_run:,} in this run; {ledger.tokens['prompt_tokens']:,} of prompts and "
        f"{ledger.tokens['completion_tokens']:,} of answers in all of {ledger.path}",
        flush=True,
    )
    return statuses
