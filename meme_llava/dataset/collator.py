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
from meme_llava.errors import count


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
            image_positions: int64 (runs * tokens_per_image,), where image tokens stand in the row.
            loss_positions, loss_targets: int64 (supervised,); the hidden state at the position predicts the target.
            loss_weights: float32 (supervised,).
        """
        pixels, shown = self._number_images(examples)
        keys = [self._make_key(example, numbers) for example, numbers in zip(examples, shown, strict=True)]
        families: dict[int | str, list[int]] = {}
        for number, numbers in enumerate(shown):
            families.setdefault(numbers[0] if numbers else f"text {number}", []).append(number)
        row, row_keys = _pack_row(examples, keys, families.values(), self.loss_average)
        blank = torch.zeros((1, 3, self.image_size, self.image_size), dtype=torch.uint8)
        image_positions = np.flatnonzero(row_keys < 0)
        return {
            **row,
            "pixel_values": torch.stack(pixels) if pixels else blank,
            "image_runs": torch.from_numpy(-1 - row_keys[image_positions[:: self.tokens_per_image]]),
            "image_positions": torch.from_numpy(image_positions),
        }

    def _number_images(self, examples: list[dict]) -> tuple[list[torch.Tensor], list[list[int]]]:
        """The different images of a batch, and the numbers of those that every example shows."""
        pixels, known, shown = [], {}, []
        for example in examples:
            shown.append([])
            for path, image in zip(example["image_paths"], example["pixel_values"], strict=True):
                if path not in known or not self.shared_images:
                    known[path] = len(pixels)
                    pixels.append(image)
                shown[-1].append(known[path])
        return pixels, shown

    def _make_key(self, example: dict, numbers: list[int]) -> np.ndarray:
        """Its tokens with images in place of image tokens, as negative numbers, which no token has: int64 (length,)."""
        key = example["input_ids"].numpy().copy()
        is_image = key == self.image_token_id
        # Only the totals of a batch would be compared: two wrong records can cancel out and swap their images.
        if (found := int(is_image.sum())) != len(numbers) * self.tokens_per_image:
            raise ValueError(
                f"record {example['record_id']!r} has {found} image tokens for {count(len(numbers), 'image')} "
                f"of {self.tokens_per_image}"
            )
        key[is_image] = -1 - np.repeat(np.array(numbers, np.int64), self.tokens_per_image)
        return key


def _pack_row(
    examples: list[dict], keys: list[np.ndarray], families: Iterable[list[int]], loss_average: LossAverage
) -> tuple[dict[str, torch.Tensor | int], np.ndarray]:
    """One row of all examples, those of a family as a tree, and its keys: int64 (positions,).

    Args:
        keys: of every example, its tokens with images in place of image tokens.
    """
    input_ids, position_ids, paths, row_keys = [], [], [], []  # of every segment
    positions, targets, weights = [], [], []  # of every record
    length = 0
    for members in families:
        path = previous = np.empty(0, np.int64)
        # Sorted, neighbours share most.
        for member in sorted(members, key=lambda member: keys[member].tolist()):
            key, labels = keys[member], examples[member]["labels"].numpy()
            shared = count_common_prefix(previous, key)
            added = len(key) - shared
            path = np.concatenate([path[:shared], np.arange(length, length + added)])
            previous = key
            supervised = np.flatnonzero(labels[1:] != IGNORED_LABEL) + 1
            positions.append(path[supervised - 1])
            targets.append(labels[supervised])
            weight = 1.0 if loss_average == "token" else 1.0 / max(len(supervised), 1)
            weights.append(np.full(len(supervised), weight, np.float32))
            if added:
                input_ids.append(examples[member]["input_ids"].numpy()[shared:])
                position_ids.append(np.arange(shared, len(key)))
                paths.append(path)
                row_keys.append(key[shared:])
                length += added
    segment_lengths, path_lengths = [len(key) for key in row_keys], [len(path) for path in paths]
    row = {
        "input_ids": torch.from_numpy(np.concatenate(input_ids))[None],  # (1, positions)
        "position_ids": torch.from_numpy(np.concatenate(position_ids))[None],  # (1, positions)
        "cu_seqlens_q": _to_starts(segment_lengths),
        "kv_index": torch.from_numpy(np.concatenate(paths)),
        "cu_seqlens_k": _to_starts(path_lengths),
        "max_seqlen_q": max(segment_lengths),
        "max_seqlen_k": max(path_lengths),
        "loss_positions": torch.from_numpy(np.concatenate(positions)),
        "loss_targets": torch.from_numpy(np.concatenate(targets)),
        "loss_weights": torch.from_numpy(np.concatenate(weights)),
    }
    return row, np.concatenate(row_keys)


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


def make_normalisation(policy: ImagePolicy) -> torch.Tensor:
    """What `normalise` works with: the largest value, mean and standard deviation of each colour, (3, 3, 1, 1)."""
    return torch.tensor([[255.0] * 3, policy.mean, policy.std]).view(3, 3, 1, 1)


def normalise(pixels: torch.Tensor, normalisation: torch.Tensor) -> torch.Tensor:
    """Pixels as a vision tower takes them: uint8 (…, 3, size, size) to float32 of the same shape, on their device."""
    # A number as the largest would make CUDA multiply by its inverse, which differs in the last bit.
    largest, mean, std = normalisation
    return (pixels.float() / largest - mean) / std


def to_pixel_values(image: Image.Image, policy: ImagePolicy) -> torch.Tensor:
    """Resize and normalise an RGB image. Returns float32 of shape (3, size, size)."""
    return normalise(to_pixels(image, policy), make_normalisation(policy))
