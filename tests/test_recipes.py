"""The comparison of recipes: every recipe is one that run.sh takes, and the table says what the runs said."""

import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes  # noqa: E402
from recipes import Outcome  # noqa: E402

DEFAULTS = {"HIGH_LR": "4e-3", "LOW_LR": "3e-4", "EPOCHS": "9"}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The stages and variables with which run.sh is called, with nothing run."""
    made = []

    def note_call(words, environment):
        made.append((words, {name: environment.get(name) for name in ("BASE_DIR", "OUTPUT_DIR", *changed)}))
        return ""

    changed = ("TRAIN_TYPE", "EPOCHS", "HIGH_LR", "LOW_LR", "WARMUP_RATIO")
    for name in changed:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(recipes, "run_script", note_call)
    monkeypatch.setattr(recipes, "read_losses", lambda folder: [2.0, 1.0])
    scores = tmp_path / "run" / "scores" / "metrics.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(
        '{"scores": {"character_error_rate": 0.25, "no_text_right": 0.5, "right_by_task": {"mood": [200, 0.75]}}}'
    )
    return made, tmp_path / "run"


def test_one_thing_differs_from_run_sh(calls):
    made, folder = calls
    for recipe in recipes.list_recipes(DEFAULTS).values():
        if not recipe.projector_share:
            recipes.run_recipe(recipe, 7, folder, folder / "base", 9)
    changes = [
        {name: value for name, value in variables.items() if value and name not in ("BASE_DIR", "OUTPUT_DIR")}
        | {"flags": words[5:]}
        for words, variables in made
    ]
    assert changes == [
        {"EPOCHS": "9", "flags": []},
        {"EPOCHS": "9", "HIGH_LR": "3e-4", "flags": []},
        {"EPOCHS": "9", "LOW_LR": "4e-3", "flags": []},
        {"EPOCHS": "9", "HIGH_LR": "1e-3", "LOW_LR": "2e-5", "flags": []},
        {"EPOCHS": "9", "WARMUP_RATIO": "0", "flags": []},
        {"EPOCHS": "9", "flags": ["--lora_vision_modules", "q_proj", "k_proj", "v_proj"]},
        {"EPOCHS": "9", "flags": ["--vision_tower_training", "frozen"]},
        {"EPOCHS": "9", "TRAIN_TYPE": "projector", "flags": []},
    ]
    assert all(words[:5] == ["train", "merge", "evaluate", "--seed", "7"] for words, _ in made)


def test_two_stages_share_the_passes_and_the_second_starts_from_the_first(calls):
    made, folder = calls
    recipe = recipes.list_recipes(DEFAULTS)["projector first"]
    outcome = recipes.run_recipe(recipe, 7, folder, folder / "base", 9)
    (first, first_variables), (second, second_variables) = made
    assert first[:2] == ["train", "merge"] and second[:3] == ["train", "merge", "evaluate"]
    assert (first_variables["TRAIN_TYPE"], second_variables["TRAIN_TYPE"]) == ("projector", None)
    assert (first_variables["EPOCHS"], second_variables["EPOCHS"]) == ("3.0", "6.0")
    assert second_variables["BASE_DIR"] == f"{first_variables['OUTPUT_DIR']}/merged"
    assert outcome == Outcome(0.25, 0.75, 0.5, [2.0, 1.0, 2.0, 1.0])


def test_the_table_gives_mean_and_spread_over_the_seeds(tmp_path):
    outcomes = {
        "one": [Outcome(0.1, 0.9, 1.0, [3.0, 1.0]), Outcome(0.2, 0.7, 1.0, [5.0, 1.0])],
        "two": [Outcome(0.5, 0.5, 0.0, [4.0, 2.0]), Outcome(0.5, 0.5, 0.5, [4.0, 2.0])],
    }
    recipes.write_results(tmp_path, outcomes)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == (
        "| recipe | character error rate | mood right | no text, told so |\n"
        "| --- | --- | --- | --- |\n"
        "| one | 15.0% ± 7.1% | 80.0% ± 14.1% | 100.0% ± 0.0% |\n"
        "| two | 50.0% ± 0.0% | 50.0% ± 0.0% | 25.0% ± 35.4% |\n"
    )
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1080, 660)


def test_what_run_sh_does_by_itself_is_read_from_run_sh():
    assert set(recipes.read_defaults()) == {"HIGH_LR", "LOW_LR", "EPOCHS"}
    command = recipes.print_command("build", BASE_DIR="somewhere")
    assert command[:2] == ["python", "build_base_model.py"] and command[-2:] == ["--output_dir", "somewhere"]


def test_a_run_that_fails_stops_the_comparison():
    with pytest.raises(recipes.UserError, match="bash run.sh bild ended with 2"):
        recipes.run_script(["bild"], {"PATH": "/usr/bin:/bin"})
