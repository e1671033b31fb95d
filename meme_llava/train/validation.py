"""The validation records of a run: which there are, how they are split, what is asked of them.

Nothing about how a model answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from meme_llava.dataset.check import CheckedData, CheckedRecord, check_records
from meme_llava.dataset.conversation import Tokenization
from meme_llava.dataset.dataset import MemeDataset, load_records
from meme_llava.dataset.inspection import Inspection
from meme_llava.distributed.environment import count_processes, find_rank
from meme_llava.errors import UserError
from meme_llava.inference.questions import Question, find_question
from meme_llava.model.llava import Processing
from meme_llava.storage.files import hash_file
from meme_llava.train.settings import TrainArguments

Item = TypeVar("Item")
ANSWERS = "answers.jsonl"  # in output_dir: what the model said at each evaluation


@dataclass(frozen=True)
class ValidationData:
    """Records that are evaluated while a model trains on others.

    Args:
        records: how many of the dataset, from its beginning, carry the validation loss.
        questions: what is asked.
        shown: places among the questions of those whose answers are shown, each about another image.
        description: for the run record.
    """

    dataset: MemeDataset
    records: int
    questions: Sequence[Question]
    shown: Sequence[int]
    description: dict


def check_validation(arguments: TrainArguments) -> None:
    """Decode every image of the validation records, unless it is known to be sound, and see that they can be asked.

    Raises:
        UserError: a record or image is bad, or no record asks about an image.
    """
    try:
        checked = check_records(arguments.eval_source, arguments)
    except UserError as error:
        raise UserError(f"--eval_annotations {error}") from error
    _list_questions(arguments, checked)


def load_validation(arguments: TrainArguments, processing: Processing) -> ValidationData | None:
    """The validation records, checked; None where nothing is evaluated while training.

    Raises:
        UserError: a record does not fit into model_max_length, or another reason of `check_validation`.
    """
    if arguments.eval_every is None:
        return None
    check_validation(arguments)
    tokens = Tokenization(processing.encoder, arguments.model_max_length)
    # The check has just decoded all images.
    loaded = load_records(arguments.eval_source, arguments, tokens, processing.image_policy, Inspection(decode=False))
    questions = _list_questions(arguments, loaded.checked)
    records = len(_take_first(arguments, loaded.checked))
    return ValidationData(
        loaded.dataset,
        records,
        questions,
        choose_shown(questions, arguments.eval_images),
        {
            "annotations": str(arguments.eval_annotations.resolve()),
            "image_folder": str(arguments.eval_image_folder.resolve()),
            "sha256": hash_file(arguments.eval_annotations),
            "records": records,
            "questions": len(questions),
        },
    )


def _take_first(arguments: TrainArguments, checked: CheckedData) -> list[CheckedRecord]:
    return checked.usable[: arguments.eval_limit]


def _list_questions(arguments: TrainArguments, checked: CheckedData) -> list[Question]:
    found = [find_question(one.record, arguments.eval_image_folder) for one in _take_first(arguments, checked)]
    questions = [question for question in found if question is not None]
    if not questions:
        raise UserError(
            f"--eval_annotations {arguments.eval_annotations}: none of its {len(found)} records begins with <image>, a "
            "line break and a question, so there is nothing to ask"
        )
    return questions


def choose_shown(questions: Sequence[Question], count: int) -> list[int]:
    """The places of `count` questions about different images, spread evenly over all of them."""
    first: dict[Path, int] = {}
    for number, question in enumerate(questions):
        first.setdefault(question.image, number)
    places = list(first.values())
    count = min(count, len(places))
    return [places[number * len(places) // count] for number in range(count)]


def shard_for_rank(items: Sequence[Item]) -> Iterator[tuple[int | None, Item]]:
    """This process's share of the items with their places, in as many rounds as every other process has.

    Where a process has none left it gets the last one again, with None for its place: engines that divide the weights
    need all processes in every forward pass.
    """
    processes, rank = count_processes(), find_rank()
    for start in range(0, len(items), processes):
        place = start + rank
        yield (place, items[place]) if place < len(items) else (None, items[-1])
