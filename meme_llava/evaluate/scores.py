"""Scores of answers about images, with intervals. Nothing about models.

Words are compared after NFKC and in lower case, letters and digits only: punctuation, spaces and line breaks do not
count. Captions are compared as they are, Chinese by characters.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Indel, Levenshtein

from meme_llava.dataset.conversation import HALF_CHARACTER
from meme_llava.dataset.inspection import find_loop, normalise_text
from meme_llava.inference.questions import Prediction, Question

NO_TEXT = "没有文字"  # how an answer says that an image holds no words
# A reference of this many letters, other than the image's text, is a caption, which is compared by likeness.
CAPTION_CHARACTERS = 10
# A shorter piece of the text stands in a long answer by chance.
FOUND_PIECE = 3
QUOTED = re.compile('“([^”]+)”|「([^」]+)」|『([^』]+)』|"([^"]+)"')
LONGEST_SHOWN = 60  # characters of the most frequent answer
RESAMPLES = 1000
# Drawn from fewer, an interval looks more certain than it is: one answer gives 100.0–100.0.
FEWEST_ANSWERS = 5
RIGHT = "right: "  # in front of a task's name: its exact matches
FIGURE, RIGHT_FIGURE = "eval_", "eval_right/"  # the same and RIGHT in a training's log


@dataclass(frozen=True)
class Measure:
    """What a score says. `is_share`: it is shown in percent. `better`: "lower", "higher", or "" where neither is."""

    title: str
    chinese_title: str
    better: str
    is_share: bool = True


# What was read comes first: a model that repeats one sentence about every image makes fewer errors than one that
# repeats a word endlessly, and its captions are more alike.
MEASURES = {
    "text_found": Measure("text found in the answer", "回答里找得到的文字", "higher"),
    "characters_wrong": Measure("characters of the text wrong, at most all", "文字读错的字，至多全部", "lower"),
    "character_error_rate": Measure("character error rate, surplus text counted", "字错率，多出的字也算", "lower"),
    "texts_right": Measure("texts without an error", "文字全对", "higher"),
    "no_text_right": Measure("images without text, correctly reported", "没有文字的图，答对", "higher"),
    "text_invented": Measure("images without text, words invented", "没有文字的图，编造文字", "lower"),
    "text_found_in_captions": Measure("text found in captions", "描述里找得到的文字", "higher"),
    "chrf": Measure("chrF of captions", "描述的 chrF", "higher", is_share=False),
    "bleu": Measure("BLEU of captions", "描述的 BLEU", "higher", is_share=False),
    "rouge_l": Measure("ROUGE-L of captions", "描述的 ROUGE-L", "higher"),
    "stopped": Measure("answers that stop by themselves", "自己停下的回答", "higher"),
    "looping": Measure("answers in a loop", "陷入重复的回答", "lower"),
    "half_characters": Measure(f"answers with half characters ({HALF_CHARACTER})", "有半个字的回答", "lower"),
    "most_frequent": Measure("most frequent answer, its share", "最常见的回答所占比例", ""),
    "characters": Measure("characters an answer", "每个回答的字数", "", is_share=False),
    "tokens": Measure("tokens an answer", "每个回答的 token 数", "", is_share=False),
}


def describe_measure(name: str) -> Measure:
    """What the score of this name says."""
    if name.startswith(RIGHT):
        task = name.removeprefix(RIGHT)
        return Measure(f"exact match: {task or 'all'}", f"一字不差：{task or '全部'}", "higher")
    # One of a later version stands under its name.
    return MEASURES.get(name) or Measure(name, name, "", is_share=False)


def name_figure(name: str) -> str:
    """What the score of this name is called in a training's log."""
    if name.startswith(RIGHT):
        return f"{RIGHT_FIGURE}{name.removeprefix(RIGHT) or 'all'}"
    return f"{FIGURE}{name}"


def describe_figure(figure: str) -> Measure | None:
    """What a figure of a training's log says, or None if it is not a score."""
    if figure.startswith(RIGHT_FIGURE):
        return describe_measure(RIGHT + figure.removeprefix(RIGHT_FIGURE))
    return MEASURES.get(figure.removeprefix(FIGURE)) if figure.startswith(FIGURE) else None


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval, and of how many answers it speaks.

    Shares are from 0 to 1; a character error rate is above 1 where answers are much too long. chrF and BLEU go from 0
    to 100.
    """

    value: float
    low: float
    high: float
    count: int


def read_scores(metrics: dict) -> dict[str, Score]:
    """The scores of an evaluation's metrics, by name."""
    return {name: Score(**score) for name, score in metrics["scores"].items()}


def show_score(score: Score, is_share: bool = True) -> tuple[str, str]:
    """The score and its interval, as "7.0%" and "5.1–9.2"; "" for the interval of too few answers to draw from."""
    factor, sign = (100, "%") if is_share else (1, "")
    value, low, high = (f"{factor * number:.1f}" for number in (score.value, score.low, score.high))
    return f"{value}{sign}", f"{low}–{high}" if score.count >= FEWEST_ANSWERS else ""


def show_counts(scores: Sequence[Score | None]) -> str:
    """Of how many answers these scores speak, as "400", or "200–400": not everybody is asked everything."""
    counts = sorted({score.count for score in scores if score is not None})
    return "–".join(f"{count:,}" for count in (counts if len(counts) == 1 else (counts[0], counts[-1])))


def score_predictions(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """All scores for which there is an answer, by name, in the order of MEASURES and then of the tasks.

    Intervals say how much a score would change with other images: RESAMPLES times as many images are drawn with
    replacement, with all their answers, and the middle 95 % of what comes out are told (percentile bootstrap).
    """
    return {name: counted.estimate() for name, counted in _count(predictions).items()}


def compute_scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The values of `score_predictions`, without their intervals, which take longer."""
    return {name: counted.value for name, counted in _count(predictions).items()}


def list_measures(columns: Sequence[Mapping]) -> list[str]:
    """Every name that one of the columns has, in the order of MEASURES and then of the tasks."""
    names = {name for scores in columns for name in scores}
    return [name for name in MEASURES if name in names] + sorted(names - MEASURES.keys())


def asks_for_text(question: Question) -> bool:
    """Whether the reference answer is the image's text and nothing else, or says that there is none."""
    if question.text_in_image is None:
        return False
    reference, text = normalise_text(question.reference), normalise_text(question.text_in_image)
    # A caption may end so, too.
    return reference == text if text else reference.endswith(NO_TEXT) and len(reference) < CAPTION_CHARACTERS


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, but for what is not compared."""
    if not normalise_text(reference):
        return answer.strip() == reference.strip()  # nothing but signs
    return normalise_text(answer) == normalise_text(reference)


def describe_most_frequent(predictions: Sequence[Prediction]) -> str:
    """The answer that is given most often, with its share and that of the reference answers which are the same."""
    said, count = _find_most_frequent(predictions)
    deserved = sum(is_right(said, prediction.question.reference) for prediction in predictions)
    shown = said if len(said) <= LONGEST_SHOWN else said[:LONGEST_SHOWN] + "…"
    shares = (f"{times / len(predictions):.1%}" for times in (count, deserved))
    return "“{}”, {} of the answers, {} of the references".format(" ".join(shown.split()), *shares)


def _find_most_frequent(predictions: Sequence[Prediction]) -> tuple[str, int]:
    return Counter(prediction.text for prediction in predictions).most_common(1)[0]


def _measure(prediction: Prediction, most_frequent: str) -> Iterator[tuple[str, float, float]]:
    """What one answer adds to scores: the name, points, and of how many; a score is the sum of points by that of all.

    Which scores depends on what the reference is: the text itself, that there is none, a caption, or a word.
    """
    question = prediction.question
    answer, reference = normalise_text(prediction.text), normalise_text(question.reference)
    text = normalise_text(question.text_in_image or "")
    if _is_caption(question):
        # ROUGE-L's F1 is twice the longest common subsequence over both lengths, which is what this counts.
        yield "rouge_l", Indel.normalized_similarity(answer, reference), 1
        if text:
            yield "text_found_in_captions", _count_found(text, answer), len(text)
    else:
        yield f"{RIGHT}{question.task}", is_right(prediction.text, question.reference), 1
        if asks_for_text(question) and text:
            errors = Levenshtein.distance(answer, reference)
            yield "text_found", _count_found(text, answer), len(text)
            yield "characters_wrong", min(errors, len(reference)), len(reference)
            yield "character_error_rate", errors, len(reference)
            yield "texts_right", answer == reference, 1
        elif asks_for_text(question):
            yield "no_text_right", NO_TEXT in answer, 1
    if question.text_in_image == "":
        yield "text_invented", _invents_text(prediction), 1
    yield "looping", find_loop(prediction.text) is not None, 1
    # At the end of an answer that the limit of tokens cut, the other half was to come.
    meant = prediction.text.rstrip(HALF_CHARACTER) if prediction.stopped is False else prediction.text
    yield "half_characters", HALF_CHARACTER in meant, 1
    yield "most_frequent", prediction.text == most_frequent, 1
    yield "characters", len(prediction.text), 1
    if prediction.tokens is not None:
        yield "tokens", prediction.tokens, 1
    if prediction.stopped is not None:
        yield "stopped", prediction.stopped, 1


def _is_caption(question: Question) -> bool:
    reference, text = normalise_text(question.reference), normalise_text(question.text_in_image or "")
    return len(reference) >= CAPTION_CHARACTERS and reference != text


def _invents_text(prediction: Prediction) -> bool:
    """Whether an answer about an image without text names some: asked for it, by any words; else by a quotation that
    the reference does not have, as in 配文“…”. What says that there is none may quote, such as the image's kind."""
    answer = normalise_text(prediction.text)
    if NO_TEXT in answer:
        return False
    if asks_for_text(prediction.question):
        return bool(answer)
    reference = normalise_text(prediction.question.reference)
    return any(normalise_text("".join(quoted)) not in reference for quoted in QUOTED.findall(prediction.text))


def _count_found(text: str, answer: str) -> int:
    """How many characters of a normalised text stand in the answer within a piece of FOUND_PIECE of its characters.

    Lines may be quoted one by one and with words between, so the pieces may stand anywhere.
    """
    length = min(FOUND_PIECE, len(text))
    starts = [start for start in range(len(text) - length + 1) if text[start : start + length] in answer]
    return len({place for start in starts for place in range(start, start + length)})


def _count(predictions: Sequence[Prediction]) -> dict[str, "_Counted"]:
    """What all answers add to every score."""
    parts: dict[str, list[tuple]] = {}
    most_frequent, _ = _find_most_frequent(predictions)
    for prediction in predictions:
        for name, *part in _measure(prediction, most_frequent):
            parts.setdefault(name, []).append((prediction.question.image, *part))
    counted = {}
    for name, of_score in parts.items():
        images, *counts = zip(*of_score, strict=True)
        counted[name] = _Counted(images, np.array(counts, dtype=float).T)  # (answers, points and of)
    counted |= _compare_captions(predictions)
    return {name: counted[name] for name in list_measures([counted])}


def _compare_captions(predictions: Sequence[Prediction]) -> dict[str, "_Counted"]:
    captions = [prediction for prediction in predictions if _is_caption(prediction.question)]
    if not captions:
        return {}
    # Takes a moment to load, and only captions need it.
    from sacrebleu.metrics import BLEU, CHRF

    answers = [prediction.text for prediction in captions]
    references = [[prediction.question.reference for prediction in captions]]
    counted = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU(tokenize="zh"))):
        # sacrebleu's own bootstrap draws answers, not images, and fails where a drawn BLEU is zero.
        counts = np.array(metric._extract_corpus_statistics(answers, references))  # (captions, n-gram counts)

        def compute(sums, metric=metric):
            return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])

        counted[name] = _Counted([prediction.question.image for prediction in captions], counts, compute)
    return counted


def estimate_mean(images: Sequence, values: Sequence[float]) -> Score:
    """The mean of a value of every answer, with its interval as by `score_predictions`."""
    return _Counted(images, np.array([(value, 1) for value in values], dtype=float)).estimate()


@dataclass(frozen=True)
class _Counted:
    """What answers add to a score.

    Args:
        images: of every answer.
        counts: what every answer adds, (answers, counts).
        compute: rows of summed counts, (rows, counts), to their scores, (rows,); by default points by of how many.
    """

    images: Sequence
    counts: np.ndarray
    compute: Callable[[np.ndarray], np.ndarray] = lambda sums: sums[:, 0] / sums[:, 1]

    @property
    def value(self) -> float:
        """The score of all answers."""
        (value,) = self.compute(self.counts.sum(axis=0, keepdims=True))
        return float(value)

    def estimate(self) -> Score:
        """The score with its interval, by drawing images with all their answers."""
        rows = {image: row for row, image in enumerate(dict.fromkeys(self.images))}
        sums = np.zeros((len(rows), self.counts.shape[1]), self.counts.dtype)  # (images, counts)
        np.add.at(sums, [rows[image] for image in self.images], self.counts)
        draws = np.random.default_rng(0).multinomial(
            len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES
        )  # (RESAMPLES, images): how often every image was drawn
        low, high = np.percentile(self.compute(draws @ sums), [2.5, 97.5])
        return Score(self.value, float(low), float(high), len(self.images))
