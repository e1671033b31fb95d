"""Ask a model the questions of an annotation file and score its answers.

    python evaluate.py --model output/merged --annotations data/unseen/annotations.json --image_folder data/unseen \
        --output_dir output/scores

writes every answer to predictions.jsonl and the scores to metrics.json. The same command goes on where an interrupted
one stood, and shows the scores of a finished one. With `--compare_with` the scores of other evaluations stand beside
them in the table.
"""

from collections.abc import Sequence
from pathlib import Path

from meme_llava.answer_scores import AnsweredQuestion, Score, describe_measure, score_answers
from meme_llava.arguments import EvaluateArguments, parse_arguments, to_plain
from meme_llava.checkpoint import RUN_RECORD, describe_environment, identify_weights, read_run_record
from meme_llava.display import print_table, show_count
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.evaluation_folder import EvaluationFolder, open_evaluation, read_finished_evaluation
from meme_llava.generation import Answerer, Question, list_record_questions, load_answerer
from meme_llava.hashing import hash_file
from meme_llava.images import open_image
from meme_llava.precheck_evaluation import check_pictures


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(EvaluateArguments, argv, description=__doc__)
    questions = list_record_questions(arguments.annotations, arguments.image_folder, arguments.limit)
    record = describe_evaluation(arguments)
    others = [read_comparable_scores(folder, record["asked"]) for folder in arguments.compare_with]
    with open_evaluation(arguments.output_dir, record, arguments.overwrite) as folder:
        if folder.metrics is None:
            check_pictures(questions, arguments.annotations, arguments.image_folder)
            answerer = load_answerer(arguments.model, arguments.base_model, arguments.device, arguments.dtype)
            ask_remaining(answerer, questions, folder, arguments.batch_size, arguments.max_new_tokens)
            scores = score_answers([to_answered_question(prediction) for prediction in folder.predictions])
            folder.finish(record | {"scores": {name: vars(score) for name, score in scores.items()}})
    print_scores([*others, (str(arguments.model), read_scores(folder.metrics))])
    print(f"answers and scores: {arguments.output_dir}")


def describe_evaluation(arguments: EvaluateArguments) -> dict:
    """The run record: under "asked" what decides about the answers, and the run record of the model."""
    asked = {
        "weights": identify_weights(arguments.model),
        "annotations_sha256": hash_file(arguments.annotations),
        **{name: getattr(arguments, name) for name in ("limit", "max_new_tokens", "dtype")},
    }
    return {
        "stage": "evaluate",
        "asked": asked,
        "settings": to_plain(arguments),
        "model": read_run_record(arguments.model) if (arguments.model / RUN_RECORD).is_file() else None,
        "environment": describe_environment(),
    }


def ask_remaining(
    answerer: Answerer, questions: list[Question], folder: EvaluationFolder, batch_size: int, max_new_tokens: int
) -> None:
    """Ask what is not answered yet. Raises UserError for a picture that cannot be read any more."""
    done = len(folder.predictions)
    if done:
        print(f"{done:,} of {len(questions):,} questions are answered already")
    with show_count("answers", len(questions) - done) as advance:
        for start in range(done, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            try:
                images = [open_image(question.image, answerer.processing.image_policy) for question in batch]
            except ValueError as error:
                raise UserError(f"{error}; mend it and start the same command again, which goes on") from error
            answers = answerer.answer_together(images, batch, max_new_tokens)
            folder.append(
                [
                    {
                        "image": str(question.image),
                        "task": question.task,
                        "question": question.text,
                        "answer": answer.text,
                        "truth": question.truth,
                        "text": question.text_in_picture,
                        "tokens": len(answer.token_ids),
                        "stopped": answer.stopped,
                    }
                    for question, answer in zip(batch, answers, strict=True)
                ]
            )
            advance(len(batch))


def to_answered_question(prediction: dict) -> AnsweredQuestion:
    """What is scored of a line of predictions.jsonl."""
    return AnsweredQuestion(
        prediction["answer"],
        prediction["truth"],
        prediction["text"],
        prediction["task"],
        prediction["image"],
        prediction["tokens"],
        prediction["stopped"],
    )


def read_comparable_scores(folder: Path, asked: dict) -> tuple[str, dict[str, Score]]:
    """The model and the scores of another evaluation. Raises UserError if it answered other questions."""
    metrics = read_finished_evaluation(folder)
    for name in ("annotations_sha256", "limit"):
        if metrics["asked"][name] != asked[name]:
            raise UserError(
                f"--compare_with {folder}: was asked other records than these ({name} is {metrics['asked'][name]!r} "
                f"there, {asked[name]!r} here); evaluate both models on the same --annotations and --limit"
            )
    return metrics["settings"]["model"], read_scores(metrics)


def read_scores(metrics: dict) -> dict[str, Score]:
    return {name: Score(**score) for name, score in metrics["scores"].items()}


def print_scores(columns: Sequence[tuple[str, dict[str, Score]]]) -> None:
    """The scores as a table, a column for each model."""
    # All of them answered the same questions, so what one has, all have.
    rows = [
        (describe_measure(name).title, *(show_score(name, scores[name]) for _, scores in columns), score.count)
        for name, score in columns[-1][1].items()
    ]
    print_table("Answers (95 % interval)", ("score", *(model for model, _ in columns), "answers"), rows)


def show_score(name: str, score: Score) -> str:
    """The score and its interval, as in "7.0% (5.1–9.2)"."""
    if describe_measure(name).is_share:
        return f"{score.value:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})"
    return f"{score.value:.1f} ({score.low:.1f}–{score.high:.1f})"


if __name__ == "__main__":
    main()
