"""Ask a vision model behind any OpenAI-compatible endpoint for a Chinese caption of every image in a folder.

export GEMINI_API_KEY=...
python data/describe.py --images memes --output gemini.jsonl --preset gemini --max_images 20
python data/describe.py --images memes --output mine.jsonl --preset local --model output/merged

Stopped or killed, the same command goes on where it stood. --output gets one JSON line an image: picName and
description, or picName and set_aside with the reason; `python data/prepare.py captions` reads it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments  # noqa: E402
from meme_llava.errors import UserError, count, stop_on_user_error  # noqa: E402
from meme_llava.inference.endpoints import Endpoint, find_endpoint  # noqa: E402
from meme_llava.prepare.caption_file import CaptionLedger, open_ledger  # noqa: E402
from meme_llava.prepare.describing import (  # noqa: E402
    DESCRIBED,
    NOT_ASKED,
    UNANSWERED,
    CaptionRun,
    DescribeArguments,
    choose_open_images,
    describe_purchase,
    list_images,
    print_summary,
    read_prompt,
)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DescribeArguments, argv, description=__doc__)
    endpoint = find_endpoint(arguments)
    prompt = read_prompt(arguments.prompt_file, arguments.use_file_name)
    names, others = list_images(arguments.images, arguments.max_images)
    with open_ledger(arguments.output, describe_purchase(arguments, endpoint, prompt)) as ledger:
        chosen = choose_open_images(names, arguments, ledger)
        print_plan(endpoint, names, chosen, others, ledger)
        tokens_before = ledger.tokens.total()
        run = CaptionRun(arguments, endpoint, prompt, ledger)
        try:
            run.describe(chosen)
        finally:
            statuses = print_summary(names, ledger, ledger.tokens.total() - tokens_before)
            left = f"the same command goes on with the {statuses[NOT_ASKED]:,} that are left"
            if isinstance(sys.exception(), KeyboardInterrupt):
                print(f"interrupted; {left}")
    if statuses[UNANSWERED]:
        raise UserError(f"without an answer: {statuses[UNANSWERED]:,}; start the same command again to ask once more")
    if run.stop_reason is not None:
        print(f"stopped: {run.stop_reason}; {count(statuses[NOT_ASKED], 'image')} left")
    elif not statuses[DESCRIBED]:
        raise UserError(
            f"no image has a caption; {arguments.output} says of each why. Fix the cause, then start the same command "
            "with --retry_set_aside, or one with another --model and --output"
        )
    captions = count(statuses[DESCRIBED], "caption")
    print(f"{arguments.output}: {captions}; python data/prepare.py captions turns them into records")


def print_plan(endpoint: Endpoint, names: list[str], chosen: list[str], others: str, ledger: CaptionLedger) -> None:
    """Say who is asked about how many images, and what was found in the captions file."""
    key = f"key from {endpoint.key_variable}" if endpoint.key_variable else "no key"
    print(f"asking {endpoint.model} at {endpoint.host} ({key})")
    known = len(names) - len(chosen)
    print(f"images: {len(names):,}, of which {known:,} have their line in {ledger.path}; to ask about: {len(chosen):,}")
    if again := sum(name in ledger.entries for name in chosen):
        print(f"asked about again, as changed, unanswered or told to: {again:,}; the new line counts")
    if foreign := len(ledger.entries.keys() - set(names)):
        print(f"lines about other images: {foreign:,}")
    if others:
        print(f"left out: {others}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
