"""Answers and predictions, whoever made them."""

from dataclasses import dataclass, fields
from typing import Self

from meme_llava.inference.questions import Question


@dataclass(frozen=True)
class Exchange:
    """An earlier question about the image and what the model answered."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What was said to a question.

    Args:
        tokens: its length, or None where it is not known.
        stopped: whether it ended by itself and was not cut off at the limit, or None where that is not known.
        problem: why there is none, as "refused: …"; the text then is what came in its place, or empty.
        token_ids: of a model that runs here.
    """

    text: str
    tokens: int | None = None
    stopped: bool | None = None
    problem: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """A question with its answer and the reference, as files keep it and scores read it.

    Args:
        image: path of the file; answers about the same image are not independent.
        task: the record's own name for what is asked, such as "mood".
        text: the words in the image; None where they are not known, "" where there are none.
        tokens, stopped, problem: see `Answer`.
    """

    image: str
    task: str
    question: str
    answer: str
    reference: str | None
    text: str | None
    tokens: int | None = None
    stopped: bool | None = None
    problem: str | None = None

    @classmethod
    def of_answer(cls, question: Question, answer: Answer) -> Self:
        """The prediction that an answer is."""
        return cls(
            str(question.image),
            question.task,
            question.text,
            answer.text,
            question.reference,
            question.text_in_image,
            answer.tokens,
            answer.stopped,
            answer.problem,
        )

    @classmethod
    def of_line(cls, line: dict) -> Self:
        """A prediction as a line of predictions.jsonl holds it."""
        return cls(**{field.name: line[field.name] for field in fields(cls)})
