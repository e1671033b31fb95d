"""The image files in the folders of a data set, found by the names that captions call them.

Names match in any Unicode normalisation: macOS writes é and が in two characters, everyone else in one.
"""

import difflib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_llava.dataset.check import check_image_folder
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import IMAGE_SUFFIXES
from meme_llava.errors import UserError
from meme_llava.storage.files import hash_file

# Looking for the nearest of 10,000 names takes half a second.
_SUGGESTIONS = 50


@dataclass(frozen=True)
class FoundImage:
    """An image: its path from the image folder, the data set (subfolder) it lies in, and equal files elsewhere."""

    image: str
    data_set: str
    copies: int = 0


class ImageIndex:
    """The images in subfolders of the image folder, by name."""

    def __init__(self, image_folder: Path, subfolders: Sequence[str]):
        """Walk the subfolders; hidden files and folders, and files that are not images by name, are passed over.

        Raises:
            UserError: a folder is missing, lies outside the image folder, or no image is in them.
        """
        check_image_folder(image_folder)
        self.image_folder, self.subfolders = image_folder, list(subfolders)
        self._by_name = defaultdict(list)  # NFC name: [FoundImage]
        self._found, self._suggested = {}, 0
        self.count = 0
        for subfolder in subfolders:
            data_set = Path(subfolder).as_posix()
            for image in _walk_images(image_folder, subfolder):
                self._by_name[_normalise(image.rpartition("/")[2])].append(FoundImage(image, data_set))
                self.count += 1
        if not self.count:
            places = ", ".join(str(image_folder / subfolder) for subfolder in subfolders)
            raise UserError(f"no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {places}")

    def __iter__(self) -> Iterator[tuple[str, list[FoundImage]]]:
        """Every name with its images, in the order of names."""
        yield from sorted(self._by_name.items())

    def find(self, name: str) -> FoundImage:
        """The image that a caption calls `name`: a file name, or the end of a path.

        Raises:
            ValueError: there is none (with the nearest name), or several with different bytes.
        """
        if name not in self._found:
            try:
                self._found[name] = self._find(_normalise(name))
            except ValueError as error:
                self._found[name] = error
        if isinstance(self._found[name], ValueError):
            raise self._found[name]
        return self._found[name]

    def _find(self, name: str) -> FoundImage:
        folder, _, file_name = name.rpartition("/")
        images = self._by_name.get(file_name, [])
        if folder:
            images = [image for image in images if _normalise(f"/{image.image}").endswith(f"/{name}")]
        if not images:
            raise ValueError(f"no image {name!r}{self._suggest(file_name)}")
        return self.choose(images)

    def choose(self, images: list[FoundImage]) -> FoundImage:
        """The first of images with one name, if their bytes are equal.

        Raises:
            ValueError: they differ, or one cannot be read.
        """
        paths = [self._resolve(image) for image in images]
        if len(images) > 1 and len({hash_file(path) for path in set(paths)}) > 1:
            places = ", ".join(image.image for image in images)
            raise ValueError(f"several different images have that name: {places}")
        return FoundImage(images[0].image, images[0].data_set, len(images) - 1)

    def _resolve(self, image: FoundImage) -> Path:
        path = resolve_image_path(image.image, self.image_folder)
        if not path.is_file():
            raise ValueError(f"{image.image} is not a file")
        return path

    def _suggest(self, name: str) -> str:
        self._suggested += 1
        if self._suggested > _SUGGESTIONS:
            return ""
        near = difflib.get_close_matches(name, self._by_name, n=1, cutoff=0.75)
        return f"; the nearest name is {near[0]!r}" if near else ""


def _walk_images(image_folder: Path, subfolder: str) -> Iterator[str]:
    try:
        top = resolve_image_path(subfolder, image_folder)
    except ValueError as error:
        raise UserError(f"--images {subfolder}: must be a folder inside --image_folder ({error})") from error
    if not top.is_dir():
        raise UserError(f"--images {subfolder}: no such folder in {image_folder}")
    root = image_folder.resolve()
    found = []
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                found.append(Path(folder, name).relative_to(root).as_posix())
    yield from sorted(found)


def _normalise(name: str) -> str:
    return unicodedata.normalize("NFC", name)
