"""A run can be reported to each tracker: its curves and its run record are in the run's own folder, and no secret."""

import contextlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
from conftest import ROOT, train_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from meme_llava.errors import UserError
from meme_llava.pipeline import precheck
from meme_llava.train import run_plan, trackers
from meme_llava.train.trackers import TrackerRuns, check_trackers

RATES = ("train/learning_rate/vision_tower", "train/learning_rate/multi_modal_projector")
# What a user may have set, and one process of the tests leaves behind for the next test.
VARIABLES = ("WANDB_", "SWANLAB_", "MLFLOW_", "TENSORBOARD_")


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)


def train_apart(world, output_dir, tracker: str, folder, **variables) -> str:
    """Train in a process and a working directory of its own; what it printed."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed; configs/requirements/trackers.txt has it")
    folder.mkdir()
    validation = folder.with_suffix(".json")
    validation.write_text(json.dumps(world.records[:2]))
    evaluation = {"eval_every": 2, "eval_annotations": validation, "eval_image_folder": world.image_folder}
    evaluation |= {"eval_images": 1, "eval_max_new_tokens": 4}
    flags = train_flags(
        world, output_dir, report_to=["tensorboard", tracker], max_steps=2, run_name="a name", **evaluation
    )
    keys = {"WANDB_API_KEY": "CANARY" * 7, "SWANLAB_API_KEY": "CANARY" * 4, "HF_TOKEN": "CANARY_TOKEN"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **keys, **variables}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    # Nothing lies where the user works, and no key in what was written or said.
    assert list(folder.iterdir()) == []
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert [path for path in files if b"CANARY" in path.read_bytes()] == []
    assert "CANARY" not in result.stdout + result.stderr
    return result.stdout


def fail(capsys, flags, main=train.main) -> str:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def read_events(output_dir) -> EventAccumulator:
    events = EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


def read_text(events: EventAccumulator, name: str) -> str:
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_tensorboard_shows_rates_losses_and_the_run_record(world, tmp_path):
    out = tmp_path / "out"
    train.main(train_flags(world, out, report_to="tensorboard", max_steps=2))
    events = read_events(out)
    for name in (*RATES, "train/loss"):
        assert [event.step for event in events.Scalars(name)] == [1, 2]
    assert [event.value for event in events.Scalars(RATES[1])] == pytest.approx([1e-2, 5e-3])
    lines = read_text(events, "run_record").splitlines()
    # A code block: nothing in it is taken for markup.
    assert all(line.startswith("    ") for line in lines)
    record = json.loads("\n".join(lines))
    assert record["settings"]["high_lr"] == 1e-2 and record["parameter_groups"][0]["role"] == "vision_tower"


def test_a_user_may_put_the_events_elsewhere(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train.main(train_flags(world, tmp_path / "out", report_to="tensorboard", max_steps=1))
    assert list((tmp_path / "events").iterdir()) and not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.long
def test_wandb_offline(world, tmp_path):
    out = tmp_path / "out"
    train_apart(world, out, "wandb", tmp_path / "here", WANDB_MODE="offline")
    (run,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for words in (*RATES, "train/loss", "eval/loss", "run_record", "parameter_groups", "a name", "meme-llava"):
        assert words.encode() in content, words
    events = read_events(out)
    assert events.Scalars("train/loss")
    # Images go to TensorBoard only.
    (image,) = events.Images("answers/1")
    assert (image.step, image.width, image.height) == (2, 40, 30)
    assert "p0.png" in read_text(events, "answers/1")


@pytest.mark.long
def test_swanlab_offline(world, tmp_path):
    out = tmp_path / "out"
    train_apart(world, out, "swanlab", tmp_path / "here", SWANLAB_MODE="offline")
    (run,) = (out / "swanlog").glob("run-*")
    content = next(run.glob("*.swanlab")).read_bytes()
    for words in (*RATES, "train/loss", "eval/loss", "a name", "meme-llava"):
        assert words.encode() in content, words
    assert "parameter_groups" in (run / "files" / "config.yaml").read_text()


@pytest.mark.long
def test_mlflow_in_a_file(world, tmp_path):
    out = tmp_path / "out"
    train_apart(world, out, "mlflow", tmp_path / "here")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("meme-llava")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a name", "FINISHED")
    assert run.data.params["run_record.high_lr"] == "0.01" and run.data.params["run_record.schedule.steps"] == "2"
    history = client.get_metric_history(run.info.run_id, RATES[1])
    assert [(entry.step, entry.value) for entry in history] == [(1, 1e-2), (2, pytest.approx(5e-3))]
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert len(client.get_metric_history(run.info.run_id, "eval/loss")) == 1


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        (["tensorbord"], "--report_to tensorbord: no such tracker; there are tensorboard, wandb, swanlab, mlflow, or"),
        (["all"], "--report_to all: no such tracker"),
        (["none", "tensorboard"], "expected each tracker once, or none alone"),
        (["tensorboard", "tensorboard"], "expected each tracker once, or none alone"),
    ],
)
def test_a_wrong_tracker_stops_before_data_is_read(world, tmp_path, capsys, monkeypatch, report_to, message):
    monkeypatch.setattr(run_plan, "load_records", lambda *_: pytest.fail("the data was read"))
    monkeypatch.setattr(precheck, "check_records", lambda *_, **__: pytest.fail("the data was read"))
    flags = train_flags(world, tmp_path / "out", report_to=report_to)
    assert message in fail(capsys, flags)
    assert message in fail(capsys, flags, precheck.main)


@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_that_is_not_installed_stops_before_data_is_read(world, tmp_path, capsys, monkeypatch, tracker):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == tracker else find(name, *a))
    flags = train_flags(world, tmp_path / "out", report_to=tracker)
    monkeypatch.setattr(run_plan, "load_records", lambda *_: pytest.fail("the data was read"))
    monkeypatch.setattr(precheck, "check_records", lambda *_, **__: pytest.fail("the data was read"))
    expected = f"--report_to {tracker}: the package {tracker} is not installed; pip install -r configs/requirements/tra"
    assert expected in fail(capsys, flags)
    assert expected in fail(capsys, flags, precheck.main)


@pytest.mark.long
@pytest.mark.parametrize(
    ("tracker", "remedy"),
    [
        ("wandb", "wandb login, or set WANDB_MODE=offline"),
        ("swanlab", "or set SWANLAB_MODE=offline"),
    ],
)
def test_without_a_login_nothing_waits_for_an_answer(tmp_path, tracker, remedy):
    """In a process of its own, on a terminal at which nobody sits, with a home in which nobody logged in."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed; configs/requirements/trackers.txt has it")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        variables = {"HOME": str(tmp_path), "WANDB_BASE_URL": address, "SWANLAB_API_HOST": address}
        said = check_apart(tmp_path, tracker, variables)
        server.shutdown()
    assert remedy in said and f"--report_to {tracker}: " in said


@pytest.mark.long
@pytest.mark.parametrize(
    ("tracker", "variables"),
    [
        ("wandb", {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
        ("swanlab", {"SWANLAB_API_KEY": "a" * 21, "SWANLAB_API_HOST": "http://127.0.0.1:9"}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://user:word@127.0.0.1:9"}),
    ],
)
def test_a_server_that_does_not_answer_is_named(tmp_path, tracker, variables):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed; configs/requirements/trackers.txt has it")
    said = check_apart(tmp_path, tracker, variables)
    assert f"--report_to {tracker}: http://127.0.0.1:9 does not answer" in said and "Connection refused" in said
    assert "word" not in said and "aaaa" not in said


def check_apart(folder, tracker: str, variables: dict) -> str:
    """The error of `check_trackers` in a process of its own."""
    code = f"from meme_llava.train.trackers import check_trackers; check_trackers([{tracker!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    terminal, keyboard = os.openpty()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdin=keyboard, stderr=subprocess.PIPE, timeout=60
    )
    os.close(terminal)
    os.close(keyboard)
    assert result.returncode == 1
    return result.stderr.decode().splitlines()[-1]


def test_offline_asks_for_no_login_and_no_server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    installed = [name for name in ("wandb", "swanlab", "mlflow") if importlib.util.find_spec(name)]
    check_trackers(["tensorboard", *installed])
    assert list(tmp_path.iterdir()) == []


def test_curves_of_a_run_that_skipped_every_step_need_no_legend(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.draw_training_curves([{"step": 1, "skipped_steps": 1}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_the_time_left_is_known_after_three_steps(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_LINES", 0)
    bar = trackers.ProgressBar(4, 9)
    figures = {"loss": 1.0, "captions_per_second": 2.0, "tokens_per_second": 300.0, "data_wait_share": 0.0}
    for step in range(5, 10):
        bar.show(step, figures)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(" left") for line in lines] == [False, False, True, True, True]
    assert lines[0] == "step 5/9  loss 1.0000  2.0 captions/s, 300 tokens/s, waiting for data 0%"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, None),
        ({"HTTP_PROXY": "socks5h://127.0.0.1:9"}, None),
        ({"HTTP_PROXY": "http://127.0.0.1:9"}, "does not answer"),
        ({"ALL_PROXY": "socks://127.0.0.1:9"}, "write socks5://127.0.0.1:9"),
    ],
)
def test_behind_a_socks_proxy_the_trackers_own_library_looks(monkeypatch, variables, message):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # socksio is installed
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        trackers._check_reachable("mlflow", "http://example.invalid", "set another")


def test_a_tracker_that_fails_while_the_model_trains_is_named():
    def fail(*given, **options):
        raise ConnectionError("the server is gone")

    runs = TrackerRuns({"mlflow": SimpleNamespace(log=fail)})
    with pytest.raises(
        UserError, match=r"--report_to mlflow: cannot be used here \(the server is gone\); check MLFLOW"
    ):
        runs.log({"loss": 1.0}, step=1)
