"""How much faster evaluate.py answers in batches than infer.py one by one, and whether the answers are the same.

python benchmarks/evaluation.py --model output/merged
python benchmarks/evaluation.py --model output/merged --task description --annotations data/annotations.json \\
    --image_folder data

Both ways answer the same questions in turn, in one process; the fastest of the rounds counts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.dataset.images import open_image  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.inference.generation import Answerer, load_answerer  # noqa: E402
from meme_llava.inference.questions import Prediction, Question, list_record_questions  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402

Way = Callable[[Answerer, list[Question], int], list[Prediction]]


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    questions = list_record_questions(arguments.annotations, arguments.image_folder, limit=None)
    questions = [question for question in questions if arguments.task in (None, question.task)][: arguments.limit]
    if not questions:
        raise UserError(f"{arguments.annotations}: no record has the task {arguments.task!r}; leave --task out")
    answerer = load_answerer(arguments.model, None, arguments.device, arguments.dtype)
    ways: dict[str, Way] = {"one by one, as infer.py": answer_alone}
    for batch_size in arguments.batch_sizes:
        ways[f"batches of {batch_size}, as evaluate.py"] = make_batched(batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way(answerer, questions, arguments.max_new_tokens)
            seconds[name].append(time.perf_counter() - started)
    first, *_ = ways
    rows = [
        (
            name,
            f"{len(questions) / min(seconds[name]):.1f}",
            f"{min(seconds[first]) / min(seconds[name]):.2f}",
            f"{sum(one.text == other.text for one, other in zip(answers[first], answers[name], strict=True))}"
            f" of {len(questions)}",
        )
        for name in ways
    ]
    title = f"{len(questions)} questions, {arguments.rounds} rounds, {answerer.model.device}, {answerer.model.dtype}"
    print_table(title, ("way", "answers/s", "times as fast", "same answers"), rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="merged model, base model or adapter")
    parser.add_argument("--annotations", type=Path, default=ROOT / "data" / "unseen" / "annotations.json")
    parser.add_argument("--image_folder", type=Path, default=ROOT / "data" / "unseen")
    parser.add_argument("--task", help="only records of this task")
    parser.add_argument("--limit", type=int, default=128, help="only the first N of them")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(argv)


def answer_alone(answerer: Answerer, questions: list[Question], max_new_tokens: int) -> list[Prediction]:
    """Every question by itself."""
    return [
        answerer.answer(
            open_image(question.image, answerer.processing.image_policy),
            question.text,
            question.system,
            max_new_tokens,
        )
        for question in questions
    ]


def make_batched(batch_size: int) -> Way:
    """So many questions at once."""

    def answer_in_batches(answerer: Answerer, questions: list[Question], max_new_tokens: int) -> list[Prediction]:
        answers = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            answers += answerer.answer_together(batch, max_new_tokens)
        return answers

    return answer_in_batches


if __name__ == "__main__":
    main()
