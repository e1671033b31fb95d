"""Knows how well answers read the words in pictures, in numbers.

Words are compared after NFKC and in lower case, letters and digits only: punctuation, spaces and line breaks do not
count. Knows nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from meme_llava.captions import normalise_text

NO_TEXT = "没有文字"  # how an answer says that a picture holds no words


@dataclass(frozen=True)
class AnsweredQuestion:
    """An answer beside the truth.

    Args:
        text_in_picture: None where it is not known, "" where there is none.
        task: the record's own name for what is asked, such as "mood".
    """

    answer: str
    truth: str
    text_in_picture: str | None
    task: str


@dataclass(frozen=True)
class ReadingScores:
    """Shares from 0 to 1 over the questions that can be judged so; None where there is none.

    Args:
        character_error_rate: wrong, missing and surplus characters of the answers that should be the picture's text,
            per true character. Above 1 where answers are much too long.
        texts_right: share of those answers without an error.
        no_text_right: share of "no text" answers about pictures without text.
        right_by_task: for every task the number of its questions and the share of answers that are right to the letter.
    """

    text_questions: int
    character_error_rate: float | None
    texts_right: float | None
    no_text_questions: int
    no_text_right: float | None
    right_by_task: dict[str, tuple[int, float]]


def score_reading(answered: Sequence[AnsweredQuestion]) -> ReadingScores:
    """Judge every answer by what its true answer is: the text itself, that there is none, or something else."""
    errors = characters = 0
    texts, no_texts, tasks = [], [], {}
    for question in answered:
        answer, truth = normalise_text(question.answer), normalise_text(question.truth)
        tasks.setdefault(question.task, []).append(answer == truth)
        if question.text_in_picture and normalise_text(question.text_in_picture) == truth:
            characters += len(truth)
            errors += Levenshtein.distance(answer, truth)
            texts.append(answer == truth)
        elif question.text_in_picture == "" and truth.endswith(NO_TEXT):
            no_texts.append(NO_TEXT in answer)
    return ReadingScores(
        text_questions=len(texts),
        character_error_rate=errors / characters if characters else None,
        texts_right=_mean(texts),
        no_text_questions=len(no_texts),
        no_text_right=_mean(no_texts),
        right_by_task={task: (len(right), _mean(right)) for task, right in sorted(tasks.items())},
    )


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
