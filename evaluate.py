"""Ask a model the questions of an annotation file and count how well it reads.

    python evaluate.py --model output/merged --annotations data/annotations.json --image_folder data \
        --output_dir output/scores

writes every answer to predictions.jsonl and the scores to metrics.json. With `--compare_with` the scores of an earlier
evaluation stand beside them in the table.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from meme_llava.arguments import EvaluateArguments, parse_arguments, to_plain
from meme_llava.checkpoint import describe_environment, write_directory, write_json
from meme_llava.display import print_table
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.generation import Answer, Answerer, Question, list_record_questions, load_answerer
from meme_llava.hashing import hash_file
from meme_llava.images import open_image
from meme_llava.reading_scores import AnsweredQuestion, ReadingScores, score_reading

METRICS = "metrics.json"


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(EvaluateArguments, argv, description=__doc__)
    annotations_sha256 = hash_file(arguments.annotations)
    columns = []
    if arguments.compare_with:
        columns.append(read_scores(arguments.compare_with, annotations_sha256, arguments.limit))
    questions = list_record_questions(arguments.annotations, arguments.image_folder, arguments.limit)
    answerer = load_answerer(arguments.model, arguments.base_model, arguments.device, arguments.dtype)
    with write_directory(arguments.output_dir, arguments.overwrite) as folder:
        answers = ask_all(answerer, questions, arguments.batch_size, arguments.max_new_tokens)
        scores = score_reading(
            [
                AnsweredQuestion(answer.text, question.truth, question.text_in_picture, question.task)
                for question, answer in zip(questions, answers, strict=True)
            ]
        )
        write_predictions(folder / "predictions.jsonl", questions, answers)
        record = {
            "stage": "evaluate",
            "settings": to_plain(arguments),
            "annotations_sha256": annotations_sha256,
            "scores": to_plain(scores),
            "environment": describe_environment(),
        }
        write_json(folder / METRICS, record)
    print_scores([*columns, (str(arguments.model), scores)])
    print(f"answers and scores: {arguments.output_dir}")


def ask_all(answerer: Answerer, questions: list[Question], batch_size: int, max_new_tokens: int) -> list[Answer]:
    """The answers in the order of the questions. Raises UserError for a picture that cannot be read."""
    answers = []
    with tqdm(total=len(questions), unit="question", dynamic_ncols=True, disable=None) as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            try:
                images = [open_image(question.image, answerer.processing.image_policy) for question in batch]
            except ValueError as error:
                raise UserError(f"{error} (data/check.py finds all such pictures)") from error
            answers += answerer.answer_together(images, batch, max_new_tokens)
            bar.update(len(batch))
    return answers


def write_predictions(path: Path, questions: list[Question], answers: list[Answer]) -> None:
    """One JSON line a question."""
    with path.open("w", encoding="utf-8") as lines:
        for question, answer in zip(questions, answers, strict=True):
            line = {
                "image": str(question.image),
                "task": question.task,
                "question": question.text,
                "answer": answer.text,
                "truth": question.truth,
                "text": question.text_in_picture,
                "stopped": answer.stopped,
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_scores(folder: Path, annotations_sha256: str, limit: int | None) -> tuple[str, ReadingScores]:
    """The model and the scores of an earlier evaluation. Raises UserError if it answered other questions."""
    path = folder / METRICS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model, scores = record["settings"]["model"], ReadingScores(**record["scores"])
        same = (record["annotations_sha256"], record["settings"]["limit"]) == (annotations_sha256, limit)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare_with {folder}: {path} cannot be read ({error!r}), expected an output_dir of evaluate.py"
        ) from error
    if not same:
        raise UserError(
            f"--compare_with {folder}: was made from other records than these; evaluate both models on the same "
            "--annotations and --limit"
        )
    return model, scores


def print_scores(columns: list[tuple[str, ReadingScores]]) -> None:
    """The scores as a table, a column for each model; what could not be judged is left out."""
    rows = []

    def add_row(name: str, count: int, get_share: Callable[[ReadingScores], float]) -> None:
        if count:
            rows.append((name, *(f"{get_share(scores):.1%}" for _, scores in columns), count))

    # All of them answered the same questions.
    first = columns[0][1]
    add_row("character error rate of the text", first.text_questions, lambda scores: scores.character_error_rate)
    add_row("texts without an error", first.text_questions, lambda scores: scores.texts_right)
    add_row("pictures without text, told so", first.no_text_questions, lambda scores: scores.no_text_right)
    for task, (count, _) in first.right_by_task.items():
        add_row(f"right to the letter: {task or 'all'}", count, lambda scores, task=task: scores.right_by_task[task][1])
    print_table("How well the words are read", ("score", *(model for model, _ in columns), "questions"), rows)


if __name__ == "__main__":
    main()
