"""Refusals, loops and repeated words are found in captions; what memes themselves say is not."""

import json
import time

import pytest
from conftest import SHARED_DATA

from meme_llava.dataset.inspection import find_loop, find_refusal, measure_recall, normalise_text


@pytest.mark.parametrize(
    "text, normal",
    [
        ("好耶！", "好耶"),
        ("  求人 不如\n求我。", "求人不如求我"),
        ("ＯＫ，Ok; ok", "okokok"),
        ("①②½", "1212"),  # the slash of a fraction goes as all punctuation does
        ("ﬁne", "fine"),
        ("カ゛", "カ"),
        ("😀!?…—", ""),
        ("", ""),
        ("STRASSE", "strasse"),
        ("第 3 次", "第3次"),
    ],
)
def test_normal_texts_hold_letters_and_digits_alone(text, normal):
    assert normalise_text(text) == normal


@pytest.mark.parametrize("mark", ["“", "‘", "「", "『", "《", '"', "**", "* ", "我无法", "抱歉，", "作为"])
def test_a_long_text_of_nothing_but_one_mark_takes_no_longer_than_others(mark):
    begun = time.process_time()
    find_refusal(mark * 100_000)
    assert time.process_time() - begun < 5, "it took a quarter of a minute, and half an hour at the longest text"


@pytest.mark.parametrize(
    "reference, answer, recall",
    [
        ("好耶", "写着“好耶！”，很开心", 1.0),
        ("好耶", "写着“好”", 0.5),
        ("好耶", "", 0.0),
        ("", "写着“好耶”", 1.0),
        ("！？", "", 1.0),
        ("哈哈哈哈", "哈", 0.25),  # as often as in the reference
        ("哈", "哈哈哈哈", 1.0),
        ("耶好", "好耶", 1.0),  # the order is not compared
        ("OK啦", "ｏｋ", 2 / 3),
        ("abcd", "a-c", 0.5),
    ],
)
def test_recall_counted_by_hand(reference, answer, recall):
    assert measure_recall(reference, answer) == recall


@pytest.mark.parametrize(
    "text, words",
    [
        ("我无法为你解读这张图片。", "我无法为你解读"),
        ("很抱歉，我无法看到图片，因此无法提供关于图片的详细描述。", "抱歉，我无法"),
        ("对不起，我不能提供帮助。", "对不起，我不能"),
        ("抱歉，根据您提供的图片和主题“好的”，我无法提供任何描述。", "抱歉，根据您提供的图片和主题“”，我无法"),
        ("我理解你想让我描述这张图片，但这张图片有刻板印象。", "我理解你想让我描述这张图片，但"),
        ("请提供图片主题和文字信息，以便我进行分析。", "请提供图片"),
        ("作为一个人工智能助手，我没有个人看法。", "作为一个人工智能助手，我"),
        ("一只小猫。很抱歉，我暂时不能提供您所需的回答。如有其他需要，请随时提问。", "抱歉，我暂时不能"),
        ("抱歉，我无法提供此类信息，换个话题吧。", "抱歉，我无法"),
        ("I'm sorry, but I can't help with that.", "I'm sorry"),
        ("Sorry, as an AI I do not see images.", "as an AI"),
        ("I cannot identify people.", "I cannot identify"),
    ],
)
def test_refusals_are_found_with_their_words(text, words):
    assert find_refusal(text) == words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "一只小猫举着牌子，写着“好耶”。",
        # What the meme says.
        "图片上写着“我无法回答”，猫咪很无奈。",
        "配文是「抱歉，我不能」。",
        "下方的文字是**抱歉，我无法回答**。",
        '文字是"I cannot help you"。',
        "图中的文字《我不能接受》让人发笑。",
        # What people in it do, and what captions say of themselves.
        "他无法接受这个结果。",
        "让我无法描述的是这种可爱。",
        "这种表情给我无法描述的快乐。",
        "我们无法得知他在想什么。",
        "猫咪一副抱歉的样子，好像做错了事。",
        "机器人说它是人工智能。",
    ],
)
def test_what_is_no_refusal_is_let_pass(text):
    assert find_refusal(text) is None


# White space without a period, as Gemini once wrote three thousand characters of it.
BLANKS = "".join(f"{number:b}" for number in range(40)).replace("0", " ").replace("1", "\t")


@pytest.mark.parametrize(
    "text, piece",
    [
        ("猫" + "群" * 60, "群"),
        ("熊猫在跳舞。" + "这…" * 40, "这…"),
        ("笑" + "会心一笑，然后" * 9, "会心一笑，然后"),
        ("很长的一句话，足足有二十个字那么长，不多不少。" * 6, "很长的一句话，足足有二十个字那么长，不多不少。"),
        ("🍵" * 60, "🍵"),
        ("好\ud83d" * 40, "好\ud83d"),
        ("ab" * 30 + "。结尾是正常的。", "ab"),
        ("猫" + BLANKS, " "),
    ],
)
def test_loops_are_found_with_their_piece(text, piece):
    assert find_loop(text) == piece


def test_a_loop_that_changes_a_word_is_found():
    assert find_loop("".join(f"喇叭是第{number}天的，而文字是未来的，可是谁也不知道它们。" for number in range(10, 40)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "好",
        "哈" * 59,  # memes laugh
        "哈哈哈" * 10,
        "会心一笑，然后" * 5,
        "鹅鹅鹅，" * 14,  # 56 characters
        "-" * 40,
        "今天星期一，明天星期二，后天星期三。" * 5,
        "".join(chr(0x4E00 + number) for number in range(3000)),
        "一句 话 里 有 很 多 空 格 也 是 可 以 的",
    ],
)
def test_what_is_no_loop_is_let_pass(text):
    assert find_loop(text) is None


# Rows, refusals and loops of real caption files. Looked at by eye: 76 of the 78 refusals refuse as a whole or end in
# a filter's apology, two refuse one detail; of the 18 loops one is a meme's laugh between asterisks.
REAL_FILES = {
    "captions/ChineseBQB-gemini-1.5-pro-latest_invalid.jsonl": (45, 44, 0),
    "captions/ChineseBQB_picked_yivision.jsonl": (4231, 8, 0),
    "captions/emo-visual-data-gemini-1_0_pro_vision.jsonl": (5324, 1, 9),
    "captions/emo-visual-data-gemini-1_5_flash.jsonl": (5325, 1, 9),
    "captions/image_descriptions_meme_gpt-4o.jsonl": (4258, 0, 0),
    "emo_visual/emo_descriptions.jsonl": (5329, 24, 0),
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_captions_give_the_hits_that_were_read(name):
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"needs the real captions in {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    texts = [row.get("description", row.get("text")) for row in rows]
    refusals = sum(find_refusal(text) is not None for text in texts)
    loops = sum(find_loop(text) is not None for text in texts)
    assert (len(texts), refusals, loops) == REAL_FILES[name]
