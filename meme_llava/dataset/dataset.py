"""The records that train as a data set: token ids and pixels, in the order of training.

Nothing about batches or models.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from meme_llava.dataset.check import CheckedData, CheckedRecord, check_data, stop_on_bad_records
from meme_llava.dataset.collator import read_pixels
from meme_llava.dataset.conversation import ConversationEncoder
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.images import ImagePolicy
from meme_llava.dataset.sampling import BatchShape, PackedLengths, find_sharing, plan_shared_order, shuffle_records
from meme_llava.errors import UserError


class MemeDataset(Dataset):
    """Records as token ids and pixels; images are decoded when asked for, in the process that asks.

    An item is {"record_id", "input_ids" int64 (length,), "labels" int64 (length,), "image_paths" one file for every run
    of image tokens, "pixel_values" their pixels, uint8 (3, size, size) each}.

    Args:
        records: what trains, with their tokens.
    """

    def __init__(
        self,
        records: list[CheckedRecord],
        image_token_id: int,
        tokens_per_image: int,
        image_policy: ImagePolicy,
        max_pixels: int,
    ):
        self._records, self._image_policy, self._max_pixels = records, image_policy, max_pixels
        self._image_token = image_token_id, tokens_per_image
        ids, paths = [one.tokens.ids for one in records], [one.image_paths for one in records]
        self.sharing = find_sharing(ids, paths, image_token_id, tokens_per_image)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The items of a batch; an image that several of them show is decoded once."""
        images: dict[Path, torch.Tensor] = {}
        return [self._make_item(self._records[index], images) for index in indices]

    def _make_item(self, checked: CheckedRecord, images: dict[Path, torch.Tensor]) -> dict:
        try:
            for path in checked.image_paths:
                if path not in images:
                    images[path] = self.read_image(path)
        except ValueError as error:
            # Replacing the record would change the data order without a word, so the run stops and names it.
            raise UserError(f"{checked.record.place} (id {checked.record.record_id!r}): {error}") from error
        input_ids, labels = checked.tokens.spread(*self._image_token)
        return {
            "record_id": checked.record.record_id,
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "image_paths": checked.image_paths,
            "pixel_values": [images[path] for path in checked.image_paths],
        }

    def read_image(self, path: Path) -> torch.Tensor:
        """Pixels of one image, uint8 (3, size, size). Raises as `open_image` does."""
        return read_pixels(path, self._image_policy, self._max_pixels)

    @property
    def image_paths(self) -> list[Path]:
        """Every different image, in the order of the records."""
        return list(dict.fromkeys(path for checked in self._records for path in checked.image_paths))

    @property
    def lengths(self) -> np.ndarray:
        """Positions of every record, image tokens counted: int64 (records,)."""
        return np.array([checked.tokens.positions for checked in self._records], np.int64)

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Positions that carry loss in every record: int64 (records,)."""
        return np.array([checked.tokens.supervised.sum() for checked in self._records], np.int64)

    @property
    def image_counts(self) -> np.ndarray:
        """Images of every record: int64 (records,)."""
        return np.array([len(checked.image_paths) for checked in self._records], np.int64)


class LoadedData(NamedTuple):
    """The records that train, and everything that was found about those and the others."""

    dataset: MemeDataset
    checked: CheckedData

    @property
    def cut_records(self) -> list[str]:
        """The records whose last answer was cut to length."""
        return [str(finding) for finding in self.checked.findings if finding.kind == "cut_answer"]


def load_records(
    annotations: Path,
    image_folder: Path,
    policy: RecordPolicy,
    encoder: ConversationEncoder,
    max_length: int | None,
    image_policy: ImagePolicy,
    decode: bool = True,
) -> LoadedData:
    """Read, check and tokenise every record before anything is trained; the arguments are those of `check_data`.

    Raises:
        UserError: a record is bad and `policy` makes that an error (they are listed), or nothing is left.
    """
    checked = check_data(annotations, image_folder, policy, encoder, max_length, decode)
    stop_on_bad_records(checked)
    token = encoder.image_token_id, encoder.tokens_per_image
    return LoadedData(MemeDataset(checked.usable, *token, image_policy, policy.max_pixels), checked)


class TrainingOrder(Dataset):
    """The records in the order of training: one shuffled pass after another, until all steps are full.

    No record is dropped at the end of a pass: the last optimizer step is filled from the next pass. Which records meet
    in a step depends on the seed and the global batch alone, so a resumed run goes on where it was.

    Args:
        steps: optimizer steps of the whole run.
        shared_images: draw images with all their records, and keep those in one device batch, where they share
            what they have in common; else every record is drawn, and takes positions, for itself.
        first_step: steps that a checkpoint has done; their places hold record 0 and are never read.
        first_record: records that those steps trained on.
        own_rows: records are computed one by one, filled up to the longest of their device batch.
    """

    def __init__(
        self,
        dataset: MemeDataset,
        steps: int,
        shape: BatchShape,
        seed: int,
        shared_images: bool,
        first_step: int = 0,
        first_record: int = 0,
        own_rows: bool = False,
    ):
        self._dataset, self._shape, self._own_rows = dataset, shape, own_rows
        self._sharing = dataset.sharing if shared_images else None
        if shared_images:
            to_come = plan_shared_order(dataset.lengths, dataset.sharing, steps - first_step, shape, seed, first_record)
        else:
            end = first_record + (steps - first_step) * shape.global_batch_size
            to_come = shuffle_records(len(dataset), end, seed)[first_record:]
        self._first_record_to_come = first_step * shape.global_batch_size
        self.order = np.concatenate([np.zeros(self._first_record_to_come, np.int64), to_come])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        return self._dataset[int(self.order[index])]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The items of a batch; an image that several of them show is decoded once."""
        return self._dataset.__getitems__(self.order[indices].tolist())

    def fetch_batch(self, number: int) -> list[dict]:
        """The items of a device batch, counted through the whole run, over all processes."""
        size = self._shape.device_batch_size
        return self.__getitems__(list(range(number * size, (number + 1) * size)))

    def fetch_largest_batch(self) -> list[dict]:
        """The items of the device batch to come that is computed on the most positions; it needs the most memory."""
        batches_before = self._first_record_to_come // self._shape.device_batch_size
        return self.fetch_batch(batches_before + int(self.count_batch_positions().argmax()))

    def count_batch_positions(self) -> np.ndarray:
        """Positions that every device batch to come is computed on: int64 (steps, rounds, processes)."""
        packed = PackedLengths(self._dataset.lengths, self._sharing, self._own_rows)
        batches = self.order[self._first_record_to_come :].reshape(-1, self._shape.device_batch_size).tolist()
        counts = np.array([packed.count(batch) for batch in batches], np.int64)
        return counts.reshape(-1, self._shape.rounds, self._shape.processes)
