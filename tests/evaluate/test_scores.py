"""What an answer is compared with, and every score by hand."""

from pathlib import Path

import pytest

from meme_llava.dataset.inspection import normalise_text
from meme_llava.evaluate.scores import (
    Score,
    asks_for_text,
    compute_scores,
    describe_measure,
    describe_most_frequent,
    is_right,
    score_predictions,
    show_score,
)
from meme_llava.inference.questions import Prediction, Question


def ask(answer, reference, text=None, task="", image="a.png", tokens=None, stopped=None):
    return Prediction(Question(Path(image), "?", reference, None, text, task), answer, tokens, stopped)


def test_only_letters_and_digits_are_compared():
    assert normalise_text("ＯＫ，我 太难了！\n５2０") == "ok我太难了520"


def test_reading_by_hand():
    scores = score_predictions(
        [
            ask("我太难了！", "我太难了", "我太难了", "text"),  # right but for punctuation
            ask("好呀好呀好", "好耶", "好耶", "text"),  # one wrong, three surplus
            ask("", "收到", "收到", "text"),  # two missing
            ask("图片里没有文字。", "图片里没有文字。", "", "text"),
            ask("困", "图片里没有文字。", "", "text"),
            ask("开心", "开心", "好耶", "mood"),
            ask("难过", "开心", "", "mood"),
        ]
    )
    values = {name: (score.value, score.count) for name, score in scores.items()}
    assert values == {
        "text_found": (4 / 8, 3),  # not 好耶, of which 好 alone was answered
        "characters_wrong": (4 / 8, 3),  # of 好耶 no more than both
        "character_error_rate": (6 / 8, 3),
        "texts_right": (pytest.approx(1 / 3), 3),
        "no_text_right": (0.5, 2),
        "text_invented": (pytest.approx(1 / 3), 3),
        "looping": (0.0, 7),
        "half_characters": (0.0, 7),
        "most_frequent": (pytest.approx(1 / 7), 7),
        "characters": (pytest.approx((5 + 5 + 0 + 8 + 1 + 2 + 2) / 7), 7),
        "right: mood": (0.5, 2),
        "right: text": (2 / 5, 5),
    }


def test_captions_by_hand():
    """The longest common subsequence of 写着好耶小猫很开心 and 写着好耶小狗开心 has 7 characters."""
    scores = score_predictions([ask("写着“好耶”，小狗开心", "写着“好耶”，小猫很开心呀", "好耶", "description")])
    recall, precision = 7 / 10, 7 / 8
    assert scores["rouge_l"].value == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["text_found_in_captions"].value == 1.0
    assert 0 < scores["bleu"].value < 100 and 0 < scores["chrf"].value < 100
    assert "right: description" not in scores
    same = score_predictions([ask("写着“好耶”，小猫很开心呀", "写着“好耶”，小猫很开心呀", "好耶")])
    assert [same[name].value for name in ("chrf", "bleu", "rouge_l")] == pytest.approx([100, 100, 1])


def test_scores_of_captions_have_intervals_by_image():
    """Half of the images have a caption that shares nothing with the reference; a draw of these alone scores zero."""
    reference = "图片里画着一只坐在窗边的小猫"
    once = [ask(reference if row % 2 else "别的", reference, image=f"{row}.png") for row in range(4)]
    for name in ("chrf", "bleu", "rouge_l"):
        one, ten = (score_predictions(answered)[name] for answered in (once, once * 10))
        assert (one.low, one.high) == pytest.approx((ten.low, ten.high))
        assert one.value == pytest.approx(ten.value)
        assert one.low < 5  # BLEU is smoothed
        assert one.high == pytest.approx(1 if name == "rouge_l" else 100)


def test_the_text_is_found_line_by_line():
    """Of 今天不上班明天也不上 a caption quotes 今天不上班 and 明天; 明天 is too short a piece."""
    answer = "上面写着“今天不上班”，下面提到明天。"
    scores = score_predictions([ask(answer, "图里写着今天不上班、明天也不上。", "今天不上班\n明天也不上")])
    assert scores["text_found_in_captions"].value == 5 / 10


def test_the_text_is_found_among_other_words():
    """A model that was not asked to be short is not told so as if it had not read."""
    scores = score_predictions([ask("这张图里写的是“我太难了”。", "我太难了", "我太难了", "text")])
    assert scores["text_found"].value == 1.0
    assert scores["character_error_rate"].value == 7 / 4


@pytest.mark.parametrize(
    ("reference", "text", "asks"),
    [
        ("我太难了", "我太难了！", True),
        ("图片里没有文字。", "", True),
        ("图片里没有文字。", None, False),  # nobody knows
        ("开心", "我太难了", False),
        ("这是一张猫咪的表情包，图中没有文字", "", False),
    ],
)
def test_which_questions_ask_for_the_text(reference, text, asks):
    assert asks_for_text(Question(Path("a.png"), "?", reference, text_in_image=text)) is asks


NO_WORDS = "这是一张“猫咪”类表情包，图中没有文字。"


@pytest.mark.parametrize(
    ("answer", "reference", "invented"),
    [
        ("图片里没有文字！", "图片里没有文字。", False),
        ("好耶", "图片里没有文字。", True),
        ("", "图片里没有文字。", False),
        ("这是一张“狗狗”类表情包，图中没有文字。", NO_WORDS, False),
        ("这是一张“猫咪”类表情包，图中文字是“好耶”。", NO_WORDS, True),
        ("这是一张“猫咪”类表情包。", NO_WORDS, False),
        ("一只猫坐在窗边看着外面", NO_WORDS, False),
        ('A cat that says "LOL"', NO_WORDS, True),
        ("难过", "开心", False),
        ("写着「好耶」，所以开心", "开心", True),
    ],
)
def test_words_invented_for_an_image_without_text(answer, reference, invented):
    assert compute_scores([ask(answer, reference, "")])["text_invented"] == invented
    assert "text_invented" not in compute_scores([ask(answer, reference, None)])


def test_one_sentence_about_every_image_is_named():
    """Of 10 images with other texts; one answer is broken off inside a character."""
    said = "我不知道这张图里写了什么，但是它看起来很好笑，我想把它发给我所有的朋友，让他们也一起笑一笑，好不好呀"
    texts = [f"第{row}句" for row in range(10)]
    answered = [ask(said * 2, text, text, image=f"{text}.png") for text in texts[1:]] + [
        ask("一\ufffd", *texts[:1] * 2)
    ]
    scores = compute_scores(answered)
    assert list(scores)[:3] == ["text_found", "characters_wrong", "character_error_rate"]
    assert (scores["text_found"], scores["characters_wrong"], scores["character_error_rate"] > 20) == (0, 1, True)
    assert (scores["most_frequent"], scores["half_characters"]) == (0.9, 0.1)
    told = f"“{(said * 2)[:60]}…”, 90.0% of the answers, 0.0% of the references"
    assert describe_most_frequent(answered) == told


@pytest.mark.parametrize(
    ("answer", "stopped", "share"),
    [("一\ufffd", True, 1), ("一\ufffd", None, 1), ("一\ufffd", False, 0), ("\ufffd一", False, 1)],
)
def test_half_a_character_counts_unless_the_limit_cut_it(answer, stopped, share):
    assert compute_scores([ask(answer, "一", "一", stopped=stopped)])["half_characters"] == share


def test_signs_alone_are_a_truth_too():
    assert is_right("？？？", "？？？") and not is_right("", "？？？") and not is_right("好", "😂")
    assert is_right("好耶！", "好耶")


def test_what_cannot_be_judged_has_no_score():
    of_all = {"looping", "half_characters", "most_frequent", "characters"}
    assert set(score_predictions([ask("一只猫", "一只猫")])) == {*of_all, "right: "}


def test_how_answers_end():
    endless = "哈" * 100
    scores = score_predictions(
        [ask("好", "好", tokens=2, stopped=True), ask(endless, "好", tokens=128, stopped=False, image="b.png")]
    )
    assert scores["looping"].value == 0.5
    assert scores["stopped"].value == 0.5
    assert scores["tokens"].value == 65


def test_few_answers_have_no_interval():
    assert [show_score(Score(1.0, 1.0, 1.0, count)) for count in (4, 5)] == [("100.0%", ""), ("100.0%", "100.0–100.0")]


def test_intervals_come_from_drawing_images():
    """100 images of which half are read: binomial with a standard deviation of 5 %. Ten answers about each image
    say no more than one."""
    once = [ask("好" if row % 2 else "坏", "好", "好", "text", f"{row}.png") for row in range(100)]
    for answered in (once, once * 10):
        score = score_predictions(answered)["texts_right"]
        assert score.value == 0.5
        assert score.low == pytest.approx(0.40, abs=0.015)
        assert score.high == pytest.approx(0.60, abs=0.015)
    (alone,) = [score_predictions(once[:1])["texts_right"]]
    assert alone.low == alone.high == alone.value == 0.0


def test_every_score_has_a_title():
    assert describe_measure("right: mood").title == "exact match: mood"
    assert describe_measure("right: ").title == "exact match: all"
    assert describe_measure("character_error_rate").better == "lower"


def test_scores_come_without_intervals_where_nobody_reads_those(monkeypatch):
    """A training evaluates again and again, and a thousand draws a score take longer than the scores."""
    answered = [ask("写着好耶，小狗开心", "写着好耶，小猫很开心呀", "好耶", image=f"{row}.png") for row in range(3)]
    answered += [ask("好", "坏", "坏", "text", tokens=3, stopped=True)]
    expected = {name: score.value for name, score in score_predictions(answered).items()}
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: pytest.fail("images were drawn"))
    assert compute_scores(answered) == expected
