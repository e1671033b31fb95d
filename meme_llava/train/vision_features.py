"""The features of a frozen vision tower, computed once and kept in a file while a run trains.

Nothing about records or prompts.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from meme_llava.distributed.environment import count_local_processes, find_local_rank
from meme_llava.distributed.heartbeat import Heartbeat
from meme_llava.distributed.processes import WorkerStart, wait_for_all
from meme_llava.errors import DiskFullError, UserError
from meme_llava.model.llava import count_image_tokens
from meme_llava.model.packed_llava import PackedLlava
from meme_llava.terminal import show_count

VISION_FEATURES = "vision_features"
IMAGES_AT_ONCE = 16


class VisionFeatures:
    """Features of images in one file, each (tokens, vision width), read where they are needed.

    Args:
        path: a file of (images, tokens, width) numbers of `dtype`, one after the other.
        image_paths: the images in the order of the file.
    """

    def __init__(self, path: Path, image_paths: Sequence[Path], tokens: int, width: int, dtype: torch.dtype):
        self.path = path
        self._rows = {image: row for row, image in enumerate(image_paths)}
        self._shape = (len(image_paths), tokens, width)
        self._dtype = dtype

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def __getitem__(self, image: Path) -> torch.Tensor:
        return self._open("c")[self._rows[image]].clone()

    def write(self, rows: Sequence[int], features: torch.Tensor) -> None:
        """Keep the features of some images, (rows, tokens, width)."""
        self._open("r+")[torch.tensor(rows)] = features.to("cpu", self._dtype)

    def _open(self, mode: str) -> torch.Tensor:
        # NumPy has no bfloat16: the file is bytes, and torch says what they mean. "c", copy on write, is for reading:
        # of memory that cannot be written at all torch would warn.
        data = np.memmap(self.path, np.uint8, mode, shape=(self.size,))
        return torch.from_numpy(data).view(self._dtype).view(self._shape)


class _Images(Dataset):
    def __init__(self, paths: Sequence[Path], rows: Sequence[int], read_image: Callable[[Path], torch.Tensor]):
        self._paths, self._rows, self._read_image = paths, rows, read_image

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        row = self._rows[index]
        try:
            return row, self._read_image(self._paths[row])
        except ValueError as error:
            raise UserError(str(error)) from error


def encode_images(
    model: PackedLlava,
    paths: Sequence[Path],
    read_image: Callable[[Path], torch.Tensor],
    output_dir: Path,
    workers: int,
    uses_bf16: bool,
    heartbeat: Heartbeat,
) -> VisionFeatures:
    """Encode every image once. The processes of a machine share the work and the file.

    Args:
        model: with a frozen vision tower, on the device that trains.
        paths: images, each once.
        read_image: pixels of a file, uint8 (3, size, size).

    Raises:
        UserError: there is no image, one cannot be decoded, or the disk has no room; with the size that is needed.
    """
    if not paths:
        raise UserError("--cache_vision_features: no record has an image; leave it out")
    folder = output_dir / VISION_FEATURES / os.environ.get("GROUP_RANK", "0")  # machines may see the same disk
    process, processes = find_local_rank(), count_local_processes()
    config = model.config
    dtype = torch.bfloat16 if uses_bf16 else torch.float32
    features = VisionFeatures(
        folder / "features.bin", paths, count_image_tokens(config), config.vision_config.hidden_size, dtype
    )
    if process == 0:
        _make_room(features)
    wait_for_all()
    rows = range(len(paths))[process::processes]
    images = _Images(paths, rows, read_image)
    # A SIGTERM to the whole job is this process's to answer; a worker that it kills would be an error of its own.
    loader = DataLoader(images, IMAGES_AT_ONCE, num_workers=workers, worker_init_fn=WorkerStart())
    with show_count("images encoded", len(rows)) as advance, torch.no_grad():
        for numbers, pixels in loader:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16):
                features.write(numbers.tolist(), model.encode_images(pixels.to(model.device)))
            advance(len(numbers))
            heartbeat.beat()
    wait_for_all()
    return features


def remove_features(output_dir: Path) -> None:
    """Delete what `encode_images` wrote."""
    shutil.rmtree(output_dir / VISION_FEATURES, ignore_errors=True)


def _make_room(features: VisionFeatures) -> None:
    folder = features.path.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with features.path.open("wb") as file:
            # Reserved now: a disk that fills up under a mapped file kills the process without a word.
            os.posix_fallocate(file.fileno(), 0, features.size)
    except OSError as error:
        free = shutil.disk_usage(folder).free / 1e9
        features.path.unlink(missing_ok=True)
        raise DiskFullError(
            f"{folder}: the vision features take {features.size / 1e9:.1f} GB, {free:.1f} GB are free "
            f"({error.strerror}). Choose an --output_dir with more room, or leave out --cache_vision_features."
        ) from error
