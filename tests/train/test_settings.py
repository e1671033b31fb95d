"""Every setting has one home, and nothing given by a user is without effect or without a clear message."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from meme_llava.cli import parse_arguments, to_plain
from meme_llava.convert.settings import BuildArguments, MergeArguments
from meme_llava.errors import UserError
from meme_llava.evaluate.settings import EvaluateArguments, JudgeArguments, ReportArguments
from meme_llava.inference.settings import DEFAULT_QUESTION, DemoArguments, InferArguments
from meme_llava.train import settings
from meme_llava.train.settings import TrainArguments, free_settings, parse_train_arguments, read_recipe
from meme_llava.train.start import PLACES

REPOSITORY = ROOT
RECIPES = ["freeze_vision", "full", "lora", "projector", "qlora"]
# What run.sh gives; a command line without it is not complete.
GIVEN = {
    "model": "base",
    "annotations": "memes.json",
    "image_folder": "images",
    "output_dir": "output",
    "train_type": "lora",
    "num_train_epochs": "5",
    "high_lr": "1e-3",
    "low_lr": "2e-5",
    "lora_r": "32",
    "lora_alpha": "64",
    "warmup_ratio": "0.1",
    "model_max_length": "2048",
    "global_batch_size": "64",
    "device_batch_size": "1",
}


def command_line(*more: str, without: str | None = None, **changes: str) -> list[str]:
    given = {**GIVEN, **changes}
    return [word for name, value in given.items() if name != without for word in (f"--{name}", value)] + list(more)


def parse(*more: str, **changes: str) -> TrainArguments:
    return parse_train_arguments(command_line(*more, **changes), description="Train.")


def parse_infer(*words: str) -> InferArguments:
    return parse_arguments(InferArguments, ["--model", "m", *words], description="Ask.")


@pytest.fixture
def recipe_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(settings, "RECIPE_FOLDER", tmp_path)
    return tmp_path


def write_recipe(folder: Path, more: str, name: str = "mine") -> None:
    """A complete recipe; `more` are its first lines."""
    modules = "lora_vision_modules: [q_proj]\nlora_language_modules: [q_proj]\n"
    trainings = "vision_tower_training: lora\nlanguage_model_training: lora\n"
    (folder / f"{name}.yaml").write_text(more + "\n" + trainings + modules, encoding="utf-8")


# ---- The command line ----


def test_a_complete_command_line_written_out():
    arguments = parse()
    assert to_plain(arguments) == {
        "model": "base",
        "annotations": "memes.json",
        "image_folder": "images",
        "output_dir": "output",
        "train_type": "lora",
        "num_train_epochs": 5.0,
        "high_lr": 0.001,
        "low_lr": 0.00002,
        "lora_r": 32,
        "lora_alpha": 64.0,
        "warmup_ratio": 0.1,
        "model_max_length": 2048,
        "global_batch_size": 64,
        "device_batch_size": 1,
        "vision_tower_training": "lora",
        "language_model_training": "lora",
        "lora_vision_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "lora_language_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "projector_from": None,
        "lora_dropout": 0.05,
        "lora_variant": "lora",
        "load_in_4bit": False,
        "warmup_steps": None,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": None,
        "bad_records": "error",
        "allow": [],
        "refuse": [],
        "max_pixels": 50_000_000,
        "seed": 42,
        "precision": "auto",
        "loss_average": "token",
        "shared_images": True,
        "attention": "auto",
        "gradient_checkpointing": "auto",
        "fused_kernels": "auto",
        "torch_compile": False,
        "plan": False,
        "accelerator": None,
        "gpus": None,
        "engine": "auto",
        "hang_timeout": 600,
        "dataloader_workers": None,
        "logging_steps": 1,
        "save_steps": 500,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "run_name": None,
        "eval_every": None,
        "eval_annotations": None,
        "eval_image_folder": None,
        "eval_limit": None,
        "eval_images": 4,
        "eval_max_new_tokens": 128,
        "resume_from_checkpoint": None,
        "allow_changes": False,
        "show_batch": False,
    }
    assert isinstance(arguments.model, Path) and isinstance(arguments.annotations, Path)


def test_every_form_of_a_flag_is_understood():
    arguments = parse("--save-steps=7", "--show_batch", "--torch_compile", "true", "--report_to", "none")
    assert (arguments.save_steps, arguments.show_batch, arguments.torch_compile) == (7, True, True)
    assert arguments.report_to == ["none"]
    assert parse("--lora_vision_modules", "fc1", "fc2").lora_vision_modules == ["fc1", "fc2"]
    assert parse("--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--save_step", "5"], "unknown setting --save_step (did you mean --save_steps?)"),
        (["--sedd=5"], "unknown setting --sedd (did you mean --seed?)"),
        (["--per_device_train_batch_size", "5"], "unknown setting --per_device_train_batch_size"),
        (["stray"], "unrecognized arguments: stray"),
        # An abbreviation is not a spelling of its own: it would change its meaning with the next new setting.
        (["--high", "5"], "unknown setting --high"),
        (["--gradient_check"], "unknown setting --gradient_check"),
        (["--high_lr", "fast"], "argument --high_lr: invalid float value: 'fast'"),
        (["--lora_r", "1.5"], "argument --lora_r: invalid int value: '1.5'"),
        (["--seed", ""], "argument --seed: invalid int value: ''"),
        (["--show_batch", "maybe"], "argument --show_batch: is 'maybe', expected true or false"),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (["--bad_records", "skip"], "invalid choice: 'skip'"),
        (["--save_steps"], "argument --save_steps: expected one argument"),
        (["--train_type"], "argument --train_type"),
    ],
)
def test_an_unknown_or_malformed_setting_stops_with_its_name(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert "--help" in str(caught.value)


def test_a_misspelt_setting_is_named_even_where_the_right_one_is_missed():
    # "--high_lr is required" would send a user who wrote --hihg_lr looking for a fault that is not there.
    line = [word.replace("--high_lr", "--hihg_lr") for word in command_line()]
    with pytest.raises(UserError, match=r"unknown setting --hihg_lr \(did you mean --high_lr\?\)"):
        parse_train_arguments(line, description="Train.")


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "warmup_ratio"])
def test_every_setting_of_the_user_is_required(name):
    with pytest.raises(UserError, match=f"the following arguments are required: .*--{name}"):
        parse_train_arguments(command_line(without=name), description="Train.")


def test_one_of_the_warmup_settings_is_required():
    with pytest.raises(UserError, match="^give --warmup_ratio, a share of the steps, or --warmup_steps$"):
        parse_train_arguments(command_line(without="warmup_ratio"), description="Train.")


VALUE_CHECKS = [
    *[(name, value, "greater than 0") for name in ("num_train_epochs", "high_lr", "low_lr", "lora_alpha")
      for value in ("0", "-1", "nan", "inf")],
    *[(name, value, "greater than 0") for name in ("lora_r", "model_max_length") for value in ("0", "-1")],
    *[(name, value, "at least 1") for name in
      ("global_batch_size", "device_batch_size", "logging_steps", "save_steps", "max_steps", "eval_every",
       "eval_limit", "eval_max_new_tokens")
      for value in ("0", "-1")],
    *[("save_total_limit", value, "at least 2") for value in ("0", "1")],
    *[(name, value, "0 or more") for name in ("weight_decay", "max_grad_norm") for value in ("-0.1", "nan")],
    ("weight_decay", "inf", "0 or more"),
    *[(name, "-1", "0 or more") for name in ("dataloader_workers", "warmup_steps", "eval_images")],
    *[("hang_timeout", value, "1 to 1000000") for value in ("0", "1000001")],
    *[("seed", value, "0 to 18446744073709551615") for value in ("-1", "18446744073709551616")],
    *[
        (name, value, "0 or more and below 1")
        for name in ("warmup_ratio", "lora_dropout")
        for value in ("-0.1", "1", "nan")
    ],
]  # fmt: skip


@pytest.mark.parametrize("name, value, expected", VALUE_CHECKS)
def test_a_value_that_cannot_be_meant_stops_with_its_name(name, value, expected):
    with pytest.raises(UserError, match=f"^--{name} is .*, expected ") as caught:
        parse(f"--{name}", value)
    # Of an endless number only the refusal is demanded, not its wording.
    assert value == "inf" or str(caught.value).endswith(f", expected {expected}")


def test_an_unknown_accelerator_stops_before_anything_is_loaded():
    with pytest.raises(UserError, match="^--accelerator a100: no known accelerator; there are a800-80gb, .* Take the"):
        parse("--plan", "--accelerator", "a100")
    for name in ("a800-80gb", "NVIDIA A100-SXM4-80GB", "CPU", "rtx4090", "RTX-4090"):
        assert parse("--plan", "--accelerator", name).accelerator == name


@pytest.mark.parametrize(
    "name, value",
    [
        *[("warmup_ratio", "0"), ("warmup_ratio", "0.99"), ("lora_dropout", "0"), ("weight_decay", "0")],
        *[("max_grad_norm", "0"), ("dataloader_workers", "0"), ("warmup_steps", "0"), ("seed", "0")],
        *[("max_steps", "1"), ("num_train_epochs", "0.5"), ("lora_r", "1"), ("save_steps", "1")],
    ],
)
def test_the_smallest_meaningful_value_is_accepted(name, value):
    assert getattr(parse(f"--{name}", value), name) == float(value)


def test_help_lists_every_setting_of_every_script(capsys):
    training = (BuildArguments, TrainArguments, MergeArguments, InferArguments)
    for arguments_class in (*training, EvaluateArguments, JudgeArguments, ReportArguments, DemoArguments):
        with pytest.raises(SystemExit) as caught:
            if arguments_class is TrainArguments:
                parse_train_arguments(["--help"], description="What it does.")
            else:
                parse_arguments(arguments_class, ["--help"], description="What it does.")
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "What it does." in text
        for field in dataclasses.fields(arguments_class):
            assert f"--{field.name}" in text
            # A setting nobody explains is one nobody can use.
            assert field.metadata["help"]


# ---- Recipes ----


def test_there_are_exactly_these_recipes():
    assert sorted(path.name for path in (REPOSITORY / "configs" / "train").iterdir()) == [f"{r}.yaml" for r in RECIPES]


@pytest.mark.parametrize(
    "train_type, vision, language",
    [
        ("lora", "lora", "lora"),
        ("qlora", "lora", "lora"),
        ("projector", "frozen", "frozen"),
        ("freeze_vision", "frozen", "full"),
        ("full", "full", "full"),
    ],
)
def test_every_recipe_loads_and_says_what_learns(train_type, vision, language):
    arguments = parse(train_type=train_type)
    assert (arguments.vision_tower_training, arguments.language_model_training) == (vision, language)
    assert arguments.uses_lora == (language == "lora")
    assert bool(arguments.lora_vision_modules) == bool(arguments.lora_language_modules) == (language == "lora")
    assert arguments.load_in_4bit == (train_type == "qlora")


UNUSED_WITHOUT_LORA = [
    *("lora_r", "lora_alpha", "lora_dropout", "lora_variant"),
    *("lora_vision_modules", "lora_language_modules"),
]


@pytest.mark.parametrize(
    "train_type, unused",
    [
        ("lora", []),
        ("projector", [*UNUSED_WITHOUT_LORA[:4], "low_lr", *UNUSED_WITHOUT_LORA[4:]]),
        *((name, UNUSED_WITHOUT_LORA) for name in ("freeze_vision", "full")),
    ],
)
def test_settings_without_effect_are_listed(train_type, unused):
    assert parse(train_type=train_type).list_unused() == unused


def test_settings_that_another_one_replaces_are_listed():
    assert parse("--max_steps", "3").list_unused() == ["num_train_epochs"]
    assert parse("--warmup_steps", "0").list_unused() == ["warmup_ratio"]
    alone = parse_train_arguments(command_line("--warmup_steps", "0", without="warmup_ratio"), description="Train.")
    assert (alone.warmup_ratio, alone.warmup_steps, alone.list_unused()) == (None, 0, [])
    assert parse("--vision_tower_training", "frozen").list_unused() == ["lora_vision_modules"]
    assert parse("--language_model_training", "frozen").list_unused() == ["lora_language_modules"]


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_default(recipe_folder):
    write_recipe(recipe_folder, "")
    assert parse(train_type="mine").seed == 42
    write_recipe(recipe_folder, "seed: 7")
    assert parse(train_type="mine").seed == 7
    assert parse("--seed", "9", train_type="mine").seed == 9
    # Also against a value that happens to be the default.
    assert parse("--seed", "42", train_type="mine").seed == 42
    # The recipe may even give what is the user's, so that a whole run fits in a file.
    write_recipe(recipe_folder, "high_lr: 3e-4")
    whole = parse_train_arguments(command_line(without="high_lr", train_type="mine"), description="Train.")
    assert whole.high_lr == 0.0003


def test_a_recipe_takes_every_type_of_value(recipe_folder):
    write_recipe(
        recipe_folder,
        "lora_dropout: 1e-2\nweight_decay: 0.5\nmax_steps: 3\ntorch_compile: true\nreport_to: [wandb, mlflow]\n"
        "precision: fp32\nengine: zero2\nrun_name: 表情包",
    )
    arguments = parse(train_type="mine")
    assert (arguments.lora_dropout, arguments.weight_decay, arguments.max_steps) == (0.01, 0.5, 3)
    assert (arguments.torch_compile, arguments.report_to) == (True, ["wandb", "mlflow"])
    assert (arguments.precision, arguments.engine) == ("fp32", "zero2")
    assert arguments.run_name == "表情包"


def test_the_train_type_is_found_in_every_spelling():
    # It is looked up before the rest of the command line is read.
    for words in (["--train_type", "lora"], ["--train_type=lora"], ["--train-type", "lora"], ["--train-type=lora"]):
        line = command_line(*words, without="train_type")
        assert parse_train_arguments(line, description="Train.").vision_tower_training == "lora"
    assert parse("--train_type", "full").vision_tower_training == "full"  # the last one counts, as for every flag


def test_a_recipe_may_have_an_empty_list(recipe_folder):
    (recipe_folder / "mine.yaml").write_text("lora_vision_modules: []\n", encoding="utf-8")
    assert read_recipe("mine") == {"lora_vision_modules": []}


@pytest.mark.parametrize(
    "content, message",
    [
        ("save_step: 5", "unknown setting save_step (did you mean save_steps?); docs/settings.md lists all"),
        ("shared_pictures: false", "unknown setting shared_pictures (did you mean shared_images?); docs/"),
        ("optimizer: sgd", "unknown setting optimizer; docs/settings.md lists all"),
        ("help: true", "unknown setting help; docs/settings.md lists all"),
        ("3: 5", "unknown setting 3; docs/settings.md lists all"),
        ("no_shared_images: true", "no_shared_images is a flag of the command line; write shared_images: false"),
        ("train_type: full", "train_type is the name of this file; leave it out"),
        ("seed: 1\nlora_dropout: 0.3\nseed: 2", "the key 'seed' stands twice"),
        ("save-steps: 1\nsave_steps: 2", "the key 'save_steps' stands twice"),
        ("lora_r: many", "lora_r: invalid int value: 'many'"),
        ("lora_r: 1.5", "lora_r: invalid int value: '1.5'"),
        ("seed:", "seed: invalid int value: 'None'"),
        ("seed: [1, 2]", "seed: invalid int value: '[1, 2]'"),
        ("torch_compile: maybe", "torch_compile: is 'maybe', expected true or false"),
        ("vision_tower_training: froze", "vision_tower_training: invalid choice: 'froze'"),
        ("lora_r: []", "lora_r: invalid int value: '[]'"),
        ("lora_r: [", "not YAML at line 1: expected the node content, but found '<stream end>'"),
        ("a: b\nlora_r: 5: 6", "not YAML at line 2: mapping values are not allowed here"),
        ("- lora_r", "expected 'setting: value' lines, found list"),
        ("lora", "expected 'setting: value' lines, found str"),
        ("", "expected 'setting: value' lines, found NoneType"),
        ("\ufeff", "expected 'setting: value' lines, found NoneType"),
        ("seed: 1 # \x07", "unacceptable character #x0007: special characters are not allowed"),
    ],
)  # fmt: skip
def test_a_faulty_recipe_stops_with_its_path_and_the_setting(recipe_folder, content, message):
    path = recipe_folder / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse(train_type="mine")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_a_recipe_in_another_encoding_is_named(recipe_folder):
    write_recipe(recipe_folder, "")
    path = recipe_folder / "mine.yaml"
    path.write_bytes("# 注释\n".encode("gb18030") + path.read_bytes())
    with pytest.raises(UserError, match="^.*mine.yaml: not UTF-8 .*iconv -f GB18030"):
        parse(train_type="mine")


def test_without_a_train_type_only_what_the_user_gives_is_missed():
    with pytest.raises(UserError, match=r"the following arguments are required: --train_type\. --help"):
        parse_train_arguments(command_line(without="train_type"), description="Train.")


@pytest.mark.parametrize("train_type", ["lroa", "lora.yaml", "../train/lora", "", "LORA"])
def test_an_unknown_train_type_lists_the_known_ones(train_type):
    with pytest.raises(UserError, match=f"^--train_type {re.escape(train_type)}: no such recipe") as caught:
        parse(train_type=train_type)
    assert str(caught.value).endswith("there are freeze_vision, full, lora, projector, qlora")


@pytest.mark.parametrize("vision, language", [("lora", "full"), ("full", "lora")])
def test_lora_and_full_training_cannot_be_mixed(vision, language):
    with pytest.raises(UserError, match="mix lora and full; choose one"):
        parse("--vision_tower_training", vision, "--language_model_training", language)


def test_lora_needs_modules_to_go_to():
    # projector's recipe names none, so LoRA on top of it would silently train nothing of the tower.
    with pytest.raises(UserError, match="--vision_tower_training is lora, but --lora_vision_modules names no module"):
        parse("--vision_tower_training", "lora", train_type="projector")
    with pytest.raises(UserError, match="--language_model_training is lora, but --lora_language_modules names no"):
        parse("--language_model_training", "lora", train_type="projector")
    both = ["--vision_tower_training", "lora", "--lora_vision_modules", "fc1"]
    assert parse(*both, train_type="projector").lora_vision_modules == ["fc1"]


@pytest.mark.parametrize("vision, language", [("lora", "frozen"), ("frozen", "lora"), ("full", "frozen")])
def test_one_part_may_be_frozen(vision, language):
    arguments = parse("--vision_tower_training", vision, "--language_model_training", language)
    assert (arguments.vision_tower_training, arguments.language_model_training) == (vision, language)


# ---- One home for every setting ----


def test_every_train_setting_has_exactly_one_home():
    script = (REPOSITORY / "run.sh").read_text(encoding="utf-8")
    (command,) = re.findall(r"^stage train python train\.py (.*?)\n\n", script, re.DOTALL | re.MULTILINE)
    in_script = re.findall(r"--(\w+)", command)
    # An engine is chosen by whoever starts train.py without run.sh, too; both say auto.
    in_script.remove("engine")
    recipes = {name: yaml.safe_load((REPOSITORY / f"configs/train/{name}.yaml").read_text()) for name in RECIPES}
    in_recipes = list(recipes["lora"])
    fields = dataclasses.fields(TrainArguments)
    has_default = [
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    ]

    # What has a default of its own.
    assert recipes["qlora"].pop("load_in_4bit") is True
    assert recipes["qlora"] == recipes["lora"]
    # Every recipe answers the same questions, so that none inherits another's answer.
    assert all(set(recipe) == set(in_recipes) for recipe in recipes.values())
    # Either of the two warmup settings may stand alone, so neither is demanded; run.sh gives the published one.
    has_default.remove("warmup_ratio")
    homes = in_script + in_recipes + has_default
    assert sorted(homes) == sorted(field.name for field in fields)
    assert sorted(in_script) == sorted(GIVEN)


def test_what_a_continued_run_may_not_change_written_out():
    assert {field.name for field in dataclasses.fields(TrainArguments)} - free_settings() - PLACES == {
        *("train_type", "vision_tower_training", "language_model_training"),
        *("lora_r", "lora_alpha", "lora_dropout", "lora_vision_modules", "lora_language_modules"),
        *("lora_variant", "load_in_4bit"),
        *("high_lr", "low_lr", "weight_decay", "max_grad_norm"),
        *("num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps", "lr_scheduler_type"),
        *("global_batch_size", "model_max_length", "loss_average", "shared_images", "seed", "precision"),
        *("bad_records", "allow", "refuse", "max_pixels"),
    }


# ---- Asking ----


def test_infer_fills_in_the_default_question():
    arguments = parse_infer("--image", "a.jpg", "folder")
    assert arguments.image == [Path("a.jpg"), Path("folder")]
    assert arguments.question == DEFAULT_QUESTION == "这张表情包写了什么，是什么意思？"
    assert parse_infer("--image", "a.jpg", "--question", "谁？").question == "谁？"
    records = parse_infer("--annotations", "a.json", "--image_folder", "images", "--limit", "3")
    assert (records.annotations, records.image_folder, records.limit) == (Path("a.json"), Path("images"), 3)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either --image or --annotations"),
        (["--image", "a", "--annotations", "b", "--image_folder", "c"], "give either --image or --annotations"),
        (["--annotations", "b"], "--annotations and --image_folder go together"),
        (["--image", "a", "--image_folder", "c"], "--annotations and --image_folder go together"),
        (["--image", "a", "--limit", "3"], "--limit goes with --annotations"),
        (["--annotations", "b", "--image_folder", "c", "--question", "谁？"], "--question goes with --image"),
        (["--image", "a", "--question", " \n"], "--question is ' \\n', expected not empty"),
        (["--image", "a", "--max_new_tokens", "0"], "--max_new_tokens is 0, expected at least 1"),
        (["--annotations", "b", "--image_folder", "c", "--limit", "0"], "--limit is 0, expected at least 1"),
        (["--image"], "argument --image: expected at least one argument"),
        (["--image", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--images", "a"], "(did you mean --image?)"),
    ],
)
def test_contradictions_in_what_is_asked_stop(words, message):
    with pytest.raises(UserError) as caught:
        parse_infer(*words)
    assert message in str(caught.value)


def test_build_and_merge_parse_their_settings():
    build = parse_arguments(
        BuildArguments, ["--language_model", "a/b", "--vision_model", "modelscope:c/d", "--output_dir", "o"], "Build."
    )
    assert to_plain(build) == {
        "language_model": "a/b",
        "vision_model": "modelscope:c/d",
        "output_dir": "o",
        "image_policy": "squash",
        "seed": 0,
        "dtype": "source",
        "max_shard_size": "5GB",
        "verify": True,
        "overwrite": False,
    }
    merge = parse_arguments(MergeArguments, ["--adapter", "a", "--output_dir", "o", "--overwrite"], "Merge.")
    assert to_plain(merge) == {
        "adapter": "a",
        "output_dir": "o",
        "dtype": "float16",
        "base_model": None,
        "export": "none",
        "max_shard_size": "5GB",
        "verify": True,
        "overwrite": True,
    }
    with pytest.raises(UserError, match=r"unknown setting --adaptor \(did you mean --adapter\?\)"):
        parse_arguments(MergeArguments, ["--adapter", "a", "--output_dir", "o", "--adaptor", "a"], "Merge.")
    plain = parse_arguments(MergeArguments, ["--adapter", "a", "--output_dir", "o", "--no_verify"], "Merge.")
    assert plain.verify is False


@pytest.mark.parametrize("script", sorted(path.name for path in REPOSITORY.glob("*.py")))
def test_help_and_a_wrong_flag_answer_without_torch(script, tmp_path):
    for library in ("torch", "transformers"):
        (tmp_path / f"{library}.py").write_text("raise AssertionError('was loaded')\n")
    asked = run_script(script, tmp_path, "--help")
    assert (asked.returncode, asked.stdout[:7], asked.stderr) == (0, "usage: ", "")
    mistaken = run_script(script, tmp_path, "--no-such-setting")
    assert mistaken.returncode == 2 and mistaken.stderr.startswith("error: "), mistaken.stderr


def test_ctrl_c_while_libraries_load_is_no_traceback(tmp_path):
    """A stand-in for torch meets what the signal becomes; the signal itself is ignored behind nohup."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    result = run_script("train.py", tmp_path, *command_line())
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped\n")


def run_script(script: str, libraries: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a script that finds the modules in `libraries` before the installed ones."""
    environment = os.environ | {"PYTHONPATH": str(libraries)}
    command = [sys.executable, REPOSITORY / script, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
