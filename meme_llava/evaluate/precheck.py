"""What would stop evaluate.py, found without a model; run.sh asks before it builds one.

python -m meme_llava.evaluate.precheck --annotations memes.json --image_folder memes
"""

from dataclasses import dataclass
from pathlib import Path

from meme_llava.cli import parse_arguments, setting
from meme_llava.dataset.images import MAX_PIXELS
from meme_llava.dataset.inspection import inspect_images
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.inference.questions import Question, list_record_questions

MAX_LISTED = 10


@dataclass
class PrecheckEvaluationArguments:
    annotations: Path = setting("records with the questions and their reference answers")
    image_folder: Path = setting("where their images are")


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check annotations and all images."""
    arguments = parse_arguments(PrecheckEvaluationArguments, argv, description=__doc__, prog="precheck_evaluation")
    questions = list_record_questions(arguments.annotations, arguments.image_folder, limit=None)
    check_images(questions, arguments.annotations, arguments.image_folder)
    print(f"{len(questions)} questions can be asked for the evaluation")


def check_images(questions: list[Question], annotations: Path, image_folder: Path) -> None:
    """Decode every image. Raises UserError with those that no model can be shown."""
    found = inspect_images([question.image for question in questions], MAX_PIXELS)
    bad = [f"  {path}: {facts.fault[1]}" for path, facts in found.items() if facts.fault is not None]
    if bad:
        more = [f"  … and {len(bad) - MAX_LISTED} more"] * (len(bad) > MAX_LISTED)
        advice = f"give the right --image_folder ({image_folder}; EVAL_IMAGE_FOLDER in run.sh)."
        lines = [*bad[:MAX_LISTED], *more, f"Fix them or leave out their records, or {advice}"]
        raise UserError("\n".join([f"{annotations}: {len(bad)} of {len(found)} images cannot be read:", *lines]))


if __name__ == "__main__":
    main()
