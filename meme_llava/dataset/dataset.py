"""The records that train as a data set: token ids and pixels, in the order of training.

Nothing about batches or models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from meme_llava.dataset.check import CheckedData, CheckedRecord, check_data, stop_on_bad_records
from meme_llava.dataset.conversation import ConversationEncoder
from meme_llava.dataset.findings import Severities
from meme_llava.dataset.image_cache import ImageCache
from meme_llava.dataset.images import MAX_PIXELS, ImagePolicy
from meme_llava.dataset.pixels import read_pixels
from meme_llava.dataset.sampling import BatchShape, PackedLengths, plan_shared_order, shuffle_records
from meme_llava.dataset.token_lengths import PrefixSharing, find_default_folder
from meme_llava.errors import UserError


class MemeDataset(Dataset):
    """Records as token ids and pixels; tokenised and decoded when asked for, in the process that asks.

    An item is {"record_id", "input_ids" int64 (length,), "labels" int64 (length,), "image_paths" one file for every run
    of image tokens, "pixel_values" their pixels, uint8 (3, size, size) each, or features, (tokens, vision width)}.

    Args:
        records: with known lengths.
        sharing: how they share positions.
        max_length: positions a record may take, as its lengths were counted for.
    """

    def __init__(
        self,
        records: list[CheckedRecord],
        sharing: PrefixSharing,
        encoder: ConversationEncoder,
        max_length: int,
        image_policy: ImagePolicy,
        max_pixels: int = MAX_PIXELS,
    ):
        self.sharing = sharing
        self._records = records
        self._encoder = encoder
        self._max_length = max_length
        self._image_policy = image_policy
        self._max_pixels = max_pixels
        # Where every image was encoded once, before training, items hold its features in place of pixels.
        self.vision_features: Mapping[Path, torch.Tensor] | None = None

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
                    images[path] = self._read_image(path)
        except ValueError as error:
            # Replacing the record would change the data order without a word, so the run stops and names it.
            raise UserError(f"{checked.record.place} (id {checked.record.record_id!r}): {error}") from error
        example = self._encoder.encode_example(list(checked.record.turns), self._max_length)
        if len(example.input_ids) != checked.lengths.positions:
            raise UserError(
                f"{checked.record.place} (id {checked.record.record_id!r}): has {len(example.input_ids)} positions, "
                f"but {checked.lengths.positions} were counted at the start. Remove {find_default_folder()}, where "
                "counted lengths are kept, and start again."
            )
        return {
            "record_id": checked.record.record_id,
            # NumPy reads a list four times faster than torch.
            "input_ids": torch.from_numpy(np.array(example.input_ids, np.int64)),
            "labels": torch.from_numpy(np.array(example.labels, np.int64)),
            "image_paths": checked.image_paths,
            "pixel_values": [images[path] for path in checked.image_paths],
        }

    def _read_image(self, path: Path) -> torch.Tensor:
        if self.vision_features is not None:
            return self.vision_features[path]
        return read_pixels(path, self._image_policy, self._max_pixels)

    @property
    def image_paths(self) -> list[Path]:
        """Every different image, in the order of the records."""
        return list(dict.fromkeys(path for checked in self._records for path in checked.image_paths))

    @property
    def lengths(self) -> np.ndarray:
        """Positions of every record, image tokens counted: int64 (records,)."""
        return np.array([checked.lengths.positions for checked in self._records], np.int64)

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Positions that carry loss in every record: int64 (records,)."""
        return np.array([checked.lengths.supervised for checked in self._records], np.int64)

    @property
    def image_counts(self) -> np.ndarray:
        """Images of every record: int64 (records,)."""
        return np.array([len(checked.image_paths) for checked in self._records], np.int64)


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
    cache: ImageCache | None = None,
    length_folder: Path | None = None,
) -> LoadedData:
    """Read and check every record, and count its tokens, before anything is trained.

    Images that an earlier check decoded are known from the cache; of the others the header is read, and one that is
    damaged after its header stops the run when it is reached.

    Args:
        max_length: positions a record may take, image tokens counted.
        bad_records: "error" stops on any bad record; "quarantine" leaves them out.
        length_folder: where counted lengths are kept; None counts anew.

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
        length_folder=length_folder,
    )
    stop_on_bad_records(checked, bad_records)
    sharing = checked.usable_sharing
    dataset = MemeDataset(checked.usable, sharing, encoder, max_length, image_policy, max_pixels)
    return LoadedData(dataset, checked)


class TrainingOrder(Dataset):
    """The records in the order of training: one shuffled pass after another, until all steps are full.

    No record is dropped at the end of a pass: the last optimizer step is filled from the next pass. Which records meet
    in a step depends on the seed and the global batch alone, so a resumed run goes on where it was.

    Args:
        steps: optimizer steps of the whole run.
        shared_images: draw images with all their records, and keep those in one device batch, where they share
            what they have in common; else every record is drawn, and takes positions, for itself.
        first_step: steps that a checkpoint has done; the order leaves their places to record 0, unused.
        first_record: records that those steps trained on.
    """

    def __init__(
        self,
        dataset: MemeDataset,
        steps: int,
        global_batch_size: int,
        device_batch_size: int,
        processes: int,
        seed: int,
        shared_images: bool,
        first_step: int = 0,
        first_record: int = 0,
    ):
        self._dataset = dataset
        self._shape = BatchShape(global_batch_size, device_batch_size, processes)
        self._sharing = dataset.sharing if shared_images else None
        if shared_images:
            to_come = plan_shared_order(
                dataset.lengths, dataset.sharing, steps - first_step, self._shape, seed, first_record
            )
        else:
            end = first_record + (steps - first_step) * global_batch_size
            to_come = shuffle_records(len(dataset), end, seed)[first_record:]
        self._first_record_to_come = first_step * global_batch_size
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
        """The items of the device batch to come with the most positions; it needs the most memory."""
        batches_before = self._first_record_to_come // self._shape.device_batch_size
        return self.fetch_batch(batches_before + int(self.count_batch_positions().argmax()))

    def count_batch_positions(self) -> np.ndarray:
        """Positions of every device batch to come: int64 (steps, rounds, processes)."""
        packed = PackedLengths(self._dataset.lengths, self._sharing)
        batches = self.order[self._first_record_to_come :].reshape(-1, self._shape.device_batch_size).tolist()
        counts = np.array([packed.count(batch) for batch in batches], np.int64)
        return counts.reshape(-1, self._shape.rounds, self._shape.processes)
