"""A judge compares two evaluations: both orders, what its words mean, and what is counted."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("openai", reason="configs/requirements/other_models.txt is not installed")

from caption_server import CaptionServer, Step, answer, fail  # noqa: E402

import judge  # noqa: E402
from meme_llava.evaluate.judging import CRITERIA, Pair, combine_verdicts, read_verdict, sum_up  # noqa: E402
from meme_llava.inference.questions import Prediction, Question  # noqa: E402

KEY, KEY_VARIABLE = "sk-canary-0123456789abcdef", "JUDGE_TEST_KEY"
QUESTION = "图里写了什么？"


def say(**verdict):
    """A verdict in the judge's words, "平" where nothing is said."""
    return json.dumps({**dict.fromkeys(CRITERIA, "平"), **verdict}, ensure_ascii=False)


def test_the_prompt_shows_both_orders():
    pair = Pair("a.png", QUESTION, "写着好耶", "好耶", "回答一", "回答二")
    straight, swapped = pair.write_prompt(False), pair.write_prompt(True)
    assert straight.index("回答一") < straight.index("回答二")
    assert swapped.index("回答二") < swapped.index("回答一")
    for prompt in (straight, swapped):
        assert f"问题：{QUESTION}\n参考答案：写着好耶\n图中文字：好耶\n" in prompt
        assert all(f"{criterion}：" in prompt for criterion in CRITERIA)
    assert "图中没有文字。" in Pair("a.png", QUESTION, "没有", "", "1", "2").write_prompt(False)
    assert "图中文字" not in Pair("a.png", QUESTION, "没有", None, "1", "2").write_prompt(False).split("问题：")[1]
    # Braces of an answer are not places to be filled.
    assert "{reference}" in Pair("a.png", QUESTION, "好", None, "{reference}", "2").write_prompt(False)


def test_verdicts_by_hand():
    reply = f'先看文字。{{"文字": "乙"}} 不对，最后：\n```json\n{say(文字="甲", 总评="乙")}\n```'
    expected = {"文字": "first", "含义": "tie", "属实": "tie", "总评": "second"}
    assert read_verdict(reply, swapped=False) == expected
    assert read_verdict(reply, swapped=True) == {**expected, "文字": "second", "总评": "first"}
    for useless in ("甲更好", "", '{"文字": "甲"}', say(文字="丙"), '["甲"]'):
        assert read_verdict(useless, swapped=False) is None


def test_a_preference_that_the_order_decides_is_a_tie():
    one = dict(zip(CRITERIA, ("first", "first", "tie", "second"), strict=True))
    other = dict(zip(CRITERIA, ("first", "second", "tie", "tie"), strict=True))
    assert list(combine_verdicts(one, other).values()) == ["first", "unsure", "tie", "unsure"]
    words = {"a": "first", "b": "second", "c": "second", "d": "unsure"}
    judgements = [{"image": image, "verdict": dict.fromkeys(CRITERIA, word)} for image, word in words.items()]
    comparison = sum_up(judgements)["总评"]
    assert [comparison[name] for name in ("first", "tie", "second", "unsure")] == [0.25, 0, 0.5, 0.25]
    preferred = comparison["second_preferred"]
    assert preferred["value"] == (0 + 1 + 1 + 0.5) / 4
    assert preferred["low"] < preferred["value"] < preferred["high"]


def write_evaluation(folder, title, answers):
    """A finished evaluation; the images are as wide as their place tells, by which the server knows them."""
    folder.mkdir()
    record = {"stage": "evaluate", "title": title, "asked": {"annotations_sha256": "0"}, "settings": {}, "scores": {}}
    record["image_folder"] = str(folder.parent)
    lines = []
    for place, text in enumerate(answers):
        Image.new("RGB", (50 + place, 40)).save(folder.parent / f"{place}.png")
        question = Question(Path(f"{place}.png"), QUESTION, "好耶", text_in_image="好耶", task=f"task{place}")
        lines.append(json.dumps(Prediction(question, text).to_line(Path())))
    (folder / "run_record.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps(record))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def judge_with(tmp_path, monkeypatch):
    """Judge two evaluations of four answers each with a server; gives back the lines of judgements.jsonl."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    write_evaluation(tmp_path / "one", "one", ["好", "同样", "对的", "好呀"])
    write_evaluation(tmp_path / "two", "two", ["好耶", "同样", "错的", "坏呀"])

    def judge_them(server, *flags):
        judge.main(
            [
                *("--first", str(tmp_path / "one"), "--second", str(tmp_path / "two")),
                *("--base_url", server.url, "--model", "m", "--key_variable", KEY_VARIABLE),
                *("--output_dir", str(tmp_path / "judged"), *flags),
            ]
        )
        return [json.loads(line) for line in (tmp_path / "judged" / "judgements.jsonl").read_text().splitlines()]

    return judge_them


class OrderedServer(CaptionServer):
    """Prefers the answer 好耶 wherever it stands, and whatever stands first in the image of width 52."""

    def open_request(self, body, headers):
        width, step = super().open_request(body, headers)
        prompt = body["messages"][-1]["content"][1]["text"]
        first = re.search("【回答甲开始】\n(.*)\n", prompt)[1]
        if width == 50:
            return width, answer(say(**dict.fromkeys(CRITERIA, "甲" if first == "好耶" else "乙")))
        if width == 52:
            return width, answer(say(文字="甲", 总评="甲"))
        return width, step


def test_a_judge_sees_every_pair_in_both_orders(judge_with, tmp_path, capsys):
    with OrderedServer({53: [answer("我不知道")]}) as server:
        lines = judge_with(server)
        # Nothing is asked about equal answers, and twice as often where no verdict came.
        assert [server.count(width) for width in (50, 51, 52, 53)] == [2, 0, 2, 4]
        assert judge_with(server) == lines
        assert server.count(50) == 2
    assert lines[0]["verdict"] == dict.fromkeys(CRITERIA, "second")
    assert lines[1]["verdict"] == dict.fromkeys(CRITERIA, "tie")
    assert lines[2]["verdict"] == {"文字": "unsure", "含义": "tie", "属实": "tie", "总评": "unsure"}
    assert lines[3]["verdict"] is None and lines[3]["problem"] == "no verdict in: 我不知道"
    metrics = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert metrics["asked"]["temperature"] == server.bodies[0]["temperature"] == 0
    overall = metrics["scores"]["总评"]
    assert [overall[name] for name in ("first", "tie", "second", "unsure")] == [0, *[pytest.approx(1 / 3)] * 3]
    assert overall["second_preferred"]["value"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    printed = capsys.readouterr().out
    assert "1 of 4 pairs without a verdict: no verdict in: 我不知道" in printed
    assert not any(KEY in path.read_text() for path in (tmp_path / "judged").iterdir())


def test_a_judge_goes_on_where_it_stopped(judge_with, capsys):
    good = answer(say(总评="甲"))
    with CaptionServer({52: [fail(503, "busy")]}, good) as server:
        with pytest.raises(SystemExit) as stop:
            judge_with(server, "--batch_size", "1")
        assert stop.value.code == 2
        assert "gave no answer, the last time: unanswered: HTTP 503" in capsys.readouterr().err
        server.script.clear()
        lines = judge_with(server, "--batch_size", "1")
        assert server.count(50) == 2
    assert len(lines) == 4
    assert "2 of 4 pairs are done already" in capsys.readouterr().out


def test_what_cannot_be_judged_is_refused(judge_with, tmp_path, capsys):
    with CaptionServer(default=Step("no verdict")) as server:
        (tmp_path / "2.png").rename(tmp_path / "elsewhere.png")
        with pytest.raises(SystemExit):
            judge_with(server)
        assert "lacks 1 evaluated image, e.g. 2.png" in capsys.readouterr().err
        (tmp_path / "elsewhere.png").rename(tmp_path / "2.png")
        with pytest.raises(SystemExit):
            judge_with(server, "--task", "nothing")
        assert "have no question of task 'nothing' in common" in capsys.readouterr().err
        assert server.requests == []
        with pytest.raises(SystemExit):
            judge_with(server, "--first", str(tmp_path))
        assert "it is not an output_dir of evaluate.py" in capsys.readouterr().err
    # One pair is a tie without a judge, which is not a verdict of his.
    with CaptionServer(default=answer("嗯")) as server, pytest.raises(SystemExit):
        judge_with(server, "--limit", "2", "--overwrite")
    assert (
        "the judge gave no verdict on any pair it was asked about, at first: no verdict in: 嗯"
        in capsys.readouterr().err
    )
