"""Evaluation of a model while it trains: validation loss, scores of its answers, some of them to look at.

Training does not feel it: no random number is drawn, no gradient is kept. Loaded only by runs with --eval_every.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm
from transformers import StoppingCriteriaList

from meme_llava.dataset.check import CheckedData, check_records
from meme_llava.dataset.dataset import MemeDataset, load_records
from meme_llava.dataset.findings import RecordFault
from meme_llava.distributed.environment import DEEPSPEED, Heartbeat, count_processes, find_rank
from meme_llava.distributed.processes import broadcast_from_main, gather
from meme_llava.errors import UserError, count
from meme_llava.evaluate.scores import compute_scores, describe_measure, name_figure
from meme_llava.inference.generation import Answerer, choose_stops
from meme_llava.inference.questions import Prediction, Question, find_question, warn_of_trained
from meme_llava.model.llava import Processing
from meme_llava.model.packed_llava import answer_unpacked
from meme_llava.storage.files import hash_file, read_lines, write_lines
from meme_llava.terminal import print_table
from meme_llava.train.settings import TrainArguments
from meme_llava.train.trackers import ANSWERS, TrackerRuns


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
    """See without a model that the validation records can be asked. Raises UserError where a record or image is bad, no
    record asks about an image, or the file is a copy of what trains."""
    _list_questions(arguments, _read(arguments, check_records))


def load_validation(arguments: TrainArguments, processing: Processing, training: CheckedData) -> ValidationData:
    """The validation records, checked; says how much of them is among the records that train. Raises UserError where
    a record does not fit into model_max_length, and for the reasons of `check_validation`."""
    length, image_policy = arguments.model_max_length, processing.image_policy
    loaded = _read(arguments, load_records, processing.encoder, length, image_policy)
    questions = _list_questions(arguments, loaded.checked)
    records = len(loaded.checked.usable[: arguments.eval_limit])
    description = {
        "annotations": str(arguments.eval_annotations.resolve()),
        "image_folder": str(arguments.eval_image_folder.resolve()),
        "sha256": hash_file(arguments.eval_annotations),
        "records": records,
        "questions": len(questions),
    }
    description |= warn_of_trained(arguments.eval_annotations, questions, loaded.checked.facts, training)
    shown = choose_shown(questions, arguments.eval_images)
    return ValidationData(loaded.dataset, records, questions, shown, description)


def _read(arguments: TrainArguments, read: Callable, *given):
    try:
        found = read(arguments.eval_annotations, arguments.eval_image_folder, arguments, *given)
    except UserError as error:
        raise UserError(f"--eval_annotations {error}") from error
    if hash_file(arguments.eval_annotations) == hash_file(arguments.annotations):
        raise UserError(
            f"--eval_annotations {arguments.eval_annotations}: holds the records that are trained on "
            f"({arguments.annotations}); give others"
        )
    return found


def _list_questions(arguments: TrainArguments, checked: CheckedData) -> list[Question]:
    records = checked.usable[: arguments.eval_limit]
    found = [find_question(one.record, arguments.eval_image_folder) for one in records]
    questions = [question for question in found if question is not None]
    if not questions:
        raise UserError(
            f"--eval_annotations {arguments.eval_annotations}: none of {count(len(found), 'record')} begins with "
            "<image>, a line break and a question, so there is nothing to ask"
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


class _Interrupted(Exception):
    """The run was asked to stop in the middle of an evaluation."""


@dataclass
class TrainingEvaluation:
    """Evaluates the model of a run on its validation records; all processes call it together.

    Args:
        run: a PreparedRun, which has validation records.
        model: without the engine around it.
        heartbeat: a long evaluation is not a hang.
        ask_to_stop: whether any process was asked to stop; all processes call it at the same time.
    """

    run: Any
    engine_model: nn.Module
    model: nn.Module
    accelerator: Accelerator
    trackers: TrackerRuns
    heartbeat: Heartbeat
    ask_to_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self._plan, self._data, self._arguments = self.run.plan, self.run.plan.validation, self.run.plan.arguments

    def evaluate(self, step: int) -> dict[str, float] | None:
        """The figures of an optimizer step for the log; answers go to the terminal, the trackers and ANSWERS.

        None, in all processes, if the run is asked to stop meanwhile.
        """
        start = time.perf_counter()
        # DeepSpeed computes in bf16 by itself.
        autocast = contextlib.nullcontext if self._plan.engine.kind == DEEPSPEED else self.accelerator.autocast
        try:
            loss = self._measure_loss()
            with answer_unpacked(self.model), autocast():
                predictions = self._ask()
        except _Interrupted:
            return None
        self.heartbeat.beat()
        return broadcast_from_main(lambda: self._report(step, loss, predictions, start))

    def _measure_loss(self) -> float:
        """The mean loss over the validation records, weighed as in training."""

        def measure(numbers: Sequence[int]) -> tuple[float, float]:
            batch = self.run.collator(self._data.dataset.__getitems__(list(numbers)))
            weight = batch["loss_weights"].sum(dtype=torch.float64).item()
            self.engine_model.eval()
            with torch.no_grad():
                loss = self.engine_model(**send_to_device(batch, self.accelerator.device, non_blocking=True))["loss"]
            self.engine_model.train()
            return loss.double().item(), weight

        losses, weights = zip(*self._share(range(self._data.records), measure), strict=True)
        return sum(losses) / sum(weights)

    def _ask(self) -> list[Prediction]:
        """Every question with its answer, in order."""

        def mark_token(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            """A criterion that stops nothing: a token is a sign of progress."""
            self.heartbeat.beat()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        def answer(questions: Sequence[Question]) -> list[Prediction]:
            try:
                return answerer.answer_together(questions, self._arguments.eval_max_new_tokens)
            except RecordFault as error:
                raise UserError(f"{error}; it was sound when the run started") from error

        processing = self._plan.processing
        divided = self._plan.engine.shards_weights and count_processes() > 1
        generation_config = choose_stops(self.model.generation_config, processing)
        generation_config.use_cache = True  # which training turns off
        options = {"synced_gpus": divided, "stopping_criteria": StoppingCriteriaList([mark_token])}
        answerer = Answerer(self.model, processing, generation_config, options, self.accelerator.device)
        return [prediction for several in self._share(self._data.questions, answer) for prediction in several]

    def _share(self, items: Sequence, compute: Callable[[Sequence], Any]) -> list:
        """What is computed of the batches of items, in their order: the same whatever the number of processes.

        Each process computes its share of them, in as many rounds as every other. Where it has none left it gets the
        last one again: engines that divide the weights need all processes in every forward pass. Raises _Interrupted
        where the run is to stop.
        """
        size, own = self._arguments.device_batch_size, {}
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        for place in range(find_rank(), find_rank() + len(batches), count_processes()):
            self.heartbeat.beat()
            if self.ask_to_stop():
                raise _Interrupted
            own[place] = compute(batches[min(place, len(batches) - 1)])
        found = {place: result for of_process in gather(own) for place, result in of_process.items()}
        return [found[place] for place in range(len(batches))]

    def _report(self, step: int, loss: float, predictions: list[Prediction], start: float) -> dict[str, float]:
        """Show the answers of a step and what all are worth, keep them, and return the figures."""
        values = compute_scores(predictions)
        figures = {"eval_loss": loss} | {name_figure(name): value for name, value in values.items()}
        shown = [predictions[place] for place in self._data.shown]
        rows = [
            (str(one.question.image), one.question.text, one.question.reference, one.text, one.stopped) for one in shown
        ]
        path, names = self._arguments.output_dir / ANSWERS, ("image", "question", "reference", "answer", "stopped")
        # Later ones are of a run that was continued before.
        earlier = [line for line in read_lines(path) if line["step"] < step] if path.is_file() else []
        write_lines(path, [*earlier, *({"step": step, **dict(zip(names, row, strict=True))} for row in rows)])
        self.trackers.report_answers(step, shown)
        words = [f"validation loss {loss:.4f}"]
        for name in ("text_found", "characters_wrong", "chrf"):
            if (value := figures.get(name_figure(name))) is not None:
                measure = describe_measure(name)
                words.append(f"{measure.title} {value:.1%}" if measure.is_share else f"{measure.title} {value:.1f}")
        seconds = time.perf_counter() - start
        with tqdm.external_write_mode():
            print_table(f"Answers after step {step}", names[:4], [(Path(row[0]).name, *row[1:4]) for row in rows])
            of = f"{self._data.records} records, {len(predictions)} questions, {seconds:.1f} s"
            print(f"{', '.join(words)}; {of}", flush=True)
        return figures
