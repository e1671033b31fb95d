"""What a run starts from: a checkpoint or none, the records that train, those that are evaluated."""

from dataclasses import dataclass

from meme_llava.dataset.dataset import LoadedData, load_records
from meme_llava.dataset.image_inspection import Inspection
from meme_llava.dataset.tokenization import Tokenization
from meme_llava.distributed.processes import broadcast_from_main
from meme_llava.model.llava import Processing, load_processing
from meme_llava.train.resume import StartPoint, choose_start
from meme_llava.train.session import Session
from meme_llava.train.settings import TrainArguments
from meme_llava.train.trackers import check_trackers
from meme_llava.train.validation import ValidationData, load_validation


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads but the model's weights."""

    start: StartPoint
    processing: Processing
    data: LoadedData
    validation: ValidationData | None = None


def load_inputs(arguments: TrainArguments, session: Session) -> RunInputs:
    """Find the start point, read and check all records; all processes call it together.

    Raises:
        UserError: a tracker cannot be used, a checkpoint is damaged, or a record is bad.
    """
    heartbeat = session.heartbeat
    broadcast_from_main(lambda: check_trackers(arguments.report_to))
    heartbeat.beat()
    start = broadcast_from_main(lambda: choose_start(arguments))
    heartbeat.beat()
    processing = load_processing(arguments.model)
    # Before waiting for the others: of several that end for want of a beat, the stuck one is the first.
    heartbeat.beat()
    # One process looks at every image, and all train on what it found.
    data = broadcast_from_main(lambda: load_training_records(arguments, processing))
    heartbeat.beat()
    validation = broadcast_from_main(lambda: load_validation(arguments, processing))
    return RunInputs(start, processing, data, validation)


def load_training_records(
    arguments: TrainArguments, processing: Processing, inspection: Inspection | None = None
) -> LoadedData:
    """The records that train.

    Args:
        inspection: how images are looked at; every one is opened whole if it is not given.

    Raises:
        UserError: a record is bad or does not fit into model_max_length, or nothing is left.
    """
    tokens = Tokenization(processing.encoder, arguments.model_max_length)
    return load_records(arguments.source, arguments, tokens, processing.image_policy, inspection)
