"""What would stop train.py and evaluate.py, found without a model; run.sh asks before it builds one.

python -m meme_llava.pipeline.precheck [EVAL_ANNOTATIONS EVAL_IMAGE_FOLDER] [FLAGS OF train.py]
"""

import sys
from itertools import takewhile
from pathlib import Path

from meme_llava.dataset.check import check_records, print_findings
from meme_llava.errors import stop_on_user_error
from meme_llava.inference.questions import check_images, list_record_questions


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check settings, annotations and all images."""
    words = sys.argv[1:] if argv is None else argv
    evaluation = list(takewhile(lambda word: not word.startswith("--"), words))
    if flags := words[len(evaluation) :]:
        check_training(flags)
    if evaluation:
        check_evaluation(*map(Path, evaluation))


def check_training(flags: list[str]) -> None:
    """Raise UserError for what would stop train.py with these flags before it loads a model."""
    # An evaluation alone needs no torch.
    from meme_llava.train.session import check_device
    from meme_llava.train.settings import parse_train_arguments
    from meme_llava.train.trackers import check_trackers

    arguments = parse_train_arguments(flags, description="", prog="train.py")
    check_device(arguments)
    check_trackers(arguments.report_to)
    checked = check_records(arguments.annotations, arguments.image_folder, arguments)
    if arguments.eval_every is not None:
        from meme_llava.train.evaluation import check_validation  # loads transformers

        check_validation(arguments)
    print_findings(checked)
    print(f"settings are sound, {len(checked.usable)} records can be trained on as far as seen without a model")


def check_evaluation(annotations: Path, image_folder: Path) -> None:
    """Raise UserError where records or images cannot be asked about."""
    questions = list_record_questions(annotations, image_folder, limit=None)
    check_images(questions, annotations, image_folder)
    print(f"{len(questions)} questions can be asked for the evaluation")


if __name__ == "__main__":
    main()
