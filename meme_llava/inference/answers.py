"""Answers, whoever gave them."""

from dataclasses import dataclass

from meme_llava.inference.questions import Question


@dataclass(frozen=True)
class Exchange:
    """An earlier question about the image and what the model answered."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What a model said. `stopped` is False when it was cut off at the limit."""

    text: str
    token_ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to a question about an image.

    Args:
        tokens: its length, or None where it is not known.
        stopped: whether it ended by itself, or None where that is not known.
        problem: why there is none, as "refused: …"; the text then is what came in its place, or empty.
    """

    text: str
    tokens: int | None = None
    stopped: bool | None = None
    problem: str | None = None

    @classmethod
    def of_model(cls, answer: Answer) -> "GivenAnswer":
        """What one of our models said."""
        return cls(answer.text, len(answer.token_ids), answer.stopped)


def describe_answer(question: Question, answer: GivenAnswer) -> dict:
    """An answer beside its question and the reference, as files keep it."""
    return {
        "image": str(question.image),
        "task": question.task,
        "question": question.text,
        "answer": answer.text,
        "reference": question.reference,
        "text": question.text_in_image,
        "tokens": answer.tokens,
        "stopped": answer.stopped,
        "problem": answer.problem,
    }
