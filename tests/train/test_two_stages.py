"""The second stage begins with the projector that the first one trained, and with no other."""

import json
import os
import shlex
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, train_flags
from launching import run_sh as run
from safetensors.torch import load_file

import train

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
NO_LEARNING = 1e-30  # a learning rate by which no float32 weight changes


@pytest.fixture(scope="module")
def projector_run(world):
    """Two steps of the projector alone."""
    output_dir = world.folder / "projector"
    train.main(train_flags(world, output_dir, train_type="projector", max_steps=2))
    return output_dir


def read_projector(path):
    """{name within the projector: tensor} of a file of trained weights or of a base."""
    tensors = load_file(path)
    return {
        name.rpartition("multi_modal_projector.")[2]: tensor.float()
        for name, tensor in tensors.items()
        if "multi_modal_projector." in name
    }


def assert_same(first, second):
    assert set(first) == set(second) == {f"linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_lora_begins_with_the_projector_of_the_first_stage(world, projector_run, tmp_path):
    flags = {"high_lr": NO_LEARNING, "max_steps": 1, "projector_from": projector_run}
    train.main(train_flags(world, tmp_path / "lora", **flags))
    first = read_projector(projector_run / "trained_weights.safetensors")
    assert not torch.equal(
        first["linear_1.weight"], read_projector(world.base / "model.safetensors")["linear_1.weight"]
    )
    assert_same(read_projector(tmp_path / "lora" / "adapter_model.safetensors"), first)
    record = json.loads((tmp_path / "lora" / "run_record.json").read_text())["projector"]
    assert record["folder"] == str(projector_run)
    assert record["run_record"]["settings"]["train_type"] == "projector"


def test_the_projector_of_a_lora_run_serves_as_well(world, trained, tmp_path):
    flags = {"high_lr": NO_LEARNING, "max_steps": 1, "projector_from": trained, "train_type": "projector"}
    train.main(train_flags(world, tmp_path / "out", **flags))
    assert_same(
        read_projector(tmp_path / "out" / "trained_weights.safetensors"),
        read_projector(trained / "adapter_model.safetensors"),
    )


def test_a_projector_of_another_base_is_refused(world, projector_run, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / "run_record.json").unlink()  # it would say that this is damage
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit) as stop:
        train.main(train_flags(world, tmp_path / "out", model=base, projector_from=projector_run))
    assert stop.value.code == 4
    assert f"--projector_from {projector_run}: was trained on another base ({world.base})" in capsys.readouterr().err


def test_the_first_stage_may_move_but_not_be_another_one_when_the_second_goes_on(
    world, projector_run, trained, tmp_path, capsys
):
    out, moved = tmp_path / "out", tmp_path / "moved"
    train.main(train_flags(world, out, max_steps=2, save_steps=1, projector_from=projector_run))
    shutil.copytree(projector_run, moved)
    changes = {"max_steps": 2, "resume_from_checkpoint": out / "checkpoint-1"}
    with pytest.raises(SystemExit) as stop:
        train.main(train_flags(world, out, projector_from=trained, **changes))
    assert stop.value.code == 4
    assert "the projector of --projector_from is another one. Restore what" in capsys.readouterr().err
    train.main(train_flags(world, out, projector_from=moved, **changes))
    record = json.loads((out / "run_record.json").read_text())
    assert (record["step"], record["projector"]["folder"]) == (2, str(moved))


def test_what_is_no_run_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(train_flags(world, tmp_path / "out", projector_from=world.base))
    assert stop.value.code == 2
    assert "expected an output_dir or checkpoint of train.py" in capsys.readouterr().err


@pytest.mark.long
def test_run_sh_runs_both_stages(world, tmp_path):
    variables = {
        **{"VENV": "active", "GPUS": "cpu", "BASE_DIR": world.base, "OUTPUT_DIR": tmp_path, "EVAL_ANNOTATIONS": "none"},
        **{"ANNOTATIONS": world.annotations, "IMAGE_FOLDER": world.image_folder, "MODEL_MAX_LENGTH": 200},
        **{"PROJECTOR_EPOCHS": 1, "PROJECTOR_LR": "1e-2", "EPOCHS": 1, "GLOBAL_BATCH": 4, "DEVICE_BATCH": 4},
    }
    variables = {name: str(value) for name, value in variables.items()}
    result = run("train", **variables)
    assert result.returncode == 0, result.stderr
    records = [json.loads((tmp_path / name / "run_record.json").read_text()) for name in ("projector", "train")]
    assert [record["settings"]["train_type"] for record in records] == ["projector", "lora"]
    assert [record["settings"]["high_lr"] for record in records] == [1e-2, 2e-3]
    assert records[1]["projector"]["folder"] == str(tmp_path / "projector")
    noted = (tmp_path / "projector.command").read_text()
    again = run("train", **variables)
    assert again.stdout.count("finished already: ") == 2
    assert result.stdout.count(f"=== 1 of 2: train {tmp_path}/projector ===") == 1
    # What is gone would be trained anew, only to find that the second stage began with another one.
    (tmp_path / "projector.command").unlink()
    lost = run("train", **variables)
    assert lost.returncode == 2 and "/projector, from which it would start, is not there" in lost.stderr
    (tmp_path / "projector.command").write_text(noted)
    # Another first stage would make another second one.
    changed = run("train", **variables | {"PROJECTOR_LR": "2e-2"})
    assert changed.returncode == 2
    assert f"{tmp_path}/projector was made from other settings" in changed.stderr


def test_a_flag_that_would_change_the_first_stage_too_is_refused():
    result = run("train", "--high-lr", "1", PROJECTOR_EPOCHS="1", GPUS="cpu", DRY_RUN="1")
    assert result.returncode == 2
    assert "error: --high_lr counts for both stages of PROJECTOR_EPOCHS=1" in result.stderr


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_is_run(path):
    """What YAML reads is what the commands get; HIGH_LR is set for this run, so it comes first."""
    preset = yaml.safe_load(path.read_text())
    result = run(PRESET=path.stem, HIGH_LR="7e-4", GPUS="cpu", DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    build, *training = [line for line in result.stdout.splitlines() if "build_base" in line or "train.py" in line]
    assert f"--language_model {preset['LANGUAGE_MODEL']} --vision_model {preset['VISION_MODEL']} " in build
    assert len(training) == (2 if "PROJECTOR_EPOCHS" in preset else 1)
    words = training[-1].split()
    settings = dict(zip(words[words.index("train.py") + 1 :: 2], words[words.index("train.py") + 2 :: 2], strict=True))
    flags = {
        "--low_lr": "LOW_LR",
        "--num_train_epochs": "EPOCHS",
        "--lora_r": "LORA_R",
        "--lora_alpha": "LORA_ALPHA",
        "--warmup_ratio": "WARMUP_RATIO",
        "--model_max_length": "MODEL_MAX_LENGTH",
        "--global_batch_size": "GLOBAL_BATCH",
    }
    assert settings["--high_lr"] == "7e-4"
    # YAML 1.1 takes 1e-3 for a string, and so do we.
    assert {flag: settings[flag] for flag in flags} == {flag: str(preset[name]) for flag, name in flags.items()}


@pytest.mark.long
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_can_be_planned(world, tmp_path, capsys, path):
    """On the tiny base: the numbers are the preset's, the towers are not."""
    variables = {"BASE_DIR": world.base, "OUTPUT_DIR": tmp_path / "out", "EVAL_ANNOTATIONS": "none", "GPUS": "8"}
    variables |= {"ANNOTATIONS": world.annotations, "IMAGE_FOLDER": world.image_folder, "DRY_RUN": "1"}
    variables = {name: str(value) for name, value in variables.items()}
    planned = run("train", "--plan", "--accelerator", "a800-80gb", PRESET=path.stem, **variables)
    assert planned.returncode == 0, planned.stderr
    words = shlex.split(planned.stdout.splitlines()[-1])
    train.main(words[words.index("train.py") + 1 :])
    assert "a800-80gb" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("EPOCHS: 5\nEPOCH: 3\n", "line 2 sets EPOCH, which is no setting of run.sh"),
        ("EPOCHS = 5\n", "line 1 is 'EPOCHS = 5', expected NAME: value"),
        ("EPOCHS: 5 # passes\n", "line 1 is 'EPOCHS: 5 # passes', expected NAME: value"),
    ],
)
def test_a_broken_preset_is_refused(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    result = run(PRESET=os.path.relpath(tmp_path / "mine", ROOT / "configs" / "presets"), DRY_RUN="1")
    assert result.returncode == 2
    assert message in result.stderr


def test_an_unknown_preset_is_refused():
    result = run(PRESET="v3", DRY_RUN="1")
    assert result.returncode == 2
    assert (
        "PRESET is 'v3', expected one of chinese_clip_huge one_24gb_card openai_clip two_stages v1 v2, or nothing"
        in result.stderr
    )


def test_two_first_stages_are_refused():
    result = run(PROJECTOR_EPOCHS="1", TRAIN_TYPE="projector", DRY_RUN="1")
    assert result.returncode == 2
    assert "set PROJECTOR_EPOCHS=0" in result.stderr
