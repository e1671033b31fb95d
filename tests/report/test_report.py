"""Experiments side by side: what is read of a run, the tables, and the page in a browser."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import report
from meme_llava.report.experiment import (
    Experiment,
    describe_projector,
    describe_training,
    measure_training_seconds,
    read_experiments,
)
from meme_llava.report.html_page import thin
from meme_llava.report.report_page import render_report, split_differences

ATTACK = '</script></template><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"&amp;{{7*7}}'
QUESTION = "图里写了什么？"


@pytest.fixture(scope="module")
def runs(world, served_model, trained, tmp_path_factory):
    """The base and the merged model, asked the same; the second in the folders of a run of run.sh."""
    folder = tmp_path_factory.mktemp("runs")
    records = [record | {"text": "我太难了"} for record in world.records if isinstance(record.get("image"), str)]
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    flags = ["--annotations", str(annotations), "--image_folder", str(world.image_folder), "--max_new_tokens", "4"]
    evaluate.main(["--model", str(world.base), *flags, "--output_dir", str(folder / "before")])
    evaluate.main(["--model", str(served_model), *flags, "--output_dir", str(folder / "output" / "scores")])
    (folder / "output" / "train").symlink_to(trained)
    return folder


def write_report(runs, *words):
    page = runs / "page" / "report.html"
    report.main([*words, "--output", str(page)])
    with page.with_suffix(".csv").open(encoding="utf-8-sig", newline="") as file:
        return page, {row[0]: row[1:] for row in csv.reader(file)}


def test_the_table_holds_recipes_and_scores(runs, world, capsys):
    page, rows = write_report(runs, f"before={runs / 'before'}", str(runs / "output"))
    assert rows[""] == ["before", "output"]
    assert rows["language model"] == [str(world.language_model)] * 2
    assert rows["vision tower"] == [str(world.vision_tower)] * 2
    assert all(text.startswith("“") and "% of the answers" in text for text in rows["most frequent answer"])
    assert rows["train type"] == ["–", "lora"]
    assert rows["LoRA"] == ["–", "r 4, alpha 8"]
    assert rows["learning rate: multi_modal_projector"] == ["–", "0.01"]
    assert rows["learning rate: vision_tower"] == rows["learning rate: language_model"] == ["–", "0.005"]
    assert rows["passes"] == ["–", "1"]
    assert rows["steps"] == ["–", "2"]
    assert rows["global batch"] == ["–", "4"]
    assert rows["records"] == ["–", "8"]
    assert rows["training time"][1].endswith(" s")
    for name in ("stopped", "characters"):
        for column, folder in enumerate(("before", "output/scores")):
            score = json.loads((runs / folder / "metrics.json").read_text())["scores"][name]
            assert [float(rows[name + end][column]) for end in ("", ", low", ", high")] == [
                score["value"],
                score["low"],
                score["high"],
            ]
    assert capsys.readouterr().out == f"page:  {page}\ntable: {page.with_suffix('.csv')}\n"


def test_an_evaluation_of_another_training_is_named(runs, tmp_path, capsys):
    """The folder's model was trained anew behind the evaluation, or another model was evaluated into it."""
    shutil.copytree(runs / "output" / "scores", tmp_path / "scores")
    shutil.copytree(runs / "output" / "train", tmp_path / "train")
    write_report(runs, f"same={tmp_path}")
    assert "evaluate" not in capsys.readouterr().out
    said = f"is not of the training in {tmp_path}/train; merge and evaluate that one anew"
    path, metrics_path = tmp_path / "train" / "run_record.json", tmp_path / "scores" / "metrics.json"
    record, metrics = (json.loads(file.read_text()) for file in (path, metrics_path))
    path.write_text(json.dumps(record | {"step": 3}))  # it went on
    write_report(runs, f"further={tmp_path}")
    assert said in capsys.readouterr().out
    # One of its checkpoints was merged, whose log ends there.
    training = metrics["model"]["training"] | {"step": 1, "finished": False}
    metrics_path.write_text(json.dumps(metrics | {"model": metrics["model"] | {"training": training}}))
    write_report(runs, f"checkpoint={tmp_path}")
    assert "evaluate" not in capsys.readouterr().out
    assert [entry["step"] for entry in read_experiments([str(tmp_path)])[0].log_history] == [1]
    record["environment"]["time"] = "2001-01-01T00:00:00+00:00"
    path.write_text(json.dumps(record))
    write_report(runs, f"other={tmp_path}")
    assert said in capsys.readouterr().out


def test_curves_that_are_gone_are_named(runs, tmp_path, capsys):
    record = json.loads((runs / "output" / "scores" / "metrics.json").read_text())
    record["model"]["training"]["settings"]["output_dir"] = str(tmp_path / "gone")
    copy = tmp_path / "scores"
    copy.mkdir()
    for name in ("run_record.json", "predictions.jsonl"):
        (copy / name).write_bytes((runs / "output" / "scores" / name).read_bytes())
    (copy / "metrics.json").write_text(json.dumps(record))
    write_report(runs, f"moved={copy}")
    assert "moved: its trainer_state.json is not where it was" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda runs, spare: [], "which runs? For example: python report.py output output_b"),
        (lambda runs, spare: [str(runs / "nothing")], "no such folder; give an OUTPUT_DIR of run.sh"),
        (lambda runs, spare: [str(runs / "page")], "it is not an output_dir of evaluate.py"),
        (
            lambda runs, spare: [str(runs / "unfinished")],
            "was not evaluated yet; run first, with the other variables of that run: OUTPUT_DIR=",
        ),
        (lambda runs, spare: [f"a={runs / 'before'}", f"a={runs / 'output'}"], "two experiments are called 'a'"),
        (lambda runs, spare: [str(runs / "before"), f"spare={spare}"], "was asked other records than"),
        (lambda runs, spare: [str(runs / "before"), "--max_answers", "0"], "--max_answers is 0, expected at least 1"),
    ],
)
def test_what_cannot_stand_in_a_report_is_refused(runs, tmp_path, make, message, capsys):
    (runs / "page").mkdir(exist_ok=True)
    (runs / "unfinished" / "train").mkdir(parents=True, exist_ok=True)
    for name in ("run_record.json", "predictions.jsonl"):
        (tmp_path / name).write_bytes((runs / "before" / name).read_bytes())
    metrics = json.loads((runs / "before" / "metrics.json").read_text())
    metrics["asked"]["limit"] = 3
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(SystemExit) as stop:
        report.main([*make(runs, tmp_path), "--output", str(tmp_path / "report.html")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("model", [5, [], {"stage": "train"}, {"training": {"settings": None}}, {"training": "x"}])
def test_a_run_record_of_something_else_is_named(runs, tmp_path, capsys, model):
    shutil.copytree(runs / "before", tmp_path / "scores")
    path = tmp_path / "scores" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model}))
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "scores"), "--output", str(tmp_path / "report.html")])
    assert stop.value.code == 2
    assert "metrics.json: its model's run record cannot be read (" in capsys.readouterr().err


def test_differences_by_hand():
    assert list(split_differences("我太难了", "我太难了！")) == [("我太难了", "same"), ("！", "same")]
    assert list(split_differences("好耶", "好呀")) == [("好", "same"), ("耶", "missing"), ("呀", "wrong")]
    assert list(split_differences("收到", "收")) == [("收", "same"), ("到", "missing")]
    assert list(split_differences("困", "很困")) == [("很", "wrong"), ("困", "same")]
    assert list(split_differences("困。", "困")) == [("困", "same")]


def test_training_time_is_that_of_the_steps():
    """Ten captions a step: two steps at 5 captions a second, then, resumed, two at 20."""
    history = [
        {"step": 2, "captions_per_second": 5.0, "loss": 1.0},
        {"step": 2, "eval_loss": 1.0},
        {"step": 4, "captions_per_second": 20.0},
    ]
    assert measure_training_seconds(history, 10) == 4 + 1


def test_a_training_begun_once_is_told_with_all_the_code_that_went_on_with_it(trained):
    record = json.loads((trained / "run_record.json").read_text())
    commits = [("2026-01-02T03:04:05+00:00", "a" * 40, 0), ("2026-02-02T03:04:05+00:00", "b" * 40, 2)]
    first, second = ({"time": time, "git_commit": name, "git_changed_files": n} for time, name, n in commits)
    record |= {"environment": first, "continued": [first, second, second]}
    facts = describe_training(record, [])
    assert facts["begun"] == "2026-01-02 03:04"
    assert facts["git commit"] == "aaaaaaaaaa, then bbbbbbbbbb, 2 files changed"


def test_a_projector_that_learned_first_is_told(trained):
    record = json.loads((trained / "run_record.json").read_text())
    facts = describe_training(record, [])
    assert facts["projector alone first"] == "no"
    assert "training time" not in facts
    earlier = {"settings": {"num_train_epochs": 2.0, "high_lr": 0.001, "global_batch_size": 8}}
    assert describe_projector(earlier, []) == {"projector alone first": "2 passes at 0.001"}
    told = describe_projector(earlier, [{"step": 10, "captions_per_second": 2.0}])
    assert told == {"projector alone first": "2 passes at 0.001, 40 s more"}


def test_both_stages_of_a_run_are_told(runs, trained, tmp_path):
    """An evaluation whose training began with the projector of another one, found through the run record."""
    scores = tmp_path / "scores"
    scores.mkdir()
    for name in ("run_record.json", "predictions.jsonl"):
        (scores / name).write_bytes((runs / "output" / "scores" / name).read_bytes())
    metrics = json.loads((runs / "output" / "scores" / "metrics.json").read_text())
    earlier = json.loads((trained / "run_record.json").read_text())
    metrics["model"]["training"]["projector"] = {"folder": str(trained), "run_record": earlier}
    (scores / "metrics.json").write_text(json.dumps(metrics))
    (experiment,) = read_experiments([f"two={scores}"])
    assert re.fullmatch(r"1 pass at 0.01, \d+ s more", experiment.facts["projector alone first"])


def test_curves_are_means_of_steps():
    """Of every two steps one point, where the second stands; a shorter run has as many steps a point."""
    assert thin([(step, step % 2) for step in range(1, 6)], 2) == [(2, 0.5), (4, 0.5), (5, 1)]
    assert thin([(2, 1.0), (8, 3.0)], 2) == [(2, 1.0), (8, 3.0)]


def test_figures_of_a_training_are_called_what_scores_are(tmp_path):
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5, "eval_character_error_rate": 0.25, "eval_chrf": 30.0, "eval_runtime": 9.0},
        {"step": 2, "eval_right/mood": 0.5, "eval_right/all": 1.0},
    ]
    page = render_report("runs", [Experiment("one", {}, {}, tmp_path, {}, {}, history)], 10)
    assert re.findall(r'<h3><span class="label">([^<]*) <span', page) == [
        "training loss",
        "loss, validation",
        "character error rate, surplus text counted, validation, %",
        "chrF of captions, validation",
        "exact match: mood, validation, %",
        "exact match: all, validation, %",
    ]
    assert "<title>one: 25 at the end</title>" in page and "<title>one: 30 at the end</title>" in page


def write_evaluation(folder: Path, title: str, answers: list[str], image_folder: Path) -> Path:
    """A finished evaluation of three questions about one image."""
    truths = ["好耶", "没有", ATTACK]
    folder.mkdir()
    asked = {"annotations_sha256": "0", "limit": None}
    record = {"stage": "evaluate", "title": title, "asked": asked, "settings": {"model": None}, "model": None}
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "count": 3}
    record |= {"image_folder": str(image_folder), "scores": {"character_error_rate": score}}
    predictions = [
        {"image": "a.png", "task": f"task {place}", "question": QUESTION, "reference": reference, "answer": answer}
        | {"text": None, "tokens": 2, "stopped": True, "problem": None}
        for place, (reference, answer) in enumerate(zip(truths, answers, strict=True))
    ]
    (folder / "run_record.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps(record))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
    return folder


@pytest.fixture
def open_report(browser, tmp_path):
    """Write a report of two evaluations, one with a hostile name, and open it; nothing may go wrong in it."""
    complaints, pages = [], []
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    first = write_evaluation(tmp_path / "one", "one", ["好耶！", "没有", "x"], tmp_path)
    second = write_evaluation(tmp_path / "two", ATTACK, ["好呀", "没有", ATTACK], tmp_path)

    def open_it(width=1280):
        path = tmp_path / "report.html"
        report.main([str(first), str(second), "--output", str(path), "--title", ATTACK])
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if "report.html" not in request.url else None)
        page.goto(path.as_uri())
        return page

    yield open_it
    for page in pages:
        page.close()
    assert [complaint for complaint in complaints if not complaint.startswith("data:")] == []


def test_answers_stand_beside_the_truth_and_are_filtered(open_report):
    page = open_report()
    # The answers about the first and the third disagree, so these come first.
    assert page.locator(".card .reference [data-text]").all_text_contents() == ["好耶", ATTACK, "没有"]
    card = page.locator(".card").first
    assert card.locator(".verdict").all_text_contents() == ["✓ 对", "✗"]
    assert card.locator(".answer ins").all_text_contents() == ["呀"]
    assert card.locator(".answer del").all_text_contents() == ["耶"]
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 50
    page.locator("label", has_text="Disagree").click()
    assert page.locator(".card").count() == 2
    page.locator("[name=task]").select_option(label="task 2 (1)")
    assert page.locator(".card .reference [data-text]").all_text_contents() == [ATTACK]
    page.get_by_role("button", name="Reset").click()
    page.locator("[name=query]").fill("好呀")
    assert page.locator("#matching").text_content() == "1"


def test_nothing_that_was_said_runs(open_report):
    page = open_report()
    page.locator(".card").nth(2).wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.title() == ATTACK
    assert page.locator("#scores + .table-panel thead th").nth(2).text_content() == ATTACK
    assert page.locator("script").count() == 2


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(open_report, width):
    page = open_report(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path):
    run = write_evaluation(tmp_path / "run", "=1+1", ["a", "b", "c"], tmp_path)
    report.main([str(run), "--output", str(tmp_path / "report.html")])
    with (tmp_path / "report.csv").open(encoding="utf-8-sig") as file:
        assert next(csv.reader(file)) == ["", "'=1+1"]
