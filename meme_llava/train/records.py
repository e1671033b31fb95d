"""The records of a run, checked and loaded as its settings say, for training and for validation."""

from pathlib import Path

from meme_llava.dataset.check import CheckedData, check_data, stop_on_bad_records
from meme_llava.dataset.dataset import LoadedData, load_dataset
from meme_llava.dataset.image_cache import ImageCache
from meme_llava.dataset.token_lengths import find_default_folder
from meme_llava.model.llava import Processing
from meme_llava.storage.cache import find_default_cache
from meme_llava.terminal import show_count
from meme_llava.train.settings import TrainArguments


def check_records(arguments: TrainArguments, annotations: Path, image_folder: Path) -> CheckedData:
    """Check records without a model, and decode every image that is not known to be sound.

    Raises:
        UserError: a record or image is bad, or nothing is left.
    """
    checked = check_data(
        annotations,
        image_folder,
        arguments.severities,
        arguments.max_pixels,
        cache=ImageCache(find_default_cache()),
        show_progress=show_count,
    )
    stop_on_bad_records(checked, arguments.bad_records)
    return checked


def load_records(
    arguments: TrainArguments, annotations: Path, image_folder: Path, processing: Processing
) -> LoadedData:
    """Check records, count their tokens and make them ready for batches.

    Raises:
        UserError: a record is bad or does not fit into model_max_length, or nothing is left.
    """
    return load_dataset(
        annotations,
        image_folder,
        processing.encoder,
        processing.image_policy,
        arguments.model_max_length,
        arguments.bad_records,
        arguments.severities,
        arguments.max_pixels,
        ImageCache(find_default_cache(), read_only=True),
        find_default_folder(),
    )
