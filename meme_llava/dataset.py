"""Knows the records that train as a data set: token ids and pixels, in the order of training.

Knows nothing about batches or models.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from meme_llava.conversation import ConversationEncoder
from meme_llava.data_check import CheckedData, CheckedRecord, check_data, stop_on_bad_records
from meme_llava.errors import UserError
from meme_llava.findings import Severities
from meme_llava.images import MAX_PIXELS, ImagePolicy, read_pixel_values
from meme_llava.picture_cache import PictureCache


class MemeDataset(Dataset):
    """Records as token ids, pictures decoded when asked for.

    An item is {"record_id", "input_ids" int64 (length,), "labels" int64 (length,), "pixel_values" float32
    (images, 3, size, size)}.
    """

    def __init__(self, records: list[CheckedRecord], image_policy: ImagePolicy, max_pixels: int = MAX_PIXELS):
        self._records = records
        self._image_policy = image_policy
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        item = self._records[index]
        size = self._image_policy.size
        try:
            pictures = [read_pixel_values(path, self._image_policy, self._max_pixels) for path in item.image_paths]
        except ValueError as error:
            # Replacing the record would change the data order without a word, so the run stops and names it.
            raise UserError(f"{item.record.place} (id {item.record.record_id!r}): {error}") from error
        return {
            "record_id": item.record.record_id,
            "input_ids": torch.from_numpy(item.input_ids).long(),
            "labels": torch.from_numpy(item.labels).long(),
            "pixel_values": torch.stack(pictures) if pictures else torch.empty(0, 3, size, size),
        }

    @property
    def lengths(self) -> np.ndarray:
        """Positions of every record, image tokens counted: int64 (records,)."""
        return np.array([len(item.input_ids) for item in self._records])

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Positions that carry loss in every record: int64 (records,)."""
        return np.array([item.supervised_length for item in self._records])

    @property
    def image_counts(self) -> np.ndarray:
        """Pictures of every record: int64 (records,)."""
        return np.array([len(item.image_paths) for item in self._records])


@dataclass(frozen=True)
class LoadedData:
    """The records that train, and everything that was found about those and the others."""

    dataset: MemeDataset
    checked: CheckedData

    @property
    def cut_records(self) -> list[str]:
        """The records whose last answer was cut to length."""
        return [str(finding) for finding in self.checked.findings if finding.kind == "cut_answer"]


def load_dataset(
    annotations: Path,
    image_folder: Path,
    encoder: ConversationEncoder,
    image_policy: ImagePolicy,
    max_length: int,
    bad_records: str,
    severities: Severities | None = None,
    max_pixels: int = MAX_PIXELS,
    cache: PictureCache | None = None,
) -> LoadedData:
    """Read, check and encode every record before anything is trained.

    Pictures that an earlier check decoded are known from the cache; of the others the header is read, and one that is
    damaged behind it stops the run when it is reached.

    Args:
        max_length: positions a record may take, image tokens counted.
        bad_records: "error" stops on any bad record; "quarantine" leaves them out.

    Raises:
        UserError: a record is bad under "error" (they are listed), or nothing is left.
    """
    checked = check_data(
        annotations,
        image_folder,
        severities or Severities(),
        max_pixels,
        encoder,
        max_length,
        cache,
        decode=False,
    )
    stop_on_bad_records(checked, bad_records)
    return LoadedData(MemeDataset(checked.usable, image_policy, max_pixels), checked)


class ShuffledEpochs(Dataset):
    """The records in the order of training: one shuffled pass after another, cut at `length` examples.

    The order depends on seed and position alone, so it is the same for every number of processes and after a resume,
    and no record is dropped at the end of a pass: the last optimizer step is filled from the next pass.
    """

    def __init__(self, dataset: MemeDataset, length: int, seed: int):
        self._dataset = dataset
        passes = -(-length // len(dataset))
        orders = [np.random.default_rng([seed, number]).permutation(len(dataset)) for number in range(passes)]
        self.order = np.concatenate(orders)[:length]  # int64 (length,)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        return self._dataset[int(self.order[index])]
