"""Let a model that sees images judge which of two evaluations has the better answers.

    export OPENAI_API_KEY=…
    python judge.py --first output/scores --second output_b/scores --preset gpt-4o --output_dir output_b/judged

Every pair is shown twice, the second time the other way round. The rubric asks whether the text was read right, the
meaning understood and nothing invented. judgements.jsonl holds every verdict, metrics.json how often which answer was
preferred. The same command goes on where an interrupted one stood.
"""

from collections.abc import Iterator
from pathlib import Path

from meme_llava.cli import parse_arguments
from meme_llava.errors import stop_on_user_error
from meme_llava.evaluate.judging import (
    Pair,
    check_images_are_there,
    describe_judging,
    judge_pairs,
    list_pairs,
    print_comparison,
    sum_up,
)
from meme_llava.evaluate.results_folder import open_evaluation, read_finished_evaluation
from meme_llava.evaluate.settings import JudgeArguments
from meme_llava.inference.endpoints import find_endpoint


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(JudgeArguments, argv, description=__doc__)
    endpoint = find_endpoint(arguments)
    evaluations = [read_finished_evaluation(folder) for folder in (arguments.first, arguments.second)]
    folders = [folder for folder, _ in evaluations]
    pairs = list_pairs(folders, arguments.task, arguments.limit)
    record = describe_judging(arguments, endpoint, folders, [metrics["title"] for _, metrics in evaluations])
    image_folder = Path(evaluations[0][1]["image_folder"])

    def judge(some: list[Pair]) -> Iterator[dict]:
        return judge_pairs(endpoint, some, image_folder, arguments)

    with open_evaluation(arguments.output_dir, record, arguments.overwrite) as folder:
        if folder.metrics is None:
            check_images_are_there(pairs, image_folder)
            folder.append_remaining(pairs, "pairs", arguments.batch_size, judge)
            folder.finish(record | {"scores": sum_up(folder.lines)})
    print_comparison(folder.metrics, folder.lines)
    print(f"verdicts: {arguments.output_dir}")


if __name__ == "__main__":
    main()
