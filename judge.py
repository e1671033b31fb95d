"""Let a model that sees images judge which of two evaluations has the better answers.

    export OPENAI_API_KEY=…
    python judge.py --first output/scores --second output_b/scores --preset gpt-4o --output_dir output_b/judged

Every pair is shown twice, the second time the other way round. The rubric asks whether the text was read right, the
meaning understood and nothing invented. judgements.jsonl holds every verdict, metrics.json how often which answer was
preferred. The same command goes on where an interrupted one stood.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from meme_llava.cli import parse_arguments, to_plain
from meme_llava.dataset.images import resolve_image_path
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.evaluate.judging import CRITERIA, OUTCOMES, Pair, combine_verdicts, compare_pairs, read_verdict
from meme_llava.evaluate.results_folder import (
    JUDGE,
    PREDICTIONS,
    append_remaining,
    find_evaluation,
    open_evaluation,
    read_finished_evaluation,
    read_predictions,
)
from meme_llava.evaluate.settings import JudgeArguments
from meme_llava.inference.endpoints import Endpoint, find_endpoint
from meme_llava.inference.questions import Prediction, Question
from meme_llava.storage.files import hash_file
from meme_llava.storage.run_record import describe_environment
from meme_llava.terminal import print_table


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(JudgeArguments, argv, description=__doc__)
    endpoint = find_endpoint(arguments)
    folders = [find_evaluation(folder) for folder in (arguments.first, arguments.second)]
    first, second = (read_finished_evaluation(folder) for folder in folders)
    pairs = list_pairs(folders, arguments.task, arguments.limit)
    record = describe_judging(arguments, endpoint, folders, [first["title"], second["title"]])
    with open_evaluation(arguments.output_dir, record, arguments.overwrite) as folder:
        if folder.metrics is None:
            image_folder = Path(first["image_folder"])
            check_images_are_there(pairs, image_folder)
            append_remaining(
                folder,
                pairs,
                "pairs",
                arguments.batch_size,
                lambda batch: judge_pairs(endpoint, batch, image_folder, arguments),
            )
            folder.finish(record | {"scores": sum_up(folder.lines)})
    print_comparison(folder.metrics, folder.lines)
    print(f"verdicts: {arguments.output_dir}")


def list_pairs(folders: list[Path], task: str | None, limit: int | None) -> list[Pair]:
    """The pairs of answers to the same questions. Raises UserError if there is none."""
    first, second = (read_predictions(folder) for folder in folders)
    common = [key for key in first if key in second and task in (None, first[key]["task"])][:limit]
    if not common:
        asked = "" if task is None else f" of task {task!r}"
        raise UserError(
            f"{folders[0]} and {folders[1]} have no question{asked} in common; evaluate both models on the "
            "same --annotations"
        )
    only = len(first.keys() ^ second.keys())
    print(f"{len(common):,} pairs{f'; {only:,} questions were asked of one of the two alone' if only else ''}")
    return [
        Pair(image, question, reference or "", first[key]["text"], first[key]["answer"], second[key]["answer"])
        for key in common
        for image, question, reference, _ in [key]
    ]


def check_images_are_there(pairs: list[Pair], image_folder: Path) -> None:
    """Raise UserError where images that were evaluated are gone, before a verdict is paid for."""
    images = dict.fromkeys(pair.image for pair in pairs)
    gone = [image for image in images if not (image_folder / image).is_file()]
    if gone:
        raise UserError(
            f"{image_folder}: {len(gone)} of the images that were evaluated are not there, e.g. {gone[0]}; bring "
            "them back, or evaluate both models anew where the images are now"
        )


def describe_judging(arguments: JudgeArguments, endpoint: Endpoint, folders: list[Path], titles: list[str]) -> dict:
    """The run record: under "asked" what decides about the verdicts."""
    return {
        "stage": JUDGE,
        "titles": titles,
        "asked": {
            "endpoint": endpoint.host,
            "model": endpoint.model,
            "first_sha256": hash_file(folders[0] / PREDICTIONS),
            "second_sha256": hash_file(folders[1] / PREDICTIONS),
            **{name: getattr(arguments, name) for name in ("task", "limit", "max_new_tokens", "temperature")},
        },
        "settings": to_plain(arguments),
        "environment": describe_environment(),
    }


def judge_pairs(endpoint: Endpoint, pairs: list[Pair], image_folder: Path, arguments: JudgeArguments) -> Iterator[dict]:
    """The lines of judgements.jsonl: every pair with its verdict in both orders and what they agree on.

    A verdict is None, with the problem, where there is none.
    """
    # openai is installed by those who ask servers.
    from meme_llava.inference.asking import ask_in_order

    questions = [
        Question(resolve_image_path(pair.image, image_folder), pair.write_prompt(swapped))
        for pair in pairs
        if not pair.is_same
        for swapped in (False, True)
    ]
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "timeout", "temperature")}
    replies = ask_in_order(endpoint, questions, check=find_problem, **options)
    for pair in pairs:
        in_order = swapped = problem = None
        if pair.is_same:
            combined = dict.fromkeys(CRITERIA, "tie")
        else:
            one, other = next(replies), next(replies)
            in_order, swapped = read_verdict(one.text, False), read_verdict(other.text, True)
            problem = one.problem or other.problem
            combined = combine_verdicts(in_order, swapped) if problem is None else None
        yield asdict(pair) | {"verdict": combined, "in_order": in_order, "swapped": swapped, "problem": problem}


def find_problem(reply: Prediction) -> str | None:
    """Why a judge is asked once more."""
    return f"no verdict in: {reply.text[:200]}" if read_verdict(reply.text, False) is None else None


def sum_up(judgements: list[dict]) -> dict[str, dict]:
    """By criterion how often which answer won. Raises UserError if the judge gave no verdict on what it was asked."""
    judged = [judgement for judgement in judgements if judgement["verdict"] is not None]
    without = [judgement for judgement in judgements if judgement["verdict"] is None]
    # Equal answers are ties without a judge.
    if without and not any(judgement["in_order"] for judgement in judged):
        raise UserError(
            f"the judge gave no verdict on any pair it was asked about, at first: {without[0]['problem']} "
            "(to ask again: --overwrite, perhaps with another --model or a larger --max_new_tokens)"
        )
    return compare_pairs([judgement["image"] for judgement in judged], [judgement["verdict"] for judgement in judged])


def print_comparison(metrics: dict, judgements: list[dict]) -> None:
    """How often which answer won, as a table."""
    first, second = metrics["titles"]
    without = [judgement for judgement in judgements if judgement["verdict"] is None]
    rows = []
    for criterion, shares in metrics["scores"].items():
        preferred = shares["second_preferred"]
        rows.append(
            (
                f"{CRITERIA[criterion]} {criterion}",
                *(f"{shares[name]:.1%}" for name in OUTCOMES),
                f"{preferred['value']:.1%}\n{100 * preferred['low']:.1f}–{100 * preferred['high']:.1f}",
                len(judgements) - len(without),
            )
        )
    columns = ("criterion", "first", "tie", "second", "order decided", "second preferred", "pairs")
    print_table(f"Verdicts of {metrics['asked']['model']} (95 % interval)", columns, rows)
    print(f"first: {first}\nsecond: {second}")
    if without:
        print(f"{len(without)} of {len(judgements)} pairs have no verdict, e.g. {without[0]['problem']}")


if __name__ == "__main__":
    main()
