"""Evaluating: the same answers for any batch size, going on after an interruption, what may stand side by side."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import evaluate
from meme_llava.dataset.images import open_image
from meme_llava.evaluate import results_folder
from meme_llava.evaluate.results_folder import read_predictions
from meme_llava.inference import generation
from meme_llava.inference.generation import Answerer, PromptTooLong, load_answerer
from meme_llava.inference.questions import Question
from meme_llava.pipeline import precheck
from meme_llava.storage.files import lock


def test_batches_answer_as_single_questions_do(world, served_model, monkeypatch):
    """Prompts of different lengths, so that all but the longest are padded."""
    answerer = load_answerer(served_model, device="cpu", dtype="float32")
    questions = ["图里写了什么？", "困", "请描述一下这张表情包，越详细越好。", "什么意思？"]
    images = [Image.open(world.image_folder / f"p{index}.png").convert("RGB") for index in range(4)]
    asked = [Question(world.image_folder / f"p{index}.png", text) for index, text in enumerate(questions)]
    asked[3] = Question(world.image_folder / "p3.png", questions[3], system="你只说一个字。")
    # The second and the last image are asked about once more.
    images += [images[1], images[3]]
    asked += [Question(asked[1].image, questions[0]), Question(asked[3].image, questions[2])]
    opened, seen = [], []
    monkeypatch.setattr(generation, "open_image", lambda path, policy: opened.append(path) or open_image(path, policy))
    answerer.model.model.vision_tower.register_forward_pre_hook(lambda tower, inputs: seen.append(len(inputs[0])))
    together = answerer.answer_together(asked, max_new_tokens=12)
    assert seen == [4] and len(opened) == 4  # no image twice
    alone = [
        answerer.answer(image, question.text, question.system, max_new_tokens=12)
        for image, question in zip(images, asked, strict=True)
    ]
    assert together == [replace(answer, question=question) for answer, question in zip(alone, asked, strict=True)]
    assert len({answer.text for answer in alone}) > 1


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


def test_a_question_beyond_the_models_positions_is_named(world, served_model):
    answerer = load_answerer(served_model, device="cpu", dtype="float32")
    asked = [Question(world.image_folder / "p0.png", "困"), Question(world.image_folder / "p1.png", "困" * 5000)]
    with pytest.raises(PromptTooLong, match=r"a question about \S+/p1.png takes 10030 positions, the model has 4096"):
        answerer.answer_together(asked)


@pytest.fixture
def annotations(world, tmp_path):
    """Every record of the world that begins with one image, with its text and a task."""
    records = [dict(record) for record in world.records if isinstance(record.get("image"), str)]
    for record in records:
        record["text"] = record["conversations"][1]["value"]
        record["task"] = "text"
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def flags(world, served_model, annotations):
    return [
        *("--model", str(served_model), "--annotations", str(annotations)),
        *("--image_folder", str(world.image_folder), "--max_new_tokens", "4"),
    ]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_writes_answers_and_scores(flags, served_model, tmp_path, capsys):
    output_dir = tmp_path / "scores"
    evaluate.main([*flags, "--output_dir", str(output_dir), "--batch_size", "4"])
    assert {path.name for path in output_dir.iterdir()} == {"run_record.json", "predictions.jsonl", "metrics.json"}
    predictions = read_rows(output_dir)
    assert len(predictions) == 6
    assert set(predictions[0]) == {
        "image",
        "task",
        "question",
        "answer",
        "reference",
        "text",
        "tokens",
        "stopped",
        "problem",
    }
    assert predictions[0]["image"] == "p0.png"
    assert predictions[0]["reference"] == predictions[0]["text"] == "写着“我太难了”。"
    metrics = read_metrics(output_dir)
    assert metrics["stage"] == "evaluate"
    assert metrics["scores"]["character_error_rate"]["count"] == 6
    assert metrics["settings"]["batch_size"] == 4
    assert metrics["model"] == json.loads((served_model / "run_record.json").read_text())
    printed = capsys.readouterr().out
    rate = metrics["scores"]["character_error_rate"]
    assert f"{rate['value']:.1%} ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})" in printed
    assert "exact match: text" in printed
    assert f"most frequent answer: “{' '.join(predictions[0]['answer'].split())[:60]}" in printed


def test_an_interrupted_evaluation_goes_on(flags, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate.main([*flags, "--output_dir", str(whole)])
    answer_together = Answerer.answer_together
    asked = []

    def answer_twice(answerer, questions, max_new_tokens):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(questions)
        return answer_together(answerer, questions, max_new_tokens)

    monkeypatch.setattr(Answerer, "answer_together", answer_twice)
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--output_dir", str(broken), "--batch_size", "2"])
    assert "4 of 6 questions are done; the same command goes on" in capsys.readouterr().err
    assert len(read_rows(broken)) == 4
    assert not (broken / "metrics.json").exists()
    with (broken / "predictions.jsonl").open("a") as file:
        file.write('{"image": "half a li')  # a kill in the middle of a write
    monkeypatch.setattr(Answerer, "answer_together", answer_together)
    capsys.readouterr()
    evaluate.main([*flags, "--output_dir", str(broken), "--batch_size", "5"])
    assert "4 of 6 questions are done already" in capsys.readouterr().out
    assert read_rows(broken) == read_rows(whole)
    assert read_metrics(broken)["scores"] == read_metrics(whole)["scores"]


def test_a_finished_evaluation_shows_its_scores_again(flags, tmp_path, monkeypatch, capsys):
    evaluate.main([*flags, "--output_dir", str(tmp_path / "scores")])
    first = capsys.readouterr().out
    monkeypatch.setattr("meme_llava.inference.generation.load_answerer", None)  # no model is loaded
    evaluate.main([*flags, "--output_dir", str(tmp_path / "scores")])
    assert capsys.readouterr().out == first


def test_other_settings_need_another_folder(flags, tmp_path, capsys):
    output_dir = tmp_path / "scores"
    evaluate.main([*flags, "--output_dir", str(output_dir)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(output_dir), "--limit", "2"])
    assert stop.value.code == 2
    assert "was made with other settings (other images; limit was None, is 2)" in capsys.readouterr().err
    assert len(read_rows(output_dir)) == 6
    evaluate.main([*flags, "--output_dir", str(output_dir), "--limit", "2", "--overwrite"])
    assert len(read_rows(output_dir)) == 2


def test_what_another_process_finished_meanwhile_is_left_alone(flags, tmp_path, monkeypatch, capsys):
    """Two were started in one folder with different settings; the second has the lock when the first is finished."""
    first, shared = tmp_path / "first", tmp_path / "shared"
    evaluate.main([*flags, "--output_dir", str(first)])

    def wait_for_the_first(path):
        shutil.copytree(first, shared, dirs_exist_ok=True)
        return lock(path)

    monkeypatch.setattr(results_folder, "lock", wait_for_the_first)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(shared), "--limit", "2"])
    assert stop.value.code == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert read_rows(shared) == read_rows(first) and read_metrics(shared) == read_metrics(first)


def test_images_of_the_same_names_are_other_images(flags, world, tmp_path, capsys):
    """As where data and data/unseen are mixed up: the answers are about something else."""
    others = tmp_path / "others"
    others.mkdir()
    for path in world.image_folder.iterdir():
        Image.new("RGB", (40, 30), "red").save(others / path.name)
    output_dir = str(tmp_path / "scores")
    evaluate.main([*flags, "--output_dir", output_dir, "--image_folder", str(others)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", output_dir])
    assert stop.value.code == 2
    assert "was made with other settings (other images)" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(flags, served_model, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "merged").symlink_to(served_model)
    for model, message in (("gone", "gone: no such model folder"), ("run", "did you mean")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*flags, "--output_dir", str(tmp_path / "scores"), "--model", str(tmp_path / model)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_no_model_is_emptied_for_an_evaluation(flags, trained, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    files = {path.name for path in model.iterdir()}
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(model), "--overwrite"])
    assert stop.value.code == 2
    assert "is not an output_dir of evaluate.py" in capsys.readouterr().err
    assert {path.name for path in model.iterdir()} == files


def test_any_character_of_an_answer_can_be_read_again(flags, annotations, tmp_path):
    records = json.loads(annotations.read_text())
    records[0]["conversations"][1]["value"] = "一\u2028二\x85三"
    annotations.write_text(json.dumps(records))
    evaluate.main([*flags, "--output_dir", str(tmp_path / "scores")])
    first, *_ = read_predictions(tmp_path / "scores").values()
    assert first.question.reference == "一\u2028二\x85三"


def test_a_folder_of_something_else_is_left_alone(flags, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(tmp_path), "--overwrite"])
    assert stop.value.code == 2
    assert "is not an output of ours and --overwrite leaves it alone" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_evaluations_stand_beside_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # no row of three models is folded
    before, after = tmp_path / "before", tmp_path / "after"
    evaluate.main([*flags, "--output_dir", str(before)])
    metrics = read_metrics(before)
    metrics["scores"]["character_error_rate"] |= {"value": 0.875, "low": 0.75, "high": 1.0}
    (before / "metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    evaluate.main([*flags, "--output_dir", str(after), "--compare_with", str(before)])
    printed = capsys.readouterr().out.splitlines()
    (place,) = [place for place, line in enumerate(printed) if "character error rate" in line]
    new = read_metrics(after)["scores"]["character_error_rate"]
    assert printed[place].split()[-3:] == ["87.5%", f"{new['value']:.1%}", "6"]
    assert printed[place + 1].split() == ["75.0–100.0", f"{100 * new['low']:.1f}–{100 * new['high']:.1f}"]
    heads = "".join(printed[:place])
    assert "before" in heads and "after" in heads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asked": {"annotations_sha256": "0", "limit": None}}, "was asked other records than these; evaluate both"),
        ({"scores": None}, "metrics.json: scores is null, expected an object. Delete it, and the same evaluate.py"),
        ({"scores": {"tokens": 5}}, "metrics.json: has no value. Delete it"),
        ({"scores": {"tokens": {"value": "1", "low": 0, "high": 0, "count": 1}}}, 'value is "1", expected a number'),
        ({"asked": {"limit": None}}, "metrics.json: has no asked.annotations_sha256. Delete it"),
        ({"title": None}, "metrics.json: title is null, expected text. Delete it"),
        ({"image_folder": 5}, "metrics.json: image_folder is 5, expected text. Delete it"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, tmp_path, capsys, change, message):
    before = tmp_path / "before"
    evaluate.main([*flags, "--output_dir", str(before)])
    (before / "metrics.json").write_text(json.dumps(read_metrics(before) | change))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(tmp_path / "after"), "--compare_with", str(before)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run_record.json", "[]", "run_record.json: holds a list, expected an object {…}. Choose another folder"),
        ("run_record.json", '{"stage": "merge"}', "is not an output_dir of evaluate.py (run_record.json: its stage is"),
        ("run_record.json", '{"stage": "evaluate"}', "run_record.json: has no asked. Choose another folder"),
        ("metrics.json", "", "metrics.json: is empty. Delete it, and the same evaluate.py command makes it anew."),
        ("metrics.json", '{"title": "a', "metrics.json: ends in the middle. Delete it"),
        ("predictions.jsonl", "5\n", "predictions.jsonl: is damaged (line 1 has no image that evaluate.py wrote)"),
        ("predictions.jsonl", '{"image": "a.png", "task": 5}\n', "(line 1 has no task that evaluate.py wrote)"),
    ],
)
def test_what_was_changed_in_a_folder_is_named(flags, tmp_path, capsys, name, content, message):
    output_dir = tmp_path / "scores"
    evaluate.main([*flags, "--output_dir", str(output_dir), "--limit", "1"])
    (output_dir / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--output_dir", str(output_dir), "--limit", "1"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_read_stops_with_its_name(world, served_model, annotations, tmp_path, capsys):
    records = json.loads(annotations.read_text())
    (tmp_path / "broken.png").write_bytes(b"no image")
    records[0]["image"] = "broken.png"
    annotations.write_text(json.dumps(records[:1]))
    flags = ["--annotations", str(annotations), "--image_folder", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(served_model), *flags])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "1 of 1 image cannot be read" in printed and "broken.png" in printed
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_wrong_folder_is_named_before_any_model_is_made(world, annotations, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        precheck.main([str(annotations), str(tmp_path)])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert f"give the right --image_folder ({tmp_path}; EVAL_IMAGE_FOLDER in run.sh)" in printed
    assert "6 of 6 images cannot be read:\n  6 images: there is no such file [missing_image], e.g.\n" in printed
    assert printed.count(".png: ") == 3
    precheck.main([str(annotations), str(world.image_folder)])
    assert capsys.readouterr().out == "6 questions can be asked for the evaluation\n"


@pytest.mark.parametrize("flags", [("--batch_size", "0"), ("--limit", "0"), ("--max_new_tokens", "0")])
def test_impossible_settings_are_refused(flags, capsys):
    needed = ["--model", "m", "--annotations", "a.json", "--image_folder", "i", "--output_dir", "o"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*needed, *flags])
    assert stop.value.code == 2
    assert f"{flags[0]} is 0, expected at least 1" in capsys.readouterr().err
