"""Ask a model the questions of an annotation file and score its answers.

    python evaluate.py --model output/merged --annotations data/unseen/annotations.json --image_folder data/unseen \\
        --output_dir output/scores

writes every answer to predictions.jsonl and the scores to metrics.json. The same command goes on where an interrupted
one stood, and shows the scores of a finished one. With `--compare_with` the scores of other evaluations stand beside
them in the table. `--answer_with` asks others than our models: the original LLaVA, a server, a text recogniser.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from meme_llava.cli import parse_arguments, to_plain
from meme_llava.errors import UserError, count, join_first, printable, stop_on_user_error
from meme_llava.evaluate.answer_sources import AnswerSource, choose_questions, choose_source
from meme_llava.evaluate.results_folder import (
    EVALUATE,
    check_same_questions,
    open_evaluation,
    read_finished_evaluation,
    read_predictions,
)
from meme_llava.evaluate.scores import (
    Score,
    describe_measure,
    describe_most_frequent,
    list_measures,
    read_scores,
    score_predictions,
    show_counts,
    show_score,
)
from meme_llava.evaluate.settings import EvaluateArguments
from meme_llava.inference.questions import Prediction, Question, check_images, list_record_questions
from meme_llava.storage.files import hash_file, hash_files
from meme_llava.storage.run_record import describe_environment
from meme_llava.terminal import print_table

MAX_LISTED = 5


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(EvaluateArguments, argv, description=__doc__)
    questions = list_record_questions(arguments.annotations, arguments.image_folder, arguments.limit)
    questions = choose_questions(questions, arguments.annotations, arguments.answer_with)
    source = choose_source(arguments)
    check_images(questions, arguments.annotations, arguments.image_folder)
    record = describe_evaluation(arguments, source, questions)
    others = {str(folder): read_comparable_scores(folder, record["asked"]) for folder in arguments.compare_with}
    with open_evaluation(arguments.output_dir, record, arguments.overwrite) as folder:
        if folder.metrics is None:
            ask, root = source.load(), arguments.image_folder.resolve()

            def answer(some: list[Question]) -> Iterator[dict]:
                return (prediction.to_line(root) for prediction in ask(some))

            folder.append_remaining(questions, "questions", arguments.batch_size, answer)
        predictions = list(read_predictions(arguments.output_dir).values())
        if folder.metrics is None:
            check_something_was_answered(predictions)
            scores = score_predictions(predictions)
            folder.finish(record | {"scores": {name: vars(score) for name, score in scores.items()}})
    head = str(arguments.output_dir) if others else source.title
    print_scores([*others.items(), (head, read_scores(folder.metrics))])
    print(f"most frequent answer: {printable(describe_most_frequent(predictions))}")
    print_problems(predictions)
    print(f"answers and scores: {arguments.output_dir}")


def describe_evaluation(arguments: EvaluateArguments, source: AnswerSource, questions: Sequence[Question]) -> dict:
    """The run record: under "asked" what decides about the answers, and the run record of the model."""
    asked = {
        **source.identity,
        "annotations_sha256": hash_file(arguments.annotations),
        # Two folders may have images of the same names.
        "images_sha256": hash_files(question.image for question in questions),
        **{name: getattr(arguments, name) for name in ("answer_with", "limit", "max_new_tokens", "dtype")},
    }
    return {
        "stage": EVALUATE,
        "title": source.title,
        "asked": asked,
        "settings": to_plain(arguments),
        "image_folder": str(arguments.image_folder.resolve()),
        "model": source.run_record,
        "environment": describe_environment(),
    }


def check_something_was_answered(predictions: Sequence[Prediction]) -> None:
    """Raise UserError where there is nothing to score."""
    if all(prediction.problem is not None for prediction in predictions):
        raise UserError(
            f"no question was answered, at first: {predictions[0].problem}. Fix the cause, then start the same "
            "command with --overwrite."
        )


def read_comparable_scores(folder: Path, asked: dict) -> dict[str, Score]:
    """The scores of another evaluation. Raises UserError if it answered other questions."""
    _, metrics = read_finished_evaluation(folder)
    check_same_questions(f"--compare_with {folder}", metrics["asked"], "these", asked)
    return read_scores(metrics)


def print_scores(columns: Sequence[tuple[str, dict[str, Score]]]) -> None:
    """The scores with their intervals as a table, a column for each evaluation."""
    rows = []
    for name in list_measures([scores for _, scores in columns]):
        measure, present = describe_measure(name), [scores.get(name) for _, scores in columns]
        shown = [("–", "") if score is None else show_score(score, measure.is_share) for score in present]
        # On one line, as "7.0% (5.1–9.2)", where nothing stands beside it.
        form = "{} ({})" if len(columns) == 1 else "{}\n{}"
        cells = [form.format(value, interval) if interval else value for value, interval in shown]
        rows.append((measure.title, *cells, show_counts(present)))
    print_table("Answers (95 % interval)", ("score", *(head for head, _ in columns), "answers"), rows)


def print_problems(predictions: Sequence[Prediction]) -> None:
    """Say how many questions got no answer, and why some of them did not; they count as empty answers."""
    without = [prediction for prediction in predictions if prediction.problem is not None]
    if without:
        print(f"{len(without)} of {count(len(predictions), 'question')} not answered, which counts as an empty answer:")
        lines = (printable(f"  {one.question.image}: {one.problem}") for one in without[:MAX_LISTED])
        print(join_first(lines, len(without)))


if __name__ == "__main__":
    main()
