"""What texts and image files are worth: refusals, endless loops, words of the image that are missing; files looked at
whole, many in parallel.
"""

import multiprocessing
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from meme_llava import count_cores
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, Turn
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.image_files import EXTENSIONS
from meme_llava.dataset.images import PARSER_ERRORS, list_header_notes, open_header, open_image
from meme_llava.dataset.user_files import describe_near_name
from meme_llava.storage.files import hash_file
from meme_llava.terminal import show_count

SMALLEST_SIDE = 4  # pixels; less is a tracking dot, no image
LOW_RESOLUTION = 64  # pixels; a line of words needs more
EXTREME_RATIO = 50  # of the sides
STRETCHED_RATIO = 4
FILES_PER_TASK = 16
# What a meme says stands in quotes, and memes do say "I cannot": only the speaker's own words count. A mark that opens
# ends the search for one that closes: in a text of nothing but opening marks it would take for ever.
_QUOTED = re.compile(r"“[^“”]*”|‘[^‘’]*’|「[^「」]*」|『[^『』]*』|《[^《》]*》|\"[^\"\n]*\"|\*\*[^*\n]*\*\*")
_UNABLE = "(?:无法|不能|没法|没有办法|不可以|不便|不会|拒绝)"
_DO = (
    "(?:提供|解读|描述|回答|回应|回复|生成|看到|看见|查看|访问|识别|辨认|处理|满足|协助|帮助?|参与|分析|讨论|传播|评论|接受"
    "|对.{0,30}(?:解读|描述|分析|评论))"
)
_REFUSALS = re.compile(
    "|".join(
        (
            rf"(?<!让)(?<!给)我(?:实在|暂时|目前|可能|也|还是|并)?{_UNABLE}(?:直接|继续|够|为[你您]|给[你您]|帮[你您]|向[你您])*{_DO}",
            r"(?:抱歉|对不起|遗憾|不好意思)[，,！!。 ]{0,2}(?:但是?|由于|根据|作为)?(?:[^，。！？\n]{0,20}[，,])?"
            rf"(?:但是?)?我?(?:实在|暂时|目前)?{_UNABLE}",
            r"作为(?:一[个名款位])?[^，。\n]{0,12}(?:AI|人工智能|语言模型)(?:助手|模型|系统)?[，,\s]*我",
            r"我(?:是|只是|被(?:设计|训练|设定)(?:成|为)?)(?:一[个名款位])?[^，。\n]{0,14}(?:AI|人工智能|语言模型)",
            r"我理解[你您](?:的?意思|想(?:让我|表达))[^。\n]{0,20}[，,]\s*但",
            r"(?:违反|违背|不符合)了?我的?[^，。\n]{0,8}(?:准则|原则|规定)",
            r"^\s*请(?:您|你)?(?:先|重新)?(?:提供|上传|发送)[^，。\n]{0,6}(?:图片|图像|照片)",
            r"(?:检测到|包含|涉及|存在)[^，。\n]{0,16}(?:不安全|违规|敏感)内容[，。]?[^\n]{0,12}(?:避免|重试|更换|修改|停止)",
            r"(?i:\bI(?:['’]m| am) (?:sorry|unable|not able)\b|\bI (?:can(?:not|['’]t)|won['’]t) "
            r"(?:assist|help|provide|describe|identify|view|see|process|fulfill|engage|comply|interpret)|\bas an AI\b)",
        )
    )
)
# A piece is degenerate if it stands this many times in a row and these repeats are long, as no meme's own line is.
LOOP_REPEATS = 6
LOOP_CHARACTERS = 60
_LONGEST_PIECE = 120
# The shortest loop, of 6 times 10 characters, repeats so many of its 4-character pieces; most texts repeat fewer.
_SHORT_PIECE = 4
_LEAST_REPEATED = LOOP_CHARACTERS - LOOP_CHARACTERS // LOOP_REPEATS - _SHORT_PIECE + 1
# Loops that change a word each time leave few different pieces: (length of the text, share of different 8-grams).
_VARIED_LENGTH = 400
_VARIED_SHARE = 0.45


def normalise_text(text: str) -> str:
    """Unicode NFKC, lower case, letters and digits only: what is compared when texts are."""
    return "".join(character for character in unicodedata.normalize("NFKC", text).lower() if character.isalnum())


def measure_recall(reference: str, answer: str) -> float:
    """Share of the characters of `reference` that `answer` has, each as often; both are normalised. Empty: 1.0."""
    wanted = Counter(normalise_text(reference))
    if not wanted:
        return 1.0
    return (wanted & Counter(normalise_text(answer))).total() / wanted.total()


def find_refusal(text: str) -> str | None:
    """The words by which a caption refuses to describe its image, or None.

    Looks at the speaker's own words, to the end, since filters cut in there as well; what stands in quotation marks is
    the meme's.
    """
    match = _REFUSALS.search(_QUOTED.sub("“”", text))
    return match.group(0).strip() if match else None


def find_loop(text: str) -> str | None:
    """The piece that a degenerate text repeats without end, or None.

    A piece of up to 120 characters that stands at least 6 times in a row over at least 60 characters; or a text of 400
    characters and more of whose 8-character pieces less than 45 % differ (a loop that counts up or swaps a word); or
    more white space than all else.
    """
    pieces = Counter(text[start : start + _SHORT_PIECE] for start in range(len(text) - _SHORT_PIECE + 1))
    if pieces.total() - len(pieces) < _LEAST_REPEATED:
        return None
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)  # (characters,)
    for period in range(1, min(_LONGEST_PIECE, len(text) // LOOP_REPEATS) + 1):
        # Within a loop of this period every character equals the one a period later.
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        edges = np.concatenate([[-1], breaks, [len(codes) - period]])
        runs = np.diff(edges) - 1 + period
        longest = int(runs.argmax())
        if runs[longest] >= max(LOOP_CHARACTERS, LOOP_REPEATS * period):
            start = int(edges[longest]) + 1
            return text[start : start + period]
    compact = "".join(text.split())
    if len(text) - len(compact) > max(LOOP_CHARACTERS, len(compact)):
        return " "
    if len(compact) >= _VARIED_LENGTH:
        pieces = Counter(compact[start : start + 8] for start in range(len(compact) - 7))
        if len(pieces) < _VARIED_SHARE * pieces.total():
            return pieces.most_common(1)[0][0]
    return None


def check_texts(turns: Sequence[Turn], control_tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The findings about what a record says, as (kind, detail)."""
    for number, turn in enumerate(turns, start=1):
        spelt = [
            token
            for token in control_tokens
            if token in turn.text and not (token == IMAGE_PLACEHOLDER and turn.role == "user")
        ]
        if spelt:
            yield "control_text", f"turn {number} spells {', '.join(spelt)}"
        if turn.role == "assistant":
            if refusal := find_refusal(turn.text):
                yield "refusal", f"turn {number} refuses: {refusal!r}"
            if (loop := find_loop(turn.text)) is not None:
                yield "loop", f"turn {number} repeats {loop[:30]!r}"


@dataclass(frozen=True)
class ImageFacts:
    """What the contents of one file are, whatever its name.

    `fault` is (kind of finding, detail) if it cannot be used. `sha256` is None where only the header was read.
    """

    sha256: str | None
    format: str | None = None
    width: int = 0
    height: int = 0
    notes: tuple[tuple[str, str], ...] = ()
    fault: tuple[str, str] | None = None


def inspect_image(path: Path, max_pixels: int, decode: bool = True) -> ImageFacts:
    """Open a file and say what it is, after decoding it whole; one of more than `max_pixels` stays closed.

    Without `decode` only the header is read: its format and size are known then, nothing else.
    """
    try:
        with warnings.catch_warnings(record=True, action="always") as caught, open_header(path, max_pixels) as image:
            width, height = image.size
            if not decode:
                return ImageFacts(None, image.format, width, height)
            sha256 = hash_file(path)
            try:
                notes = list(list_header_notes(image))
            except PARSER_ERRORS as error:
                raise RecordFault("damaged_image", f"the image is damaged ({error})") from error
            # Pillow reads EXIF blocks with its parser for TIFF.
            broken = [str(warning.message) for warning in caught if "TiffImagePlugin" in warning.filename]
            notes += [("broken_exif", text) for text in broken[:1]]
        pixels = open_image(path, max_pixels=max_pixels)
        if all(lowest == highest for lowest, highest in pixels.getextrema()):
            notes.append(("one_colour", f"every pixel is {pixels.getpixel((0, 0))}"))
        return ImageFacts(sha256, image.format, width, height, tuple(notes))
    except RecordFault as fault:
        has_contents = decode and fault.kind not in ("missing_image", "unreadable_file")
        # The same contents may stand under another name.
        detail = str(fault).removeprefix(f"{path}: ")
        return ImageFacts(hash_file(path) if has_contents else None, fault=(fault.kind, detail))


def check_image(path: Path, facts: ImageFacts, listings: dict[Path, dict[str, str]]) -> list[tuple[str, str]]:
    """The findings about a file, as (kind, detail); `listings` are those of `describe_near_name`."""
    if facts.fault is not None:
        kind, detail = facts.fault
        near = describe_near_name(path, listings) if kind == "missing_image" else ""
        return [(kind, f"{path}: {detail}{near}")]
    width, height = facts.width, facts.height
    shape = f"{path}: {width}x{height} pixels"
    found = [(kind, f"{path}: {detail}") for kind, detail in facts.notes]
    if path.suffix.lower() not in EXTENSIONS[facts.format]:
        found.append(("wrong_extension", f"{path}: holds a {facts.format}"))
    if min(width, height) < SMALLEST_SIDE:
        found.append(("too_small", shape))
    elif min(width, height) < LOW_RESOLUTION:
        found.append(("low_resolution", shape))
    if max(width, height) > EXTREME_RATIO * min(width, height):
        found.append(("extreme_shape", shape))
    elif max(width, height) > STRETCHED_RATIO * min(width, height):
        found.append(("stretched_shape", shape))
    return found


def inspect_images(
    paths: Iterable[Path], max_pixels: int, decode: bool = True, workers: int | None = None
) -> dict[Path, ImageFacts]:
    """Look at every file once.

    Args:
        decode: open images whole, in parallel; else read their headers.
        workers: processes; None takes the CPUs this process may use.
    """
    paths = list(dict.fromkeys(paths))
    if not decode:
        return {path: inspect_image(path, max_pixels, decode=False) for path in paths}
    found: dict[Path, ImageFacts] = {}
    with show_count("images", len(paths)) as advance:
        for path, facts in _inspect_in_processes(paths, max_pixels, workers or count_cores()):
            found[path] = facts
            advance(1)
    return found


def _inspect_in_processes(paths: list[Path], max_pixels: int, workers: int) -> Iterator[tuple[Path, ImageFacts]]:
    """Every path with what its file is, in order."""
    inspect = partial(inspect_image, max_pixels=max_pixels)
    # Forked processes start at once, with what is loaded already.
    start = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"))
    while len(paths) > FILES_PER_TASK and workers > 1:
        processes = min(workers, -(-len(paths) // FILES_PER_TASK))
        done = 0
        try:
            with start(processes) as pool:
                for path, facts in zip(paths, pool.map(inspect, paths, chunksize=FILES_PER_TASK), strict=True):
                    yield path, facts
                    done += 1
            return
        except BrokenProcessPool:
            # One of the files in work did it, so each of them gets a process of its own; then the rest goes on.
            in_work = done + processes * FILES_PER_TASK
            suspects, paths = paths[done:in_work], paths[in_work:]
        for path in suspects:
            with start(1) as pool:
                try:
                    yield path, pool.submit(inspect, path).result()
                except BrokenProcessPool:
                    detail = "decoding it kills the program that does it"
                    yield path, ImageFacts(None, fault=("damaged_image", detail))
    yield from zip(paths, map(inspect, paths), strict=True)
