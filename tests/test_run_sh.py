"""run.sh: the commands it gives, what it refuses, and that a finished stage is never answered with an old result."""

import json
import os
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, read_losses
from launching import run_sh as run

LAUNCHER = "python -m meme_llava.distributed.launch --nproc_per_node"
DEFAULT_TRAINING = (
    "python train.py --model output/base --annotations data/annotations.json --image_folder data "
    "--output_dir output/train --train_type lora --num_train_epochs 3 --high_lr 2e-3 --low_lr 5e-4 "
    "--warmup_ratio 0.1 --lora_r 32 --lora_alpha 64 --model_max_length 512 --global_batch_size 8 "
    "--device_batch_size 8 --engine auto"
)
UNSEEN = "--annotations data/unseen/annotations.json --image_folder data/unseen"
REAL_RUN = {
    "LANGUAGE_MODEL": "Qwen/Qwen2-7B-Instruct",
    "VISION_MODEL": "OFA-Sys/chinese-clip-vit-large-patch14-336px",
    "EPOCHS": "5",
    "HIGH_LR": "1e-3",
    "LOW_LR": "2e-5",
    "MODEL_MAX_LENGTH": "2048",
    "GLOBAL_BATCH": "64",
    "DEVICE_BATCH": "1",
    "GPUS": "8",
}


def dry_run(*arguments, **variables):
    result = run(*arguments, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    return [shlex.join(shlex.split(line)) for line in result.stdout.splitlines()]


def test_dry_run_prints_the_whole_chain():
    assert dry_run() == [
        "python build_base_model.py --language_model data/tiny/language_model "
        "--vision_model data/tiny/vision_tower --image_policy squash --output_dir output/base",
        DEFAULT_TRAINING,
        "python merge_lora.py --adapter output/train --output_dir output/merged",
        f"python infer.py --model output/merged {UNSEEN} --limit 20",
        f"python evaluate.py --model output/base --output_dir output/scores_before {UNSEEN}",
        f"python evaluate.py --model output/merged --output_dir output/scores {UNSEEN} "
        "--compare_with output/scores_before",
        "python report.py before=output/scores_before after=output --output output/report.html --title output",
    ]


def test_dry_run_of_the_published_run(eight_gpus):
    build, train, *_ = dry_run(**REAL_RUN, PYTHONPATH=str(eight_gpus))
    assert build == (
        "python build_base_model.py --language_model Qwen/Qwen2-7B-Instruct "
        "--vision_model OFA-Sys/chinese-clip-vit-large-patch14-336px --image_policy squash --output_dir output/base"
    )
    assert train == (
        f"{LAUNCHER} 8 train.py --model output/base --annotations data/annotations.json "
        "--image_folder data --output_dir output/train --train_type lora --num_train_epochs 5 --high_lr 1e-3 "
        "--low_lr 2e-5 --warmup_ratio 0.1 --lora_r 32 --lora_alpha 64 --model_max_length 2048 --global_batch_size 64 "
        "--device_batch_size 1 --engine auto"
    )


def test_one_base_serves_several_outputs(eight_gpus):
    shared = {"OUTPUT_DIR": "b", "BASE_DIR": "shared/base", "PYTHONPATH": str(eight_gpus)}
    build, train = dry_run("build", "train", **shared, **REAL_RUN)
    assert build.endswith("--output_dir shared/base")
    assert "--model shared/base" in train and "--output_dir b/train" in train


def test_single_stages_and_passed_on_flags():
    assert dry_run("train", "--save_steps", "100") == [f"{DEFAULT_TRAINING} --save_steps 100"]
    assert [line.split()[1] for line in dry_run("merge", "infer")] == ["merge_lora.py", "infer.py"]


def test_paths_start_in_the_folder_where_run_sh_is_called(tmp_path):
    """What is not given starts in the checkout, and ids of models are no paths."""
    (tmp_path / "towers").mkdir()
    (tmp_path / "link.sh").symlink_to(ROOT / "run.sh")
    for script in (ROOT / "run.sh", "link.sh", os.path.relpath(ROOT / "run.sh", tmp_path)):
        variables = {"ANNOTATIONS": "mine.json", "OUTPUT_DIR": "out put", "LANGUAGE_MODEL": "Qwen/Qwen2-7B-Instruct"}
        variables |= {"VISION_MODEL": "towers", "EVAL_ANNOTATIONS": "none", "DRY_RUN": "1"}
        (tmp_path / "mine.json").write_text("[]")
        result = run(script=script, cwd=tmp_path, **variables)
        assert result.returncode == 0, result.stderr
        build, train, merge, _ = map(shlex.split, result.stdout.splitlines())
        assert build[2:6] == ["--language_model", "Qwen/Qwen2-7B-Instruct", "--vision_model", f"{tmp_path}/towers"]
        assert build[-1] == f"{tmp_path}/out put/base"
        assert train[4:8] == ["--annotations", f"{tmp_path}/mine.json", "--image_folder", "data"]
        assert merge[-1] == f"{tmp_path}/out put/merged"


def test_paths_behind_the_stages_start_there_too(tmp_path):
    (line,) = run("train", "--projector_from", "mine", cwd=tmp_path, DRY_RUN="1").stdout.splitlines()
    assert line == f"{DEFAULT_TRAINING} --projector_from {tmp_path}/mine"


def test_a_misspelt_variable_stops_the_run():
    result = run(EPOCH="1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "error: the variable EPOCH is set, which run.sh does not know; did you mean EPOCHS? (else: unset EPOCH)\n"
    )


def test_help_explains_run_sh_itself():
    result = run("--help")
    assert result.returncode == 0
    assert "bash run.sh train merge" in result.stdout and "GLOBAL_BATCH" in result.stdout
    assert "activate_environment" not in result.stdout


def test_dry_run_0_is_no_dry_run(tmp_path):
    result = run("infer", DRY_RUN="0", OUTPUT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert (
        f"infer needs {tmp_path}/merged, which is not there; run first, with the same variables: bash run.sh merge"
        in result.stderr
    )


@pytest.mark.parametrize(("stage", "earlier"), [("train", "build"), ("merge", "train")])
def test_a_stage_names_the_one_it_needs(tmp_path, stage, earlier):
    result = run(stage, OUTPUT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert f"run first, with the same variables: bash run.sh {earlier}" in result.stderr


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"EPOCHS": "five"}, [], "error: EPOCHS: invalid float value: 'five'"),
        ({"TRAIN_TYPE": "loar"}, [], "no such recipe"),
        ({"ANNOTATIONS": "nowhere.json"}, [], "error: ANNOTATIONS=nowhere.json: no such file or folder"),
        pytest.param(
            *({"IMAGE_FOLDER": "tests"}, [], "1,500 of 1,500 records cannot be trained on"), marks=pytest.mark.long
        ),
        ({}, ["--save_step", "5"], "did you mean --save_steps?"),
    ],
)
def test_what_would_stop_training_stops_before_building(tmp_path, variables, flags, message):
    """With the real models, building means downloading 17 GB."""
    output = tmp_path / "out"
    result = run(*flags, OUTPUT_DIR=str(output), **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not output.exists()


@pytest.mark.long
def test_a_base_of_other_towers_is_not_taken(tmp_path):
    """Towers that were trained again lie in the same folder, and have the same configuration."""
    towers = tmp_path / "towers"
    shutil.copytree(ROOT / "data" / "tiny", towers)
    variables = {
        "LANGUAGE_MODEL": str(towers / "language_model"),
        "VISION_MODEL": str(towers / "vision_tower"),
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    assert run("build", **variables).returncode == 0
    record = towers / "run_record.json"
    record.write_text(record.read_text().replace('"python": ', '"python_": '))
    result = run("build", **variables)
    assert result.returncode == 2
    assert "/base was made from other settings or input" in result.stderr


@pytest.mark.long
def test_more_gpus_than_there_are(tmp_path):
    result = run(OUTPUT_DIR=str(tmp_path), GPUS="9", GLOBAL_BATCH="9", DEVICE_BATCH="1")
    assert result.returncode == 2
    assert "GPUS=9 asks for 9 GPUs, torch sees 0" in result.stderr


SAVE_STEPS = ("--save_steps", "2")


def run_chain(folder: Path, training_records: int | None, unseen_records: int, **towers):
    """The default chain as a newcomer runs it, but for the place of its output, one pass, and fewer memes."""
    variables = {"OUTPUT_DIR": str(folder / "out put"), "EPOCHS": "1", **towers}
    for name, source, count in (("", "data", training_records), ("EVAL_", "data/unseen", unseen_records)):
        records = json.loads((ROOT / source / "annotations.json").read_text(encoding="utf-8"))[:count]
        annotations = folder / f"{name}annotations.json"
        annotations.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        variables |= {f"{name}ANNOTATIONS": str(annotations), f"{name}IMAGE_FOLDER": source}
    result = run(*SAVE_STEPS, **variables)
    assert result.returncode == 0, result.stderr
    return folder / "out put", variables, result


@pytest.fixture(scope="module")
def chain(world, tmp_path_factory):
    towers = {"LANGUAGE_MODEL": str(world.language_model), "VISION_MODEL": str(world.vision_tower)}
    return run_chain(tmp_path_factory.mktemp("run"), training_records=32, unseen_records=5, **towers)


def test_whole_chain_ends_with_answers_and_places(chain):
    output, _, result = chain
    assert {path.name for path in output.iterdir() if path.is_dir()} == {
        *("base", "train", "merged", "scores_before", "scores")
    }
    assert result.stdout.count("reference:") == 5
    assert f"standalone model    {output}/merged" in result.stdout
    assert f"scores, answers     {output}/scores, before training {output}/scores_before" in result.stdout
    assert f"page to look at     {output}/report.html" in result.stdout
    head, *_ = (output / "report.csv").read_text(encoding="utf-8-sig").splitlines()
    assert head == ",before,after"


@pytest.mark.long
def test_the_embedded_default_learns_to_read_unseen_memes(tmp_path):
    """A third of its training is enough to see it; the bounds leave room for another order of sums."""
    output, _, _ = run_chain(tmp_path, training_records=None, unseen_records=80)
    assert len(read_losses(output / "train")) == 188  # 1,500 records, 8 a step
    before, after = (
        json.loads((output / folder / "metrics.json").read_text())["scores"] for folder in ("scores_before", "scores")
    )
    assert before["character_error_rate"]["value"] > 0.9
    assert after["character_error_rate"]["value"] < 0.5
    assert before["right: mood"]["value"] < 0.25
    assert after["right: mood"]["value"] > 0.5


def test_finished_stages_are_not_done_again(chain):
    output, variables, _ = chain
    written = (output / "train" / "adapter_model.safetensors").stat().st_mtime_ns
    result = run("build", "train", "merge", **variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished already: ") == 3
    assert (output / "train" / "adapter_model.safetensors").stat().st_mtime_ns == written


@pytest.mark.long
def test_training_goes_on_from_a_merged_model(chain, tmp_path):
    """As an owner of memes does who starts from a model that can read."""
    output, variables, _ = chain
    mine = tmp_path / "mine"
    result = run(**variables | {"BASE_DIR": str(output / "merged"), "OUTPUT_DIR": str(mine), "LOW_LR": "1e-4"})
    assert result.returncode == 0, result.stderr
    assert f"base model: {output}/merged, as it is (LANGUAGE_MODEL and VISION_MODEL are not used)" in result.stdout
    record = json.loads((mine / "merged" / "run_record.json").read_text())
    trainings = [record["training"], record["training"]["base"]["run_record"]["training"]]
    assert [training["settings"]["low_lr"] for training in trainings] == [1e-4, 5e-4]
    # The page names the towers at the beginning of both trainings.
    assert variables["LANGUAGE_MODEL"] in (mine / "report.html").read_text(encoding="utf-8")
    again = run("build", "train", "merge", **variables | {"BASE_DIR": str(output / "merged"), "OUTPUT_DIR": str(mine)})
    assert again.returncode == 2 and "> --low_lr 5e-4" in again.stderr


@pytest.mark.long
def test_two_runs_with_other_settings_keep_the_first_ones_result(chain, tmp_path):
    """The second starts while the first trains; a note of its own would make it the first one's result."""
    output, variables, _ = chain
    shared = variables | {"BASE_DIR": str(output / "base"), "OUTPUT_DIR": str(tmp_path / "out")}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(run, "train", **shared)
        while not (tmp_path / "out" / "train").exists():
            assert not first.done()
            time.sleep(0.1)
        second = threads.submit(run, "train", **shared | {"LOW_LR": "1e-5"})
    assert first.result().returncode == 0, first.result().stderr
    assert second.result().returncode == 2, second.result().stderr
    assert json.loads((tmp_path / "out" / "train.command").read_text())["--low_lr"] == "5e-4"
    assert json.loads((tmp_path / "out" / "train" / "run_record.json").read_text())["settings"]["low_lr"] == 5e-4


@pytest.mark.long
def test_nobody_is_asked_again(chain):
    output, variables, _ = chain
    result = run("evaluate", **variables)
    assert result.returncode == 0, result.stderr
    assert "answers: " not in result.stderr
    assert result.stdout.count("character error") == 2


@pytest.mark.long
def test_a_result_that_is_gone_is_made_again(chain, tmp_path):
    """The note beside it is not a result."""
    output, variables, _ = chain
    (output / "merged").rename(tmp_path / "merged")
    result = run("merge", **variables)
    assert result.returncode == 0, result.stderr
    assert f"finished already: {output}/merged" not in result.stdout
    again, before = ((folder / "merged" / "model.safetensors").read_bytes() for folder in (output, tmp_path))
    assert again == before


def test_another_number_of_gpus_asks_for_no_new_result(chain):
    """GPUS, DEVICE_BATCH and some flags change how a step is computed, not what it computes."""
    _, variables, _ = chain
    flags = ["--gradient_checkpointing", "full", "--dataloader_workers", "2", "--torch_compile"]
    result = run("train", *flags, **variables | {"DEVICE_BATCH": "4"})
    assert result.returncode == 0, result.stderr
    assert "finished already: " in result.stdout


def test_an_edited_variable_is_never_answered_with_an_old_result(chain):
    output, variables, _ = chain
    result = run("train", **variables | {"LOW_LR": "1e-5"})
    assert result.returncode == 2
    assert "< --low_lr 5e-4" in result.stderr and "> --low_lr 1e-5" in result.stderr
    assert "/train was made from other settings or input" in result.stderr


def test_retrained_weights_are_not_answered_with_an_old_merge(chain):
    output, variables, _ = chain
    record = output / "train" / "run_record.json"
    original = record.read_text()
    try:
        record.write_text(original.replace('"seed": 42', '"seed": 43'))
        result = run("merge", **variables)
    finally:
        record.write_text(original)
    assert result.returncode == 2
    assert "/merged was made from other settings or input" in result.stderr


@pytest.fixture
def interrupt(chain):
    """Makes a training look as if it had been stopped after step 2: no final files, no note that it is finished."""
    train = chain[0] / "train"

    def stop():
        for path in (*train.iterdir(), chain[0] / "train.command"):
            if path.is_file():
                path.unlink()
        shutil.rmtree(train / "checkpoint-4")

    return stop


@pytest.mark.long
def test_an_interrupted_run_goes_on(chain, interrupt):
    """The same command again: training continues from its newest checkpoint, to the same weights."""
    output, variables, _ = chain
    weights = (output / "train" / "adapter_model.safetensors").read_bytes()
    interrupt()
    result = run("train", *SAVE_STEPS, **variables)
    assert result.returncode == 0, result.stderr
    assert "step 4/4" in result.stdout and "step 1/4" not in result.stdout
    assert (output / "train" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.long
def test_an_interrupted_run_goes_on_with_other_settings_if_that_is_allowed(tmp_path, chain, interrupt):
    output, variables, _ = chain
    shutil.copytree(output, tmp_path / "kept")
    try:
        interrupt()
        refused = run("train", *SAVE_STEPS, **variables, LOW_LR="1e-3")
        assert refused.returncode == 4
        assert "low_lr was 0.0005, is 0.001. Restore what changed" in refused.stderr
        result = run("train", *SAVE_STEPS, "--allow_changes", **variables, LOW_LR="1e-3")
        assert result.returncode == 0, result.stderr
        assert "changed since, as allowed: low_lr was 0.0005, is 0.001" in result.stdout
        assert (output / "train" / "adapter_model.safetensors").is_file()
    finally:
        shutil.rmtree(output)
        shutil.copytree(tmp_path / "kept", output)


def test_help_finishes_no_stage(tmp_path):
    result = run("train", "--help", OUTPUT_DIR=str(tmp_path))
    assert result.returncode == 0 and "--high_lr" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_show_batch_leaves_the_stage_unfinished(chain):
    output, variables, _ = chain
    result = run("train", "--show_batch", **variables)
    assert result.returncode == 0, result.stderr
    assert "<image: 4 tokens at" in result.stdout


@pytest.mark.long
def test_a_run_on_gpus_is_planned_without_them(chain):
    """GPUs, ZeRO stage and batch are run.sh's, although one process on a CPU looks at them."""
    output, variables, _ = chain
    variables = {**variables, "GPUS": "4", "GLOBAL_BATCH": "16", "DEVICE_BATCH": "2"}
    result = run("train", "--plan", "--accelerator", "a800-80gb", **variables)
    assert result.returncode == 0, result.stderr
    assert "16 = 4 devices x 2 x 2 in turn" in result.stdout
    assert "4 x a800-80gb, engine zero2" in result.stdout


def test_a_plan_without_a_base_says_what_to_run_first(tmp_path):
    result = run("train", "--plan", OUTPUT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert (
        f"error: train needs {tmp_path}/base, which is not there; run first, with the same variables: bash run.sh build"
        in result.stderr
    )


@pytest.mark.parametrize(
    "content", ["# 训练\nEPOCHS: 9\n".encode("gbk"), b"\xef\xbb\xbfEPOCHS: 9\r\n", "\ufeff# 训练\nEPOCHS: 9".encode()]
)
def test_a_preset_may_come_from_windows(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    preset = os.path.relpath(tmp_path / "mine", ROOT / "configs" / "presets")
    assert "--num_train_epochs 9 " in dry_run("train", PRESET=preset, LC_ALL="C.UTF-8")[0]


def test_python_finds_our_modules_whatever_is_set():
    assert dry_run("merge", PYTHONSAFEPATH="1") == [
        "python merge_lora.py --adapter output/train --output_dir output/merged"
    ]


@pytest.mark.long
def test_a_failing_stage_stops_the_chain(tmp_path):
    result = run(OUTPUT_DIR=str(tmp_path / "out"), LANGUAGE_MODEL="nobody/nowhere", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "nobody/nowhere: is not a local folder, HF_HUB_OFFLINE is set" in result.stderr
    assert "merge" not in result.stdout


EPOCHS = "EPOCHS=${EPOCHS:-3} "


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (EPOCHS, "EPOCHS=5  ", "line {} is 'EPOCHS=5', expected EPOCHS=${EPOCHS:-VALUE}"),
        (EPOCHS, "EPOCHS=${EPOCHS:3}  ", "line {} is 'EPOCHS=${EPOCHS:3}', expected EPOCHS=${EPOCHS:-VALUE}"),
        (EPOCHS, "EPOCHS=${EPOCHS:-3  ", "line {} is 'EPOCHS=${EPOCHS:-3', expected EPOCHS=${EPOCHS:-VALUE}"),
        (EPOCHS, "EPOCHS=${EPOCH:-3}  ", "line {} is 'EPOCHS=${EPOCH:-3}', expected EPOCHS=${EPOCHS:-VALUE}"),
        (EPOCHS, "EPOCHS = ${EPOCHS:-3}  ", "line {} is 'EPOCHS = ${EPOCHS:-3}', expected EPOCHS=${EPOCHS:-VALUE}"),
        (EPOCHS, "EPCHS=${EPCHS:-3}  ", "a stage takes EPOCHS, and no line sets it; expected EPOCHS=${EPOCHS:-VALUE}"),
        ('"$EPOCHS"', '"$EPOCH"', "a stage takes EPOCH, and no line sets it; expected EPOCH=${EPOCH:-VALUE}"),
    ],
)
def test_a_slip_in_run_sh_is_said_in_one_sentence(tmp_path, right, wrong, message):
    for name in ("scripts", "meme_llava", "configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "run.sh").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "run.sh").write_text(text.replace(right, wrong, 1), encoding="utf-8")
    number = text[: text.index(EPOCHS)].count("\n") + 1
    result = run(script=tmp_path / "run.sh", cwd=tmp_path, DRY_RUN="1")
    assert (result.returncode, result.stderr) == (2, f"error: run.sh: {message.replace('{}', str(number))}\n")


def test_a_slip_in_the_other_settings_is_said_too(tmp_path):
    for name in ("run.sh", "meme_llava", "configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    page = tmp_path / "scripts" / "more_settings.sh"
    text = page.read_text(encoding="utf-8").replace("EVAL_ANNOTATIONS=${EVAL_ANNOTATIONS:-auto}", "EVAL_ANNOTATIONS=my")
    page.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "run.sh", tmp_path / "copy.sh")  # a link would lead to the checkout
    result = run(script=tmp_path / "copy.sh", cwd=tmp_path, DRY_RUN="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: scripts/more_settings.sh: line ")
    assert result.stderr.endswith(" is 'EVAL_ANNOTATIONS=my', expected EVAL_ANNOTATIONS=${EVAL_ANNOTATIONS:-VALUE}\n")


def test_a_preset_sets_a_value_once(tmp_path):
    (tmp_path / "mine.yaml").write_text("EPOCHS: 9\nEPOCHS: 3\n")
    result = run(PRESET=os.path.relpath(tmp_path / "mine", ROOT / "configs" / "presets"), DRY_RUN="1")
    assert result.returncode == 2
    assert result.stderr.endswith("mine.yaml: line 2 sets EPOCHS a second time; delete one of the lines\n")


def test_shell_scripts_have_no_syntax_error():
    scripts = [*ROOT.glob("scripts/*.sh"), *(ROOT / name for name in ("run.sh", "tests/run.sh", ".ci/run"))]
    assert len(scripts) == 6
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_run_sh_is_one_page():
    lines = (ROOT / "run.sh").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("script", ["run.sh", "tests/run.sh"])
def test_another_shell_is_told_which_one_it_takes(script):
    result = subprocess.run(["sh", str(ROOT / script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, f"error: this is not bash. Run: bash {script}\n")


def test_scripts_keep_their_line_ends_in_every_checkout():
    """A git that writes CRLF would leave scripts that bash cannot run."""
    command = "git ls-files '*.sh' '*.sbatch' .ci/run | git check-attr --stdin eol"
    answer = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ends = [line.rpartition(": ")[2] for line in answer.splitlines()]
    assert len(ends) > 6 and set(ends) == {"lf"}
