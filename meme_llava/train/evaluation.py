"""Evaluation of a model while it trains: validation loss, scores of its answers, some of them to look at.

Training does not feel it: no random number is drawn, no gradient is kept.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from meme_llava.dataset.images import open_image
from meme_llava.distributed.environment import Heartbeat, count_processes
from meme_llava.distributed.processes import broadcast_from_main, gather
from meme_llava.errors import UserError
from meme_llava.evaluate.scores import describe_measure, name_figure, score_predictions
from meme_llava.inference.generation import Answerer, choose_stops
from meme_llava.inference.questions import Prediction
from meme_llava.model.packed_llava import answer_unpacked
from meme_llava.storage.files import read_lines, write_lines
from meme_llava.terminal import print_table
from meme_llava.train.prepared_run import PreparedRun
from meme_llava.train.trackers import TrackerRuns
from meme_llava.train.validation import ANSWERS, shard_for_rank

LOSS = "eval_loss"


class EvaluationInterrupted(Exception):
    """The run was asked to stop in the middle of an evaluation."""


class TrainingEvaluation:
    """Evaluates the model of a run on its validation records; all processes call it together.

    Args:
        run: that has validation records.
        heartbeat: a long evaluation is not a hang.
    """

    def __init__(self, run: PreparedRun, trackers: TrackerRuns, heartbeat: Heartbeat):
        self._arguments, self._engine = run.plan.arguments, run.plan.engine
        self._data, self._processing, self._collator = run.inputs.validation, run.inputs.processing, run.collator
        self._trackers, self._heartbeat = trackers, heartbeat

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether there is an evaluation after an optimizer step; there is one after the last, too."""
        return step > 0 and (step % self._arguments.eval_every == 0 or step == last_step)

    def evaluate(
        self,
        step: int,
        model: nn.Module,
        device: torch.device,
        measure: Callable[[Mapping], torch.Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager],
        is_stopping: Callable[[], bool],
    ) -> dict[str, float]:
        """The figures of an optimizer step for the log; answers go to the terminal, the trackers and ANSWERS.

        Args:
            model: without the engine around it.
            device: that computes.
            measure: the summed loss of a batch, a scalar, computed as in training but without gradient.
            autocast: what a forward pass of `model` runs in.
            is_stopping: whether any process was asked to stop; all processes call it at the same time.

        Raises:
            EvaluationInterrupted: in all processes, if it was.
        """
        start = time.perf_counter()
        loss = self._measure_loss(measure, is_stopping)
        with answer_unpacked(model), autocast():
            predictions = self._ask(model, device, is_stopping)
        self._heartbeat.beat()
        return broadcast_from_main(lambda: self._report(step, loss, predictions, start))

    def _measure_loss(self, measure: Callable[[Mapping], torch.Tensor], is_stopping: Callable[[], bool]) -> float:
        """The mean loss over the validation records, weighed as in training."""
        batches = self._cut(range(self._data.records))
        own = []
        for place, numbers in shard_for_rank(batches):
            self._pause(is_stopping)
            batch = self._collator(self._data.dataset.__getitems__(list(numbers)))
            weight = batch["loss_weights"].sum(dtype=torch.float64).item()
            loss = measure(batch).double().item()
            if place is not None:
                own.append((place, loss, weight))
        # Summed in the order of the batches: the same whatever the number of processes.
        found = sorted(one for several in gather(own) for one in several)
        return sum(loss for _, loss, _ in found) / sum(weight for _, _, weight in found)

    def _ask(self, model: nn.Module, device: torch.device, is_stopping: Callable[[], bool]) -> list[Prediction]:
        """Every question with its answer, in order."""
        divided = self._engine.shards_weights and count_processes() > 1
        marking = StoppingCriteriaList([_Beat(self._heartbeat)])
        generation_config = choose_stops(model.generation_config, self._processing)
        generation_config.use_cache = True  # which training turns off
        options = {"synced_gpus": divided, "stopping_criteria": marking}
        answerer = Answerer(model, self._processing, generation_config, options, device)
        own = []
        for place, questions in shard_for_rank(self._cut(self._data.questions)):
            self._pause(is_stopping)
            try:
                images = [open_image(question.image, self._processing.image_policy) for question in questions]
            except ValueError as error:
                raise UserError(f"{error}; it was sound when the run started") from error
            predictions = answerer.answer_together(images, list(questions), self._arguments.eval_max_new_tokens)
            if place is not None:
                own.append((place, predictions))
        found = sorted((one for several in gather(own) for one in several), key=lambda one: one[0])
        return [prediction for _, several in found for prediction in several]

    def _cut(self, items: Sequence) -> list[Sequence]:
        size = self._arguments.device_batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _pause(self, is_stopping: Callable[[], bool]) -> None:
        self._heartbeat.beat()
        if is_stopping():
            raise EvaluationInterrupted

    def _report(self, step: int, loss: float, predictions: list[Prediction], start: float) -> dict[str, float]:
        """Show the answers of a step, keep them, and return its figures."""
        scores = score_predictions(predictions)
        figures = {LOSS: loss} | {name_figure(name): score.value for name, score in scores.items()}
        shown = [predictions[place] for place in self._data.shown]
        keep_answers(self._arguments.output_dir / ANSWERS, step, shown)
        self._trackers.report_answers(step, shown)
        seconds = time.perf_counter() - start
        with tqdm.external_write_mode():
            print_answers(step, figures, shown, f"{self._data.records} records, {len(predictions)} questions", seconds)
        return figures


class _Beat(StoppingCriteria):
    """Stops nothing; a token is a sign of progress."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self._heartbeat.beat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def keep_answers(path: Path, step: int, shown: Sequence[Prediction]) -> None:
    """Append the answers of a step to those of earlier ones. Later ones are of a run that was continued before."""
    earlier = [line for line in read_lines(path) if line["step"] < step] if path.is_file() else []
    answers = [
        {
            "step": step,
            "image": str(one.question.image),
            "question": one.question.text,
            "reference": one.question.reference,
            "answer": one.text,
            "stopped": one.stopped,
        }
        for one in shown
    ]
    write_lines(path, [*earlier, *answers])


def print_answers(
    step: int, figures: Mapping[str, float], shown: Sequence[Prediction], of: str, seconds: float
) -> None:
    """Print a step's answers beside the reference, and what they and all others are worth."""
    rows = [(one.question.image.name, one.question.text, one.question.reference, one.text) for one in shown]
    print_table(f"Answers after step {step}", ("image", "question", "reference", "answer"), rows)
    words = [f"validation loss {figures[LOSS]:.4f}"]
    for name in ("character_error_rate", "text_found", "chrf"):
        if (value := figures.get(name_figure(name))) is not None:
            measure = describe_measure(name)
            words.append(f"{measure.title} {value:.1%}" if measure.is_share else f"{measure.title} {value:.1f}")
    print(f"{', '.join(words)}; {of}, {seconds:.1f} s", flush=True)
