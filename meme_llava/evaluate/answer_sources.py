"""Who can answer the questions of an evaluation: our models, any of transformers, a server, a text recogniser."""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.evaluate.scores import NO_TEXT, asks_for_text
from meme_llava.evaluate.settings import EvaluateArguments
from meme_llava.inference.endpoints import find_endpoint
from meme_llava.inference.questions import Prediction, Question
from meme_llava.storage.folders import resolve_model_folder
from meme_llava.storage.run_record import RUN_RECORD, read_run_record

# Predictions for some questions, in their order, as they come. Raises ValueError for an image that cannot be read.
Ask = Callable[[list[Question]], Iterable[Prediction]]
NOTHING_FOUND = f"图片里{NO_TEXT}。"  # what is said where RapidOCR finds nothing, as the sample memes have it


@dataclass(frozen=True)
class AnswerSource:
    """Who answers; `title` heads its column in tables."""

    title: str
    identity: dict  # differs when the answers may
    run_record: dict | None  # of our models
    load: Callable[[], Ask]  # makes it ready to be asked; large models take their time and memory only then


def choose_source(arguments: EvaluateArguments) -> AnswerSource:
    """Who is asked by these settings. Raises UserError without such a model, endpoint, key or package."""
    if arguments.answer_with == "rapidocr":
        if missing := [name for name in ("rapidocr", "onnxruntime") if importlib.util.find_spec(name) is None]:
            requirements = "configs/requirements/other_models.txt"
            raise UserError(f"--answer_with rapidocr needs {' and '.join(missing)}: pip install -r {requirements}")
        found = version("rapidocr")
        return AnswerSource(f"RapidOCR {found}", {"rapidocr": found}, None, _load_text_reader)
    if arguments.answer_with == "endpoint":
        endpoint = find_endpoint(arguments)
        # openai is installed by those who ask servers.
        from meme_llava.inference.asking import ask_in_order

        options = {name: getattr(arguments, name) for name in ("max_new_tokens", "timeout", "temperature")}
        ask = functools.partial(ask_in_order, endpoint, **options)
        identity = {"endpoint": endpoint.host, "model": endpoint.model, "temperature": arguments.temperature}
        return AnswerSource(f"{endpoint.model} at {endpoint.host}", identity, None, lambda: ask)
    # Not on top, since torch takes seconds to load and a wrong flag is answered before.
    from meme_llava.storage.fingerprint import fingerprint_folder, identify_weights

    record = None
    if arguments.answer_with == "transformers":
        folder = resolve_model_folder(arguments.model)
        weights = fingerprint_folder(folder)
    else:
        folder = Path(arguments.model)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model folder")
        if not (folder / "config.json").is_file() and (folder / "merged").is_dir():
            raise UserError(f"{folder}: holds several models; did you mean {folder / 'merged'}?")
        record = read_run_record(folder) if (folder / RUN_RECORD).is_file() else None
        weights = identify_weights(folder)
    return AnswerSource(arguments.model, {"weights": weights}, record, lambda: _load_model(folder, arguments))


def choose_questions(questions: list[Question], annotations: Path, answer_with: str) -> list[Question]:
    """Those that make sense to ask; a text recogniser knows only the words of an image. Raises UserError for none."""
    if answer_with != "rapidocr":
        return questions
    about_text = [question for question in questions if asks_for_text(question)]
    if not about_text:
        raise UserError(
            f'{annotations}: no record asks for the text of its image and has it as "text"; --answer_with rapidocr '
            "can answer nothing else"
        )
    print(f"RapidOCR is asked the {len(about_text):,} of {len(questions):,} questions whose answer is the text")
    return about_text


def _load_model(folder: Path, arguments: EvaluateArguments) -> Ask:
    from meme_llava.inference.generation import load_answerer, load_transformers_model

    if arguments.answer_with == "transformers":
        model = load_transformers_model(folder, arguments.device, arguments.dtype)
    else:
        model = load_answerer(folder, arguments.base_model, arguments.device, arguments.dtype)
    return functools.partial(model.answer_together, max_new_tokens=arguments.max_new_tokens)


def _load_text_reader() -> Ask:
    """RapidOCR with the models that come with it, on the CPU."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(question: Question) -> Prediction:
        blue_first = np.asarray(open_image(question.image))[:, :, ::-1]  # (height, width, 3), as OpenCV has colours
        lines = engine(blue_first).txts  # from top to bottom
        return Prediction(question, "\n".join(lines) if lines else NOTHING_FOUND)

    return functools.partial(map, read)
