"""Ask a model the questions of an annotation file and score its answers.

    python evaluate.py --model output/merged --annotations data/unseen/annotations.json --image_folder data/unseen \
        --output_dir output/scores

writes every answer to predictions.jsonl and the scores to metrics.json. The same command goes on where an interrupted
one stood, and shows the scores of a finished one. With `--compare_with` the scores of other evaluations stand beside
them in the table. `--answer_with` asks others than our models: the original LLaVA, a server, a text recogniser.
"""

from collections.abc import Sequence
from pathlib import Path

from meme_llava.answer_scores import Score, describe_measure, list_measures, score_answers, to_answered_question
from meme_llava.answer_sources import AnswerSource, Ask, choose_questions, choose_source
from meme_llava.arguments import parse_arguments, to_plain
from meme_llava.checkpoint import describe_environment
from meme_llava.display import print_table, show_count
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.evaluation_arguments import EvaluateArguments
from meme_llava.evaluation_folder import EVALUATE, EvaluationFolder, open_evaluation, read_finished_evaluation
from meme_llava.generation import Question, list_record_questions
from meme_llava.given_answer import describe_answer
from meme_llava.hashing import hash_file
from meme_llava.precheck_evaluation import check_pictures

MAX_LISTED = 5


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(EvaluateArguments, argv, description=__doc__)
    questions = list_record_questions(arguments.annotations, arguments.image_folder, arguments.limit)
    questions = choose_questions(questions, arguments.annotations, arguments.answer_with)
    source = choose_source(arguments)
    record = describe_evaluation(arguments, source)
    others = [read_comparable_scores(folder, record["asked"]) for folder in arguments.compare_with]
    with open_evaluation(arguments.output_dir, record, arguments.overwrite) as folder:
        if folder.metrics is None:
            check_pictures(questions, arguments.annotations, arguments.image_folder)
            ask_remaining(source.load(), questions, folder, arguments.batch_size, arguments.image_folder.resolve())
            scores = score_answers([to_answered_question(prediction) for prediction in folder.lines])
            folder.finish(record | {"scores": {name: vars(score) for name, score in scores.items()}})
    print_scores([*others, (source.title, read_scores(folder.metrics))])
    print_problems(folder.lines)
    print(f"answers and scores: {arguments.output_dir}")


def describe_evaluation(arguments: EvaluateArguments, source: AnswerSource) -> dict:
    """The run record: under "asked" what decides about the answers, and the run record of the model."""
    asked = {
        **source.identity,
        "annotations_sha256": hash_file(arguments.annotations),
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


def ask_remaining(
    ask: Ask, questions: list[Question], folder: EvaluationFolder, batch_size: int, image_folder: Path
) -> None:
    """Ask what is not answered yet. Raises UserError for a picture that cannot be read any more."""
    done = len(folder.lines)
    if done:
        print(f"{done:,} of {len(questions):,} questions are answered already")
    with show_count("answers", len(questions) - done) as advance:
        for start in range(done, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            try:
                for question, answer in zip(batch, ask(batch), strict=True):
                    image = str(question.image.relative_to(image_folder))
                    folder.append(describe_answer(question, answer) | {"image": image})
                    advance(1)
            except ValueError as error:
                raise UserError(f"{error}; mend it and start the same command again, which goes on") from error


def read_comparable_scores(folder: Path, asked: dict) -> tuple[str, dict[str, Score]]:
    """The model and the scores of another evaluation. Raises UserError if it answered other questions."""
    metrics = read_finished_evaluation(folder)
    for name in ("annotations_sha256", "limit"):
        if metrics["asked"][name] != asked[name]:
            raise UserError(
                f"--compare_with {folder}: was asked other records than these ({name} is {metrics['asked'][name]!r} "
                f"there, {asked[name]!r} here); evaluate both models on the same --annotations and --limit"
            )
    return metrics["title"], read_scores(metrics)


def read_scores(metrics: dict) -> dict[str, Score]:
    return {name: Score(**score) for name, score in metrics["scores"].items()}


def print_scores(columns: Sequence[tuple[str, dict[str, Score]]]) -> None:
    """The scores as a table, a column for each model."""
    rows = []
    for name in list_measures([scores for _, scores in columns]):
        present = [scores.get(name) for _, scores in columns]
        # All were asked the same, but not everybody is asked all of it.
        count = max(score.count for score in present if score is not None)
        rows.append((describe_measure(name).title, *(show_score(name, score) for score in present), count))
    print_table("Answers (95 % interval)", ("score", *(model for model, _ in columns), "answers"), rows)


def show_score(name: str, score: Score | None) -> str:
    """The score and its interval, as in "7.0% (5.1–9.2)"."""
    if score is None:
        return "–"
    if describe_measure(name).is_share:
        return f"{score.value:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})"
    return f"{score.value:.1f} ({score.low:.1f}–{score.high:.1f})"


def print_problems(predictions: Sequence[dict]) -> None:
    """Say how many questions got no answer, and why some of them did not; they count as empty answers."""
    without = [prediction for prediction in predictions if prediction["problem"] is not None]
    if without:
        print(f"{len(without)} of {len(predictions)} questions were not answered, which counts as an empty answer:")
        for prediction in without[:MAX_LISTED]:
            print(f"  {prediction['image']}: {prediction['problem']}")
        if len(without) > MAX_LISTED:
            print(f"  … and {len(without) - MAX_LISTED} more, in predictions.jsonl")


if __name__ == "__main__":
    main()
