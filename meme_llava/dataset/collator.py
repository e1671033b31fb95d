"""Batches: images as tensors, and examples packed into one row without padding. Nothing about prompts or models.

The collator is the only place that decides a batch's layout; meme_llava/model/packed_llava.py is its only reader.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.dataset.images import MAX_PIXELS, ImagePolicy, fit_to_square, open_image
from meme_llava.dataset.sampling import LossAverage, count_common_prefix


@dataclass(frozen=True)
class PackingCollator:
    """Packs examples into one row in which records about the same image share the beginning that they have in common.

    Two records ask about one image of 2 image tokens (I) and part after it; a third is text only. One letter is a
    token, capitals carry loss:

        records             I I q A B          I I q C            d E
        row position        0 1 2 3 4                5            6 7
        input_ids         [[I I q A B                C            d E]]
        position_ids      [[0 1 2 3 4                3            0 1]]
        cu_seqlens_q     [0                        5            6    8]
        path of a segment   0 1 2 3 4          0 1 2 5            6 7
        loss_positions      2 3                2                  6
        loss_targets        A B                C                  E

    The image is encoded once and its tokens stand once. A segment is what a record adds to the row. Its positions
    attend to the record's whole path, up to themselves; so every record sees what it would see alone, and q, where the
    two captions part, predicts A and C.

    A batch without any image carries a blank one that no token shows: with several processes all of them must run
    the vision tower in every step, or the gradient exchange waits for ever.

    Args:
        loss_average: "token": every supervised token weighs the same; "caption": every record does, its tokens sharing
            its weight.
        shared_images: if False, every record stands alone with images of its own.
    """

    image_token_id: int
    tokens_per_image: int
    image_size: int
    loss_average: LossAverage = "token"
    shared_images: bool = True

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | int]:
        """Pack `MemeDataset` items.

        Returns:
            input_ids, position_ids: int64 (1, positions).
            cu_seqlens_q: int32 (segments + 1,), where each segment begins, and the end of the row.
            kv_index: int64 (keys,), the row positions of all paths, one path after the other.
            cu_seqlens_k: int32 (segments + 1,), where each path begins in kv_index, and its end.
            max_seqlen_q, max_seqlen_k: positions, as plain numbers.
            pixel_values: uint8 (images, 3, size, size).
            image_runs: int64 (runs,), which image each run of image tokens shows.
            loss_positions, loss_targets: int64 (supervised,); the hidden state at the position predicts the target.
            loss_weights: float32 (supervised,).
        """
        for example in examples:
            self._check_image_tokens(example)
        images = _Images(examples, self.shared_images)
        row = _Row()
        for members in self._gather_groups(examples, images):
            row.add_family([examples[member] for member in members], [images.keys[member] for member in members])
        return {
            **row.to_tensors(self.loss_average),
            **images.to_tensors(self.image_size),
            "image_runs": torch.from_numpy(self._find_image_runs(row)),
        }

    def _check_image_tokens(self, example: dict) -> None:
        # Only the totals of a batch would be compared: two wrong records can cancel out and swap their images.
        found = int((example["input_ids"] == self.image_token_id).sum())
        expected = len(example["pixel_values"]) * self.tokens_per_image
        if found != expected:
            raise ValueError(
                f"record {example['record_id']!r} has {found} image tokens for {len(example['pixel_values'])} "
                f"image(s) of {self.tokens_per_image}"
            )

    def _gather_groups(self, examples: list[dict], images: "_Images") -> Iterable[list[int]]:
        """Records that may share a beginning, those with the same first image, so that neighbours share most."""
        groups: dict[int | str, list[int]] = {}
        for number, example in enumerate(examples):
            key_ids = example["input_ids"].numpy().copy()
            is_image = key_ids == self.image_token_id
            # Negative numbers are not tokens: image tokens are equal only if they show the same image.
            key_ids[is_image] = -1 - np.repeat(images.numbers[number], self.tokens_per_image)
            images.keys.append(key_ids)
            first = images.numbers[number][0] if len(images.numbers[number]) else f"text {number}"
            groups.setdefault(first, []).append(number)
        for members in groups.values():
            yield sorted(members, key=lambda member: images.keys[member].tolist())

    def _find_image_runs(self, row: "_Row") -> np.ndarray:
        keys = np.concatenate(row.keys)
        return -1 - keys[keys < 0][:: self.tokens_per_image]


class _Images:
    """The different images of a batch, and which of them every example shows."""

    def __init__(self, examples: list[dict], shared: bool):
        self.tensors: list[torch.Tensor] = []
        self.numbers: list[np.ndarray] = []  # per example: int64 (images,)
        self.keys: list[np.ndarray] = []  # per example: int64 (length,), tokens with images in place of image tokens
        known: dict = {}
        for example in examples:
            numbers = []
            for path, image in zip(example["image_paths"], example["pixel_values"], strict=True):
                number = known.get(path) if shared else None
                if number is None:
                    number = known[path] = len(self.tensors)
                    self.tensors.append(image)
                numbers.append(number)
            self.numbers.append(np.array(numbers, np.int64))

    def to_tensors(self, image_size: int) -> dict[str, torch.Tensor]:
        if not self.tensors:
            return {"pixel_values": torch.zeros((1, 3, image_size, image_size), dtype=torch.uint8)}
        return {"pixel_values": torch.stack(self.tensors)}


class _Row:
    """A packed row while it is filled."""

    def __init__(self) -> None:
        self._length = 0
        self._input_ids: list[np.ndarray] = []
        self._position_ids: list[np.ndarray] = []
        self._paths: list[np.ndarray] = []
        self._segment_lengths: list[int] = []
        self._losses: list[tuple[np.ndarray, np.ndarray]] = []  # per record: positions, targets
        self.keys: list[np.ndarray] = []

    def add_family(self, examples: list[dict], keys: list[np.ndarray]) -> None:
        """Append records as a tree; `keys` are their tokens with images in place of image tokens, in sorted order."""
        path = np.empty(0, np.int64)
        previous = np.empty(0, np.int64)
        for example, key in zip(examples, keys, strict=True):
            shared = count_common_prefix(previous, key)
            added = len(key) - shared
            path = np.concatenate([path[:shared], np.arange(self._length, self._length + added)])
            previous = key
            labels = example["labels"].numpy()
            supervised = np.flatnonzero(labels[1:] != IGNORED_LABEL) + 1
            self._losses.append((path[supervised - 1], labels[supervised]))
            if added:
                self._input_ids.append(example["input_ids"].numpy()[shared:])
                self._position_ids.append(np.arange(shared, len(key)))
                self._paths.append(path)
                self._segment_lengths.append(added)
                self.keys.append(key[shared:])
                self._length += added

    def to_tensors(self, loss_average: LossAverage) -> dict[str, torch.Tensor | int]:
        path_lengths = [len(path) for path in self._paths]
        weights = [
            np.full(len(targets), 1.0 if loss_average == "token" else 1.0 / max(len(targets), 1), np.float32)
            for _, targets in self._losses
        ]
        return {
            "input_ids": torch.from_numpy(np.concatenate(self._input_ids))[None],  # (1, positions)
            "position_ids": torch.from_numpy(np.concatenate(self._position_ids))[None],  # (1, positions)
            "cu_seqlens_q": _to_starts(self._segment_lengths),
            "kv_index": torch.from_numpy(np.concatenate(self._paths)),
            "cu_seqlens_k": _to_starts(path_lengths),
            "max_seqlen_q": max(self._segment_lengths),
            "max_seqlen_k": max(path_lengths),
            "loss_positions": torch.from_numpy(np.concatenate([positions for positions, _ in self._losses])),
            "loss_targets": torch.from_numpy(np.concatenate([targets for _, targets in self._losses])),
            "loss_weights": torch.from_numpy(np.concatenate(weights)),
        }


def _to_starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def read_pixels(path: Path, policy: ImagePolicy, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Pixels of a file in a model's square, uint8 (3, size, size); raises as `open_image` does."""
    return to_pixels(open_image(path, policy, max_pixels), policy)


def to_pixels(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize an RGB image. Returns uint8 of shape (3, size, size)."""
    pixels = np.asarray(fit_to_square(image, policy))  # (size, size, 3)
    # Copied by NumPy, which starts no threads: loader processes share the CPUs already.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def normalise(pixels: torch.Tensor, policy: ImagePolicy) -> torch.Tensor:
    """Pixels as a vision tower takes them: uint8 (…, 3, size, size) to float32 of the same shape, on their device."""
    # A number instead of the first would make CUDA multiply by its inverse, which differs in the last bit. The copies
    # need not wait until a GPU has done all that it was asked to before.
    largest, mean, std = (
        torch.tensor(numbers).to(pixels.device, non_blocking=True).view(-1, 1, 1)
        for numbers in ((255.0,), policy.mean, policy.std)
    )
    return (pixels.float() / largest - mean) / std


def to_pixel_values(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize and normalise an RGB image. Returns float32 of shape (3, size, size)."""
    return normalise(to_pixels(image, policy), policy)
