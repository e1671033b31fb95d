"""Ask a model about memes.

python infer.py --model output/merged --image meme.jpg
python infer.py --model output/train --image folder_of_memes --question 图里写了什么？ --json
python infer.py --model output/merged --annotations data/annotations.json --image_folder data
"""

import json
import re
import sys

from meme_llava.cli import parse_arguments
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError, count, printable, stop_on_user_error
from meme_llava.evaluate.scores import is_right
from meme_llava.inference.questions import Prediction, Question, list_file_questions, list_record_questions
from meme_llava.inference.settings import InferArguments

MAX_LISTED_WRONG = 10


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(InferArguments, argv, description=__doc__)
    has_records = arguments.annotations is not None
    if has_records:
        questions = list_record_questions(
            arguments.annotations, arguments.image_folder, arguments.limit, arguments.quarantine
        )
    else:
        questions = list_file_questions(arguments.image, arguments.question)
    # Torch takes seconds to load; what is wrong with the flags is said before.
    from meme_llava.inference.generation import PrintableStreamer, load_answerer

    answerer = load_answerer(arguments.model, arguments.base_model, arguments.device, arguments.dtype)
    streamer = None
    if not arguments.json and not has_records:
        streamer = PrintableStreamer(answerer.processing.tokenizer, skip_prompt=True, skip_special_tokens=True)
    unreadable = 0
    wrong = []
    for question in questions:
        try:
            image = open_image(question.image, answerer.processing.image_policy)
        except ValueError as error:
            # One bad file of many must not cost the answers about the others.
            unreadable += 1
            if arguments.json:
                print_json({"image": str(question.image), "error": str(error)})
            else:
                print(printable(f"error: {error}"), file=sys.stderr, flush=True)
            continue
        if streamer is not None and len(questions) > 1:
            print(printable(f"{question.image}:"), flush=True)
        system = arguments.system if arguments.system is not None else question.system
        answer = answerer.answer(image, question.text, system, arguments.max_new_tokens, streamer)
        if report(question, answer, arguments):
            wrong.append(str(question.image))
    if has_records:
        right = len(questions) - len(wrong) - unreadable
        of_all = f"{right} of {count(len(questions), 'answer')}"
        print(f"as the reference, punctuation aside: {of_all}", file=sys.stderr, flush=True)
        if 0 < len(wrong) <= MAX_LISTED_WRONG:
            print(printable(f"wrong: {', '.join(wrong)}"), file=sys.stderr, flush=True)
    if unreadable:
        raise UserError(f"{unreadable} of {count(len(questions), 'image')} could not be read")


def report(question: Question, answer: Prediction, arguments: InferArguments) -> bool:
    """Print what is not streamed: a JSON line, an answer beside the reference, or that the answer was cut off. Returns
    whether there is a reference that says something else."""
    is_wrong = question.reference is not None and not is_right(answer.text, question.reference)
    if arguments.json:
        reference = {} if question.reference is None else {"reference": question.reference}
        result = {"image": str(question.image), "question": question.text, "answer": answer.text, **reference}
        print_json(result | {"tokens": answer.tokens, "stopped": answer.stopped})
    elif question.reference is not None:
        mark = "wrong" if is_wrong else "right"
        lines = f"{question.image}  [{mark}]\n  question:  {question.text}\n  answer:    {answer.text}"
        print(printable(f"{lines}\n  reference: {question.reference}"), flush=True)
    elif not answer.stopped:
        print(f"(cut off after --max_new_tokens {arguments.max_new_tokens})", file=sys.stderr, flush=True)
    return is_wrong


def print_json(value: dict) -> None:
    """One line; with JSON's escapes for control characters, and for all others where the console's encoding lacks one,
    so that none becomes a "?"."""
    line = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    print(line, flush=True)


if __name__ == "__main__":
    main()
