"""Counting: what an answer is compared with, the scores by hand, and the same answers for any batch size."""

import json

import pytest
import torch
from PIL import Image

import evaluate
from meme_llava.captions import normalise_text
from meme_llava.generation import Question, load_answerer
from meme_llava.reading_scores import AnsweredQuestion, score_reading


def test_only_letters_and_digits_are_compared():
    assert normalise_text("ＯＫ，我 太难了！\n５2０") == "ok我太难了520"


def test_scores_by_hand():
    answered = [
        AnsweredQuestion("我太难了！", "我太难了", "我太难了", "text"),  # right but for punctuation
        AnsweredQuestion("好呀好", "好耶", "好耶", "text"),  # one wrong, one surplus
        AnsweredQuestion("", "收到", "收到", "text"),  # two missing
        AnsweredQuestion("图片里没有文字。", "图片里没有文字。", "", "text"),
        AnsweredQuestion("困", "图片里没有文字。", "", "text"),
        AnsweredQuestion("开心", "开心", "好耶", "mood"),
        AnsweredQuestion("难过", "开心", "", "mood"),
        AnsweredQuestion("写着“好耶”。", "写着“好耶”，很开心。", "好耶", "description"),
    ]
    scores = score_reading(answered)
    assert scores.text_questions == 3 and scores.no_text_questions == 2
    assert scores.character_error_rate == pytest.approx(4 / 8)
    assert scores.texts_right == pytest.approx(1 / 3)
    assert scores.no_text_right == 0.5
    assert scores.right_by_task == {
        "description": (1, 0.0),
        "mood": (2, 0.5),
        "text": (5, pytest.approx(2 / 5)),
    }


def test_what_cannot_be_judged_is_none():
    scores = score_reading([AnsweredQuestion("一只猫", "一只猫", None, "")])
    assert scores.character_error_rate is scores.texts_right is scores.no_text_right is None
    assert scores.right_by_task == {"": (1, 1.0)}


def test_batches_answer_as_single_questions_do(world, served_model):
    """Prompts of different lengths, so that all but the longest are padded."""
    answerer = load_answerer(served_model, device="cpu", dtype="float32")
    questions = ["图里写了什么？", "困", "请描述一下这张表情包，越详细越好。", "什么意思？"]
    images = [Image.open(world.image_folder / f"p{index}.png").convert("RGB") for index in range(4)]
    asked = [Question(world.image_folder / "p0.png", text) for text in questions]
    asked[3] = Question(world.image_folder / "p3.png", questions[3], system="你只说一个字。")
    together = answerer.answer_together(images, asked, max_new_tokens=12)
    alone = [
        answerer.answer(image, question.text, question.system, max_new_tokens=12)
        for image, question in zip(images, asked, strict=True)
    ]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert together == alone
    assert len({tuple(answer.token_ids) for answer in alone}) > 1


def test_padding_is_not_seen(world, served_model):
    """The first token's logits of a padded prompt are those of the prompt alone."""
    answerer = load_answerer(served_model, device="cpu", dtype="float32")
    image = Image.open(world.image_folder / "p0.png").convert("RGB")
    inputs = answerer.build_inputs(image, "困")
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (7, 0), value=answerer.padding_id),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (7, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    logits = [answerer.model.generate(**batch, **options).logits[0] for batch in (inputs, padded)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.fixture
def annotations(world, tmp_path):
    """Every record of the world that begins with one picture, with its text and a task."""
    records = [dict(record) for record in world.records if isinstance(record.get("image"), str)]
    for record in records:
        record["text"] = record["conversations"][1]["value"]
        record["task"] = "text"
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def test_writes_answers_and_scores(world, served_model, annotations, tmp_path, capsys):
    output_dir = tmp_path / "scores"
    flags = ["--annotations", str(annotations), "--image_folder", str(world.image_folder)]
    evaluate.main(["--model", str(served_model), *flags, "--output_dir", str(output_dir), "--batch_size", "4"])
    assert {path.name for path in output_dir.iterdir()} == {"predictions.jsonl", "metrics.json"}
    predictions = [json.loads(line) for line in (output_dir / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6
    assert set(predictions[0]) == {"image", "task", "question", "answer", "truth", "text", "stopped"}
    assert predictions[0]["truth"] == predictions[0]["text"] == "写着“我太难了”。"
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["stage"] == "evaluate"
    assert metrics["scores"]["text_questions"] == 6
    assert metrics["settings"]["batch_size"] == 4
    printed = capsys.readouterr().out
    assert f"{metrics['scores']['character_error_rate']:.1%}" in printed
    assert "right to the letter: text" in printed


def test_an_earlier_evaluation_stands_beside_it(world, served_model, annotations, tmp_path, capsys):
    flags = ["--model", str(served_model), "--annotations", str(annotations)]
    flags += ["--image_folder", str(world.image_folder)]
    before, after = tmp_path / "before", tmp_path / "after"
    evaluate.main([*flags, "--output_dir", str(before), "--max_new_tokens", "4"])
    metrics = json.loads((before / "metrics.json").read_text())
    # The model's folder is the same, as after training once more.
    assert metrics["settings"]["model"] == str(served_model)
    metrics["scores"]["character_error_rate"] = 0.875
    (before / "metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    evaluate.main([*flags, "--output_dir", str(after), "--max_new_tokens", "4", "--compare_with", str(before)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "character error rate" in line]
    new = json.loads((after / "metrics.json").read_text())["scores"]["character_error_rate"]
    assert row.split()[-3:] == ["87.5%", f"{new:.1%}", "6"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations_sha256": "0"}, "was made from other records than these"),
        ({"settings": {"model": "old", "limit": 3}}, "was made from other records than these"),
        ({"scores": {}}, "expected an output_dir of evaluate.py"),
    ],
)
def test_what_cannot_be_compared_is_refused(world, served_model, annotations, tmp_path, capsys, change, message):
    flags = ["--model", str(served_model), "--annotations", str(annotations)]
    flags += ["--image_folder", str(world.image_folder)]
    before = tmp_path / "before"
    evaluate.main([*flags, "--output_dir", str(before), "--max_new_tokens", "1"])
    metrics = json.loads((before / "metrics.json").read_text())
    (before / "metrics.json").write_text(json.dumps(metrics | change))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(tmp_path / "after"), "--compare_with", str(before)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "after").exists()


def test_a_picture_that_cannot_be_read_stops_with_its_name(world, served_model, annotations, tmp_path, capsys):
    records = json.loads(annotations.read_text())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    records[0]["image"] = "broken.png"
    annotations.write_text(json.dumps(records[:1]))
    flags = ["--annotations", str(annotations), "--image_folder", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(served_model), *flags])
    assert stop.value.code == 2
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--batch_size", "0"), ("--limit", "0"), ("--max_new_tokens", "0")])
def test_impossible_settings_are_refused(flags, capsys):
    needed = ["--model", "m", "--annotations", "a.json", "--image_folder", "i", "--output_dir", "o"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*needed, *flags])
    assert stop.value.code == 2
    assert f"{flags[0]} is 0, expected at least 1" in capsys.readouterr().err
