"""Inspection of image files, many in parallel. Nothing about records."""

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from meme_llava import count_cores
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.images import PARSER_ERRORS, list_header_notes, open_header, open_image
from meme_llava.storage.files import hash_file

SMALLEST_SIDE = 4  # pixels; less is a tracking dot, no image
LOW_RESOLUTION = 64  # pixels; a line of words needs more
EXTREME_RATIO = 50  # of the sides
STRETCHED_RATIO = 4
EXTENSIONS = {
    "JPEG": {".jpg", ".jpeg", ".jfif", ".jpe"},
    "PNG": {".png", ".apng"},
    "GIF": {".gif"},
    "WEBP": {".webp"},
    "BMP": {".bmp", ".dib"},
}
IMAGE_SUFFIXES = frozenset().union(*EXTENSIONS.values())
FILES_PER_TASK = 16
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageFacts:
    """What the contents of one file are, whatever its name and whatever limits a run has.

    `fault` is (kind of finding, detail) if it cannot be used. `decoded` is False if only the header was read.
    """

    sha256: str | None
    format: str | None = None
    width: int = 0
    height: int = 0
    notes: tuple[tuple[str, str], ...] = ()
    fault: tuple[str, str] | None = None
    decoded: bool = False


@dataclass(frozen=True)
class Inspection:
    """How image files are looked at.

    Args:
        decode: open every image whole, in parallel; else read its header.
        workers: processes; None takes the CPUs this process may use.
        show_progress: such as `terminal.show_count`.
    """

    decode: bool = True
    workers: int | None = None
    show_progress: Callable | None = None

    def inspect(self, paths: Iterable[Path], max_pixels: int) -> dict[Path, ImageFacts]:
        """What every file is, each looked at once."""
        paths = list(dict.fromkeys(paths))
        if not self.decode:
            return {path: inspect_image(path, max_pixels, decode=False) for path in paths}
        if self.show_progress is None:
            return inspect_images(paths, max_pixels, self.workers)
        with self.show_progress("images", len(paths)) as advance:
            return inspect_images(paths, max_pixels, self.workers, advance)


def inspect_image(path: Path, max_pixels: int, decode: bool = True) -> ImageFacts:
    """Open a file and say what it is, after decoding it whole unless it has more than `max_pixels`.

    Without `decode` only the header is read: its format and size are known then, nothing else.
    """
    try:
        with warnings.catch_warnings(record=True, action="always") as caught, open_header(path, sys.maxsize) as image:
            width, height = image.size
            if not decode:
                return ImageFacts(None, image.format, width, height)
            sha256 = hash_file(path)
            if width * height > max_pixels:
                return ImageFacts(sha256, image.format, width, height)
            notes = _list_notes(image)
            # Pillow reads EXIF blocks with its parser for TIFF.
            broken = [str(warning.message) for warning in caught if "TiffImagePlugin" in warning.filename]
            if broken:
                notes.append(("broken_exif", broken[0]))
        open_image(path, max_pixels=max_pixels)
        return ImageFacts(sha256, image.format, width, height, tuple(notes), decoded=True)
    except RecordFault as fault:
        has_contents = decode and fault.kind not in ("missing_image", "unreadable_file")
        # The same contents may stand under another name.
        detail = str(fault).removeprefix(f"{path}: ")
        return ImageFacts(hash_file(path) if has_contents else None, fault=(fault.kind, detail), decoded=decode)


def _list_notes(image: Image.Image) -> list[tuple[str, str]]:
    try:
        return list(list_header_notes(image))
    except PARSER_ERRORS as error:
        raise RecordFault("damaged_image", f"the image is damaged ({error})") from error


def check_image(path: Path, facts: ImageFacts, max_pixels: int) -> list[tuple[str, str]]:
    """The findings about a file, as (kind, detail), under this run's limits."""
    if facts.fault is not None:
        return [(facts.fault[0], f"{path}: {facts.fault[1]}")]
    width, height = facts.width, facts.height
    shape = f"{path}: {width}x{height} pixels"
    if width * height > max_pixels:
        return [("too_many_pixels", f"{shape}, more than the limit of {max_pixels:,} (--max_pixels)")]
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
    paths: Iterable[Path],
    max_pixels: int,
    workers: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[Path, ImageFacts]:
    """Open and decode every file, in parallel.

    Args:
        workers: processes; None takes the CPUs this process may use.
        advance: takes how many files were done.
    """
    found: dict[Path, ImageFacts] = {}
    inspect = partial(inspect_image, max_pixels=max_pixels)
    for path, facts in _map_in_processes(inspect, list(dict.fromkeys(paths)), workers or count_cores(), _blame):
        found[path] = facts
        advance(1)
    return found


def _map_in_processes(
    function: Callable[[Path], Result], paths: list[Path], workers: int, blame: Callable[[Path], Result]
) -> Iterator[tuple[Path, Result]]:
    """Every path with its result, in order; `blame` gives that of a file that kills its process."""
    while len(paths) > FILES_PER_TASK and workers > 1:
        processes = min(workers, -(-len(paths) // FILES_PER_TASK))
        done = 0
        try:
            with _start_processes(processes) as pool:
                for path, result in zip(paths, pool.map(function, paths, chunksize=FILES_PER_TASK), strict=True):
                    yield path, result
                    done += 1
            return
        except BrokenProcessPool:
            # One of the files in work did it, so each of them gets a process of its own; then the rest goes on.
            suspects, paths = paths[done:][: processes * FILES_PER_TASK], paths[done + processes * FILES_PER_TASK :]
        for path in suspects:
            with _start_processes(1) as pool:
                try:
                    result = pool.submit(function, path).result()
                except BrokenProcessPool:
                    result = blame(path)
            yield path, result
    yield from zip(paths, map(function, paths), strict=True)


def _start_processes(count: int) -> ProcessPoolExecutor:
    # Forked ones start at once, with what is loaded already.
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"))


def _blame(path: Path) -> ImageFacts:
    return ImageFacts(None, fault=("damaged_image", "decoding it kills the program that does it"), decoded=True)
