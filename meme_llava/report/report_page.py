"""The page of a report: experiments as one self-contained HTML file and a table for spreadsheets.

What an experiment is stands in `experiment`, what all pages share in `html_page`.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence

from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

from meme_llava.dataset.images import MAX_PIXELS
from meme_llava.dataset.inspection import normalise_text
from meme_llava.evaluate.scores import (
    Measure,
    describe_figure,
    describe_measure,
    is_right,
    list_measures,
    show_counts,
    show_score,
)
from meme_llava.inference.questions import Prediction
from meme_llava.report.experiment import Experiment
from meme_llava.report.html_page import COLOURS, draw_lines, make_thumbnails, render_page
from meme_llava.storage.run_record import RATE_PREFIX

# A spreadsheet takes a cell that begins so for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
MISSING = "–"


def render_report(title: str, experiments: Sequence[Experiment], max_cards: int) -> str:
    """The page. At most `max_cards` questions are shown; those whose answers disagree come first."""
    cards = _make_cards(experiments)
    shown = sorted(cards, key=lambda card: not card["disagree"])[:max_cards]
    folder = experiments[0].image_folder
    images = list(dict.fromkeys(card["image"] for card in shown))
    thumbnails = make_thumbnails([folder / image for image in images], MAX_PIXELS)
    places = {image: place for place, image in enumerate(images)}
    return render_page(
        "report_page.html",
        title,
        names=[experiment.name for experiment in experiments],
        questions=max(len(experiment.predictions) for experiment in experiments),
        facts=list(_list_facts(experiments)),
        scores=list(_list_scores(experiments)),
        charts=list(_list_charts(experiments)),
        colours=COLOURS,
        charted=[column for column, experiment in enumerate(experiments) if experiment.log_history],
        cards=shown,
        places=places,
        total_cards=len(cards),
        tasks=Counter(card["task"] for card in shown),
        thumbnails=thumbnails,
    )


def _list_facts(experiments: Sequence[Experiment]) -> Iterator[tuple[str, list[str], bool]]:
    """Label, a value for every experiment, and whether they differ among those that have one."""
    # Not all have all; what a later one has more of stands behind what it follows there.
    labels: list[str] = []
    for experiment in experiments:
        place = 0
        for label in experiment.facts:
            if label not in labels:
                labels.insert(place, label)
            place = labels.index(label) + 1
    for label in labels:
        values = [experiment.facts.get(label, MISSING) for experiment in experiments]
        yield label, values, len(set(values) - {MISSING}) > 1


def _list_scores(experiments: Sequence[Experiment]) -> Iterator[tuple[Measure, list[dict | None], str]]:
    """What a score says, a cell for every experiment, and how many answers were counted. `low`, `high` and `middle` of
    a cell are places on the scale of the row, in per cent."""
    for name in list_measures([experiment.scores for experiment in experiments]):
        measure = describe_measure(name)
        present = [experiment.scores.get(name) for experiment in experiments]
        top = max(score.high for score in present if score is not None) or 1
        choose = {"lower": min, "higher": max}.get(measure.better)
        values = {score.value for score in present if score is not None}
        best = choose(values) if choose and len(values) > 1 else None
        cells = []
        for score in present:
            if score is None:
                cells.append(None)
                continue
            text, interval = show_score(score, measure.is_share)
            low, high, middle = (round(100 * value / top, 2) for value in (score.low, score.high, score.value))
            cell = {"text": text, "interval": interval, "is_best": score.value == best}
            cells.append(cell | {"low": low, "high": high, "middle": middle})
        yield measure, cells, show_counts(present)


def _list_charts(experiments: Sequence[Experiment]) -> Iterator[tuple[str, str, Markup]]:
    """Loss and learning rates over the steps, and what was measured on a validation file during training; each with a
    title in two languages."""
    keys = list(dict.fromkeys(key for one in experiments for entry in one.log_history for key in entry))
    figures = [
        (key, "learning rate: " + key.removeprefix(RATE_PREFIX), "学习率", 1)
        for key in keys
        if key.startswith(RATE_PREFIX)
    ]
    figures = [("loss", "training loss", "训练损失", 1), *figures, ("eval_loss", "loss, validation", "验证损失", 1)]
    for key in keys:
        if (measure := describe_figure(key)) is not None:
            unit, factor = (", %", 100) if measure.is_share else ("", 1)
            figures.append((key, f"{measure.title}, validation{unit}", f"验证：{measure.chinese_title}", factor))
    for key, title, chinese_title, factor in figures:
        lines = [
            (column, one.name, [(entry["step"], factor * entry[key]) for entry in one.log_history if key in entry])
            for column, one in enumerate(experiments)
        ]
        if key in keys:
            yield title, chinese_title, draw_lines(lines)


def _make_cards(experiments: Sequence[Experiment]) -> list[dict]:
    """A question with all its answers, in the order of the file; `right` counts the answers that are."""
    answered = [experiment.predictions for experiment in experiments]
    cards = []
    for key, first in max(answered, key=len).items():
        answers = [_mark_answer(by_question.get(key)) for by_question in answered]
        texts = {normalise_text(by_question[key].text) for by_question in answered if key in by_question}
        cards.append(
            {
                "image": str(first.question.image),
                "question": first.question.text,
                "task": first.question.task,
                "reference": first.question.reference or "",
                "answers": answers,
                "disagree": len(texts) > 1,
                "right": sum(answer["verdict"] == "right" for answer in answers),
            }
        )
    return cards


def _mark_answer(prediction: Prediction | None) -> dict:
    """What an experiment said: "right", "wrong" or "none", in pieces that say where it differs from the reference."""
    if prediction is None:
        return {"verdict": "none", "pieces": [], "note": "not asked"}
    answer, reference = prediction.text, prediction.question.reference or ""
    verdict = "right" if is_right(answer, reference) else "wrong"
    note = prediction.problem or ("cut off" if prediction.stopped is False else "")
    return {"verdict": verdict, "pieces": list(split_differences(reference, answer)), "note": note}


def split_differences(reference: str, answer: str) -> Iterator[tuple[str, str]]:
    """The answer in pieces: "same" as the reference, "wrong" where it has something else, "missing" what it lacks."""
    for operation in Levenshtein.opcodes(reference, answer):
        lacks = reference[operation.src_start : operation.src_end]
        has = answer[operation.dest_start : operation.dest_end]
        if operation.tag == "equal":
            yield has, "same"
            continue
        # What differs in nothing that is compared is not a mistake.
        kind = "same" if normalise_text(lacks) == normalise_text(has) else "wrong"
        if lacks and kind == "wrong" and normalise_text(lacks):
            yield lacks, "missing"
        if has:
            yield has, kind if normalise_text(has) else "same"


def render_table(experiments: Sequence[Experiment]) -> str:
    """The page's tables as CSV, an experiment per column; a score has a line for its value and one for each end of its
    95 % interval, as plain numbers."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["", *(_make_harmless(experiment.name) for experiment in experiments)])
    for label, values, _ in _list_facts(experiments):
        writer.writerow([label, *map(_make_harmless, values)])
    for name in list_measures([experiment.scores for experiment in experiments]):
        for end, suffix in (("value", ""), ("low", ", low"), ("high", ", high")):
            scores = [experiment.scores.get(name) for experiment in experiments]
            writer.writerow([f"{name}{suffix}", *("" if score is None else getattr(score, end) for score in scores)])
    return file.getvalue()


def _make_harmless(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
