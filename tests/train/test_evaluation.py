"""While it trains, a model is asked about images it is not trained on; what it learns is the same to the last bit."""

import json
import os
import signal
import time
import traceback

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import encode_example, read_losses, train_flags
from launching import run, weights_equal
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

import train
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.images import open_image
from meme_llava.dataset.records import read_records
from meme_llava.distributed.environment import Heartbeat
from meme_llava.inference.generation import Answerer, load_answerer
from meme_llava.inference.questions import Prediction, Question
from meme_llava.pipeline import precheck
from meme_llava.train import prepared_run, trackers
from meme_llava.train.evaluation import TrainingEvaluation, choose_shown

QUESTION = "读出文字。"
# Truths are the texts of the images; one record is text only and carries loss alone.
VALIDATION = (("p0.png", "我太难了"), ("p4.png", "今天也要加油鸭"), (None, "好的"), ("p1.png", "好耶"))
# Dropout is on, a step takes two rounds, and the last step is not a multiple of two.
RECIPE = {"max_steps": 5, "save_steps": 2, "save_total_limit": 3, "lora_dropout": 0.1, "device_batch_size": 2}
STEPS = [2, 4, 5]


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    records = []
    for number, (image, text) in enumerate(VALIDATION):
        question = f"<image>\n{QUESTION}" if image else "你好"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        records.append({"id": f"v{number}", "conversations": turns})
        if image:
            records[-1] |= {"image": image, "text": text}
    path = tmp_path_factory.mktemp("validation") / "validation.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def eval_settings(world, validation, **changes) -> dict:
    return {
        "eval_every": 2,
        "eval_annotations": validation,
        "eval_image_folder": world.image_folder,
        "eval_images": 2,
        "eval_max_new_tokens": 12,
        **changes,
    }


@pytest.fixture(scope="module")
def evaluated(world, validation, tmp_path_factory):
    """One process, evaluated after steps 2, 4 and 5."""
    output_dir = tmp_path_factory.mktemp("evaluated") / "out"
    train.main(train_flags(world, output_dir, report_to="tensorboard", **RECIPE, **eval_settings(world, validation)))
    return output_dir


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The same run without evaluation."""
    output_dir = tmp_path_factory.mktemp("plain") / "out"
    train.main(train_flags(world, output_dir, **RECIPE))
    return output_dir


def read_evaluations(output_dir) -> list[dict]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def read_answers(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def fail(capsys, flags, main=train.main, code=2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == code
    return capsys.readouterr().err


def test_training_is_the_same_to_the_last_bit(evaluated, plain):
    assert weights_equal(evaluated, plain)
    assert read_losses(evaluated) == read_losses(plain)
    assert not (plain / "answers.jsonl").exists() and read_evaluations(plain) == []


def test_answers_are_those_of_the_checkpoint_of_that_step(world, evaluated):
    answers = read_answers(evaluated)
    images = [str(world.image_folder / name) for name in ("p0.png", "p4.png")]
    assert [(one["step"], one["image"]) for one in answers] == [(step, image) for step in STEPS for image in images]
    assert [(one["question"], one["reference"]) for one in answers[:2]] == [
        (QUESTION, "我太难了"),
        (QUESTION, "今天也要加油鸭"),
    ]
    for step in STEPS:
        answerer = load_answerer(evaluated / f"checkpoint-{step}", device="cpu", dtype="float32")
        for one in answers:
            if one["step"] == step:
                found = answerer.answer(open_image(world.image_folder / one["image"]), QUESTION, max_new_tokens=12)
                assert (one["answer"], one["stopped"]) == (found.text, found.stopped)
    # The model moved, so that answers of another step would not have passed.
    assert answers[0]["answer"] != answers[-2]["answer"]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "full"},
        pytest.param({"train_type": "projector"}, marks=pytest.mark.long),
        pytest.param({"train_type": "full"}, marks=pytest.mark.long),
    ],
)
def test_so_it_is_however_a_step_is_computed(world, validation, tmp_path, changes):
    settings = eval_settings(world, validation)
    train.main(train_flags(world, tmp_path / "with", **RECIPE, **settings, **changes))
    train.main(train_flags(world, tmp_path / "without", **RECIPE, **changes))
    name = "adapter_model" if "train_type" not in changes else "trained_weights"
    ours, theirs = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    answerer = load_answerer(tmp_path / "with", device="cpu", dtype="float32")
    for one in read_answers(tmp_path / "with")[-2:]:
        found = answerer.answer(open_image(world.image_folder / one["image"]), QUESTION, max_new_tokens=12)
        assert one["answer"] == found.text


def test_the_validation_loss_is_the_mean_over_tokens_of_the_checkpoint_of_that_step(world, validation, evaluated):
    """Each record alone through transformers' own LLaVA, every supervised token weighing the same."""
    answerer = load_answerer(evaluated / "checkpoint-4", device="cpu", dtype="float32")
    encoder, policy = answerer.processing.encoder, answerer.processing.image_policy
    total, count = 0.0, 0
    for record in read_records(validation)[0]:
        example = encode_example(encoder, list(record.turns), 200)
        images = [to_pixel_values(open_image(world.image_folder / image), policy) for image in record.images]
        with torch.no_grad():
            logits = answerer.model(
                input_ids=torch.tensor([example.input_ids]),
                pixel_values=torch.stack(images) if images else None,
            ).logits[0]  # (length, vocabulary)
        labels = torch.tensor(example.labels[1:])
        total += functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
        count += int((labels != -100).sum())
    (found,) = [entry["eval_loss"] for entry in read_evaluations(evaluated) if entry["step"] == 4]
    assert found == pytest.approx(total / count, abs=1e-5)


def test_scores_are_those_of_all_answers(world, validation, tmp_path, monkeypatch):
    """Four characters with one missing, seven of which all are wrong, two right: (1 + 7) of 13."""
    said = {"p0.png": "我太难", "p4.png": "天气真好啊啊啊", "p1.png": "好耶"}

    def answer_together(self, questions, max_new_tokens):
        return [Prediction(question, said[question.image.name], 2, True) for question in questions]

    monkeypatch.setattr(Answerer, "answer_together", answer_together)
    settings = eval_settings(world, validation, eval_every=1)
    train.main(train_flags(world, tmp_path / "out", max_steps=1, **settings))
    (figures,) = read_evaluations(tmp_path / "out")
    assert figures["eval_character_error_rate"] == pytest.approx((1 + 7) / 13)
    assert figures["eval_texts_right"] == pytest.approx(1 / 3)
    assert (figures["eval_stopped"], figures["eval_tokens"], figures["step"]) == (1.0, 2.0, 1)


def test_everything_is_on_the_terminal_and_in_the_tracker(world, validation, evaluated, tmp_path, capsys):
    settings = eval_settings(world, validation, eval_every=5)
    train.main(train_flags(world, tmp_path / "out", **RECIPE, **settings))
    printed = capsys.readouterr().out
    assert "Answers after step 5" in printed and "p4.png" in printed and "今天也要加油鸭" in printed
    assert "validation loss " in printed and "; 4 records, 3 questions, " in printed
    events = EventAccumulator(str(evaluated / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == STEPS
    assert [event.step for event in events.Scalars("eval/character_error_rate")] == STEPS
    images = events.Images("answers/2")
    assert [(event.step, event.width, event.height) for event in images] == [(step, 40, 30) for step in STEPS]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("answers/2/text_summary")]
    answers = [one["answer"] for one in read_answers(evaluated) if one["image"].endswith("p4.png")]
    assert all(f"    answer: {answer.splitlines()[0]}" in text for text, answer in zip(texts, answers, strict=True))
    assert all("    reference: 今天也要加油鸭\n" in text for text in texts)


def test_the_run_record_names_the_validation_records(validation, evaluated):
    record = json.loads((evaluated / "run_record.json").read_text())
    assert record["settings"]["eval_every"] == 2
    evaluation = record["evaluation"]
    assert (evaluation["annotations"], evaluation["records"], evaluation["questions"]) == (str(validation), 4, 3)
    assert len(evaluation["sha256"]) == 64


def test_what_is_trained_on_is_counted(world, validation, tmp_path, capsys):
    """Of three questions about three images all images are trained on, and after a change the answer to one of them."""
    records = json.loads(validation.read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = world.records[0]["conversations"][1]["value"]
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    train.main(train_flags(world, tmp_path / "out", max_steps=1, **eval_settings(world, path)))
    assert f"warning: 3 of 3 images of {path} are trained on, 1 of 3 answers too; leave" in capsys.readouterr().err
    evaluation = json.loads((tmp_path / "out" / "run_record.json").read_text())["evaluation"]
    assert (evaluation["images_trained_on"], evaluation["answers_trained_on"]) == (3, 1)


def test_a_copy_of_what_trains_is_no_validation(world, tmp_path, capsys):
    path = tmp_path / "copy.json"
    path.write_bytes(world.annotations.read_bytes())
    flags = train_flags(world, tmp_path / "out", **eval_settings(world, path))
    for main in (train.main, precheck.main):
        error = fail(capsys, flags, main)
        assert f"--eval_annotations {path}: holds the records that are trained on ({world.annotations})" in error


def test_the_curves_show_the_validation_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    log = [{"step": step, "loss": 3.0 - step, "learning_rate/projector": 0.1} for step in (1, 2)]
    trackers.draw_training_curves([*log, {"step": 2, "eval_loss": 1.5}], tmp_path / "curves.png")
    lines = {line.get_label(): line for line in plt.gcf().axes[0].get_lines()}
    assert lines["training"].get_xydata().tolist() == [[1, 2], [2, 1]]
    assert lines["validation"].get_xydata().tolist() == [[2, 1.5]]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload"])
def test_several_processes_find_what_one_finds(world, validation, tmp_path, engine):
    """Three questions for two processes: in the last round one has none left, and answers all the same."""
    recipe = {**RECIPE, "lora_dropout": 0, "device_batch_size": 1}
    settings = eval_settings(world, validation, eval_images=3)
    train.main(train_flags(world, tmp_path / "one", **recipe, **settings))
    result = run(world, tmp_path / "two", 2, engine=engine, **recipe, **settings)
    assert result.code == 0, result.output
    assert run(world, tmp_path / "plain", 2, engine=engine, **recipe).code == 0
    assert weights_equal(tmp_path / "two", tmp_path / "plain")
    assert read_answers(tmp_path / "two") == read_answers(tmp_path / "one")
    ours, theirs = read_evaluations(tmp_path / "two"), read_evaluations(tmp_path / "one")
    assert [entry["step"] for entry in ours] == STEPS
    assert [entry["eval_loss"] for entry in ours] == pytest.approx([entry["eval_loss"] for entry in theirs], abs=1e-5)
    assert [entry["eval_character_error_rate"] for entry in ours] == [
        entry["eval_character_error_rate"] for entry in theirs
    ]
    assert result.output.count("Answers after step 2") == 1


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_in_bf16_weights_are_the_same_too(world, validation, tmp_path, engine, train_type):
    bf16 = [{"kind": "compute_in_bf16"}]
    settings = eval_settings(world, validation)
    changes = {**RECIPE, "engine": engine, "train_type": train_type}
    result = run(world, tmp_path / "with", 2, bf16, **changes, **settings)
    assert result.code == 0, result.output
    assert run(world, tmp_path / "without", 2, bf16, **changes).code == 0
    name = "adapter_model" if train_type == "lora" else "trained_weights"
    ours, theirs = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(read_answers(tmp_path / "with")) == 2 * len(STEPS)


def test_a_signal_in_an_evaluation_saves_at_once_and_it_is_made_up_for(
    world, validation, evaluated, tmp_path, monkeypatch, capsys
):
    ask = TrainingEvaluation._ask
    flags = train_flags(world, tmp_path / "out", **RECIPE, **eval_settings(world, validation))

    def ask_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return ask(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingEvaluation, "_ask", ask_and_stop)
        assert "stopped: by SIGTERM after step 2 of 5" in fail(capsys, flags, code=75)
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    train.main([*flags, "--resume_from_checkpoint", "latest"])
    assert weights_equal(tmp_path / "out", evaluated)
    assert read_answers(tmp_path / "out") == read_answers(evaluated)
    assert read_evaluations(tmp_path / "out") == read_evaluations(evaluated)


def test_a_signal_in_the_last_evaluation_leaves_a_finished_run_that_says_what_is_missing(
    world, validation, tmp_path, monkeypatch, capsys
):
    ask = TrainingEvaluation._ask
    monkeypatch.setattr(TrainingEvaluation, "_ask", lambda self: os.kill(os.getpid(), signal.SIGTERM) or ask(self))
    settings = eval_settings(world, validation)
    train.main(train_flags(world, tmp_path / "out", **RECIPE | {"max_steps": 2}, **settings))
    said = "training is finished, but SIGTERM came before the end of its last evaluation, which is missing"
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run_record.json").read_text())["finished"] is True
    assert read_evaluations(tmp_path / "out") == []


def test_a_signal_before_the_first_step_from_a_checkpoint_elsewhere_names_that(
    world, validation, plain, tmp_path, monkeypatch, capsys
):
    ask, checkpoint = TrainingEvaluation._ask, plain / "checkpoint-2"
    monkeypatch.setattr(TrainingEvaluation, "_ask", lambda self: os.kill(os.getpid(), signal.SIGTERM) or ask(self))
    settings = RECIPE | eval_settings(world, validation) | {"resume_from_checkpoint": checkpoint}
    error = fail(capsys, train_flags(world, tmp_path / "out", **settings), code=75)
    assert f"by SIGTERM after step 2 of 5; {checkpoint} is whole" in error


def test_a_run_that_goes_on_keeps_the_answers_up_to_its_checkpoint(world, validation, evaluated, tmp_path, capsys):
    flags = train_flags(world, tmp_path / "out", **RECIPE, **eval_settings(world, validation))
    train.main([*flags, "--max_steps", "4"])
    answers = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8")
    # Evaluation may change on the way; training goes on all the same.
    (tmp_path / "out" / "answers.jsonl").write_text(answers + answers.splitlines()[0].replace('"step": 2', '"step": 9'))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    changed = ["--allow_changes", "--eval_every", "3", "--eval_images", "1"]
    train.main([*flags, *changed, "--max_steps", "5", "--resume_from_checkpoint", str(checkpoint)])
    assert [one["step"] for one in read_answers(tmp_path / "out")] == [2, 2, 3, 5]


@pytest.mark.long
def test_a_long_evaluation_is_no_hang_and_no_slow_training(world, validation, tmp_path, monkeypatch):
    """It takes three seconds more than the four steps of a log line, which do not take that long."""
    ask, marks = TrainingEvaluation._ask, []
    monkeypatch.setattr(TrainingEvaluation, "_ask", lambda *arguments: time.sleep(3) or ask(*arguments))
    monkeypatch.setattr(Heartbeat, "beat", lambda self: marks.append(traceback.extract_stack(limit=2)[0].name))
    settings = eval_settings(world, validation)
    train.main(train_flags(world, tmp_path / "out", **RECIPE | {"max_steps": 4}, logging_steps=4, **settings))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    (rate,) = [entry["captions_per_second"] for entry in log if "captions_per_second" in entry]
    assert 16 / rate < 3
    # Two evaluations of two batches of questions, each of twelve tokens.
    assert marks.count("mark_token") == 2 * 2 * 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_annotations": None}, "--eval_every needs --eval_annotations, which is not there"),
        ({"eval_image_folder": None}, "--eval_every needs --eval_image_folder, which is not there"),
        ({"eval_every": None}, "--eval_annotations belongs to --eval_every, which is not there"),
        ({"eval_annotations": "gone.json"}, "gone.json"),
        ({"eval_image_folder": "/nowhere"}, "/nowhere: no such image folder"),
        ({"eval_image_folder": "."}, "3 of 4 records cannot be trained on"),
    ],
)
def test_what_cannot_be_evaluated_stops_before_the_model_is_loaded(
    world, validation, tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.setattr(prepared_run, "load_packed_llava", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    flags = train_flags(world, tmp_path / "out", **eval_settings(world, validation, **changes))
    assert message in fail(capsys, flags)
    assert message in fail(capsys, flags, precheck.main)
    assert not (tmp_path / "out").exists()


def test_an_image_damaged_behind_its_header_is_found_before_training(world, validation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared_run, "load_packed_llava", lambda *_: pytest.fail("the model was loaded"))
    for name in ("p0.png", "p1.png", "p4.png"):
        (tmp_path / name).write_bytes((world.image_folder / name).read_bytes())
    (tmp_path / "p4.png").write_bytes((tmp_path / "p4.png").read_bytes()[:-40])
    settings = eval_settings(world, validation, eval_image_folder=tmp_path)
    message = fail(capsys, train_flags(world, tmp_path / "out", **settings))
    assert "--eval_annotations" in message and "validation.json record 1 (id 'v1'): " in message


def test_records_without_an_image_leave_nothing_to_ask(world, tmp_path, capsys):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([world.records[3]], ensure_ascii=False))
    flags = train_flags(world, tmp_path / "out", **eval_settings(world, path))
    assert "none of 1 record begins with <image>, a line break and a question" in fail(capsys, flags)


def test_a_limit_takes_the_first_records(world, validation, tmp_path):
    settings = eval_settings(world, validation, eval_limit=2, eval_every=1)
    train.main(train_flags(world, tmp_path / "out", max_steps=1, **settings))
    evaluation = json.loads((tmp_path / "out" / "run_record.json").read_text())["evaluation"]
    assert (evaluation["records"], evaluation["questions"]) == (2, 2)


def test_shown_images_are_spread_evenly_and_differ():
    questions = [Question(image, "") for image in "aabbbccd"]
    assert choose_shown(questions, 2) == [0, 5]
    assert choose_shown(questions, 9) == [0, 2, 5, 7]
    assert choose_shown(questions, 0) == []
