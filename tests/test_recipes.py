"""benchmarks/recipes.py: the commands of each variant, and the table and curves that come of finished runs."""

import json

import pytest
import recipes  # noqa: E402
from conftest import ROOT
from PIL import Image

from meme_llava.errors import UserError  # noqa: E402
from meme_llava.train.settings import parse_train_arguments  # noqa: E402


def list_differences(name, tmp_path):
    command, evaluation = recipes.list_commands(name, 1, "bf16", tmp_path)
    assert evaluation.words[1:4] == ["evaluate.py", "--model", str(tmp_path / f"{name}_1" / "merged")]
    variables = {
        **{"VENV": "active", "GPUS": "cpu", "EPOCHS": str(recipes.EPOCHS)},
        **{"BASE_DIR": str(tmp_path / "base_1"), "OUTPUT_DIR": str(tmp_path / f"{name}_1")},
    }
    assert variables.items() <= command.variables.items()
    assert command.words[:4] == ["bash", "run.sh", "train", "merge"]
    assert command.words[-4:] == ["--precision", "bf16", "--seed", "1"]
    return {key: command.variables[key] for key in command.variables.keys() - variables.keys()}, command.words[4:-4]


@pytest.mark.parametrize(
    ("name", "variables", "flags"),
    [
        ("default", {}, []),
        ("all_low", {"HIGH_LR": recipes.LOW}, []),
        ("all_high", {"LOW_LR": recipes.HIGH}, []),
        ("all_middle", {"HIGH_LR": recipes.MIDDLE, "LOW_LR": recipes.MIDDLE}, []),
        ("low_lora", {"LOW_LR": "2e-4"}, []),
        ("lowest_lora", {"LOW_LR": "4e-5"}, []),
        ("no_warmup", {"WARMUP_RATIO": "0"}, []),
        ("projector_only", {"TRAIN_TYPE": "projector"}, []),
        ("vision_qkv", {}, ["--lora_vision_modules", "q_proj", "k_proj", "v_proj"]),
        ("no_vision_lora", {}, ["--vision_tower_training", "frozen"]),
    ],
)
def test_a_variant_differs_from_the_default_in_one_thing(tmp_path, name, variables, flags):
    assert list_differences(name, tmp_path) == (variables, flags)


def test_rates_and_passes_of_the_default_are_those_of_run_sh():
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    for name, value in (("HIGH_LR", recipes.HIGH), ("LOW_LR", recipes.LOW), ("EPOCHS", recipes.EPOCHS)):
        assert f"{name}=${{{name}:-{value}}}" in script


def test_two_stages_see_the_records_as_often_as_one(tmp_path):
    training, _ = recipes.list_commands("two_stages", 2, "fp32", tmp_path)
    assert int(training.variables["PROJECTOR_EPOCHS"]) + int(training.variables["EPOCHS"]) == recipes.EPOCHS
    assert training.variables["PROJECTOR_LR"] == recipes.HIGH
    assert "TRAIN_TYPE" not in training.variables


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_flag_is_one_that_training_takes(name, tmp_path):
    recipe = recipes.RECIPES[name]
    flags = {
        **{"model": "m", "annotations": "a", "image_folder": "i", "output_dir": "o"},
        **{"num_train_epochs": 1, "lora_r": 1, "lora_alpha": 1, "warmup_ratio": 0, "model_max_length": 512},
        **{"global_batch_size": 8, "device_batch_size": 8, "high_lr": 1, "low_lr": 1},
        "train_type": recipe.variables.get("TRAIN_TYPE", "lora"),
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    arguments = parse_train_arguments([*words, *recipe.flags], description="")
    assert (arguments.vision_tower_training == "frozen") == (name in ("projector_only", "no_vision_lora"))


def write_run(folder, error_rate, losses):
    (folder / "train").mkdir(parents=True)
    (folder / "scores").mkdir()
    scores = {"character_error_rate": error_rate, "right: mood": 0.9, "right: text": 0.5, "no_text_right": 1.0}
    scores = {name: {"value": value} for name, value in scores.items()}
    (folder / "scores" / "metrics.json").write_text(json.dumps({"scores": scores}))
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)] + [{"train_runtime": 3}]
    (folder / "train" / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_the_table_gives_mean_and_range_of_the_finished_runs(tmp_path):
    for seed, error_rate in enumerate((0.1, 0.2, 0.3)):
        write_run(tmp_path / f"default_{seed}", error_rate, [3.0] * 60)
    write_run(tmp_path / "all_low_0", 0.5, [4.0] * 60)
    (tmp_path / "all_low_1" / "train").mkdir(parents=True)
    write_run(tmp_path / "two_stages_0_projector", 0.9, [1.0] * 60)  # a stage on the way, not a run
    outcomes = recipes.read_outcomes(tmp_path)
    *_, default, all_low = recipes.write_table(outcomes).splitlines()
    assert default.endswith("| 3 | 20.0% (10.0% to 30.0%) | 90.0% (90.0% to 90.0%) | 100.0% (100.0% to 100.0%) |")
    assert all_low.endswith("| 1 | 50.0% | 90.0% | 100.0% |")
    recipes.draw_curves(outcomes, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1440, 600)


def test_a_failing_run_names_its_log(tmp_path):
    command = recipes.Command(["bash", "-c", "echo why; exit 3"], {})
    with pytest.raises(UserError, match=r"ended with code 3; its output is in .*run\.log"):
        recipes.run_command(command, tmp_path / "run.log")
    assert (tmp_path / "run.log").read_text() == "why\n"
