"""What would stop train.py and evaluate.py, found without a model; run.sh asks before it builds one.

python -m meme_llava.pipeline.precheck [EVAL_ANNOTATIONS EVAL_IMAGE_FOLDER] [FLAGS OF train.py]
"""

import sys
from itertools import takewhile
from pathlib import Path

from meme_llava.dataset.check import CheckedData, check_records, print_findings
from meme_llava.errors import UserError, count, stop_on_user_error
from meme_llava.inference.questions import check_images, list_record_questions, warn_of_trained
from meme_llava.storage.files import hash_file


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check settings, annotations and all images."""
    words = sys.argv[1:] if argv is None else argv
    evaluation = list(takewhile(lambda word: not word.startswith("--"), words))
    flags = words[len(evaluation) :]
    training, validation = check_training(flags) if flags else (None, None)
    if evaluation:
        check_evaluation(*map(Path, evaluation), training, validation)


def check_training(flags: list[str]) -> tuple[CheckedData, Path | None]:
    """The records of a training, and the file of which it evaluates all records while it trains, if it does. Raises
    UserError for what would stop train.py before it loads a model."""
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
    usable = count(len(checked.usable), "record")
    print(f"settings are sound, {usable} can be trained on as far as seen without a model")
    return checked, arguments.eval_annotations if arguments.eval_limit is None else None


def check_evaluation(
    annotations: Path, image_folder: Path, training: CheckedData | None, validation: Path | None = None
) -> None:
    """Raise UserError where records or images cannot be asked about, or are those of the training; warn of some, unless
    they are those of `validation`: train.py warns of these."""
    if training and hash_file(annotations) == hash_file(training.annotations):
        raise UserError(
            f"EVAL_ANNOTATIONS={annotations} holds what {training.annotations} holds; give memes that are not trained "
            "on, or EVAL_ANNOTATIONS=none"
        )
    questions = list_record_questions(annotations, image_folder, limit=None)
    facts = check_images(questions, annotations, image_folder)
    print(f"{count(len(questions), 'question')} can be asked for the evaluation")
    if training and (validation is None or hash_file(validation) != hash_file(annotations)):
        warn_of_trained(annotations, questions, facts, training)


if __name__ == "__main__":
    main()
