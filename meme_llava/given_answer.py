"""Knows what is kept of an answer, whoever gave it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to a question about a picture.

    Args:
        tokens: its length, or None where it is not known.
        stopped: whether it ended by itself, or None where that is not known.
        problem: why there is none, as "refused: …"; the text then is what came in its place, or empty.
    """

    text: str
    tokens: int | None = None
    stopped: bool | None = None
    problem: str | None = None
