"""Who can answer the questions of an evaluation: our models, any of transformers, a server, a text recogniser."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from meme_llava.dataset.images import ImagePolicy, open_image
from meme_llava.errors import UserError
from meme_llava.evaluate.scores import asks_for_text
from meme_llava.evaluate.settings import EvaluateArguments
from meme_llava.inference.endpoints import check_client, find_endpoint
from meme_llava.inference.ocr import TextReader, check_text_reader
from meme_llava.inference.questions import Prediction, Question
from meme_llava.storage.folders import resolve_model_folder
from meme_llava.storage.run_record import RUN_RECORD, read_run_record

# Answers to some questions, in their order, as they come. Raises ValueError for an image that cannot be read.
Ask = Callable[[list[Question]], Iterator[Prediction]]


@dataclass(frozen=True)
class AnswerSource:
    """Who answers.

    Args:
        title: heads its column in tables.
        identity: differs when the answers may.
        run_record: of our models, None for others.
        load: makes it ready to be asked; large models take their time and memory only then.
    """

    title: str
    identity: dict[str, str]
    run_record: dict | None
    load: Callable[[], Ask]


def choose_source(arguments: EvaluateArguments) -> AnswerSource:
    """Who is asked by these settings.

    Raises:
        UserError: there is no such model, endpoint or key, or a package is missing.
    """
    if arguments.answer_with == "rapidocr":
        version = check_text_reader()
        return AnswerSource(f"RapidOCR {version}", {"rapidocr": version}, None, _load_text_reader)
    if arguments.answer_with == "endpoint":
        check_client()
        # openai is installed by those who ask servers.
        from meme_llava.inference.endpoint_answers import ask_endpoint

        endpoint = find_endpoint(
            arguments.preset, arguments.base_url, arguments.model, arguments.key_variable, os.environ
        )

        def ask(questions: list[Question]) -> Iterator[Prediction]:
            return ask_endpoint(endpoint, questions, arguments.max_new_tokens, arguments.timeout)

        identity = {"endpoint": endpoint.host, "model": endpoint.model}
        return AnswerSource(f"{endpoint.model} at {endpoint.host}", identity, None, lambda: ask)
    # Not on top, since torch takes seconds to load and a wrong flag is answered before.
    from meme_llava.storage.fingerprint import fingerprint_folder, identify_weights

    if arguments.answer_with == "transformers":
        folder = resolve_model_folder(arguments.model)
        identity = {"weights": fingerprint_folder(folder)}
        return AnswerSource(arguments.model, identity, None, lambda: _load_transformers_model(folder, arguments))
    folder = Path(arguments.model)
    check_model_folder(folder)
    record = read_run_record(folder) if (folder / RUN_RECORD).is_file() else None
    identity = {"weights": identify_weights(folder)}
    return AnswerSource(arguments.model, identity, record, lambda: _load_our_model(folder, arguments))


def check_model_folder(folder: Path) -> None:
    """Raise UserError where there is no folder, or one with models in it in place of one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file() and (folder / "merged").is_dir():
        raise UserError(f"{folder}: holds several models; did you mean {folder / 'merged'}?")


def choose_questions(questions: list[Question], annotations: Path, answer_with: str) -> list[Question]:
    """Those that make sense to ask: a text recogniser knows the words of an image and nothing else.

    Raises:
        UserError: there is none.
    """
    if answer_with != "rapidocr":
        return questions
    about_text = [question for question in questions if asks_for_text(question.reference, question.text_in_image)]
    if not about_text:
        raise UserError(
            f'{annotations}: no record asks for the text of its image and has it as "text"; --answer_with rapidocr '
            "can answer nothing else"
        )
    print(f"RapidOCR is asked the {len(about_text):,} of {len(questions):,} questions whose answer is the text")
    return about_text


def _load_our_model(folder: Path, arguments: EvaluateArguments) -> Ask:
    from meme_llava.inference.generation import load_answerer

    answerer = load_answerer(folder, arguments.base_model, arguments.device, arguments.dtype)
    policy = answerer.processing.image_policy

    def ask(questions: list[Question]) -> Iterator[Prediction]:
        images = _open_images(questions, policy)
        return iter(answerer.answer_together(images, questions, arguments.max_new_tokens))

    return ask


def _load_transformers_model(folder: Path, arguments: EvaluateArguments) -> Ask:
    from meme_llava.inference.transformers_model import load_transformers_model

    model = load_transformers_model(folder, arguments.device, arguments.dtype)

    def ask(questions: list[Question]) -> Iterator[Prediction]:
        images = _open_images(questions)
        return iter(model.answer_together(images, questions, arguments.max_new_tokens))

    return ask


def _open_images(questions: list[Question], policy: ImagePolicy | None = None) -> list[Image.Image]:
    """The image of each question; files often ask several things about one."""
    images = {path: open_image(path, policy) for path in dict.fromkeys(question.image for question in questions)}
    return [images[question.image] for question in questions]


def _load_text_reader() -> Ask:
    reader = TextReader()
    return lambda questions: (Prediction(question, reader.read(open_image(question.image))) for question in questions)
