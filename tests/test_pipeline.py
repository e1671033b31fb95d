"""The pipeline room, without bash: what a call of run.sh runs, which results stand and which are refused."""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import termios
import time
import typing
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from PIL import Image

from meme_llava.dataset.check import check_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.errors import UserError
from meme_llava.pipeline import precheck
from meme_llava.pipeline.__main__ import check_input, main, run_stages
from meme_llava.pipeline.checks import check_gpus
from meme_llava.pipeline.commands import run_command
from meme_llava.pipeline.plan import (
    PATH_FLAGS,
    RECORD_FLAGS,
    Stage,
    choose_device_batch,
    choose_devices,
    is_same,
    split_flags,
)
from meme_llava.pipeline.results import describe_making, make_result, read_note
from meme_llava.pipeline.settings import FILES, SETTING, read_settings
from meme_llava.storage.run_record import read_run_record
from meme_llava.train.settings import TrainArguments, free_settings

LAUNCHER = "python -m meme_llava.distributed.launch --nproc_per_node"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path_factory):
    """A function that gives exit code, output and errors of a dry run, as bash would start it in a fresh checkout."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("run.sh", "scripts/more_settings.sh")]
    lines = [line for line in texts[0].replace("\\\n", " ").splitlines() if line.startswith("stage ")]
    assert len(lines) == 7
    defaults = dict(found.groups() for text in texts for found in SETTING.finditer(text))
    checkout = tmp_path_factory.mktemp("checkout")
    for path in (path for path in ROOT.iterdir() if path.name != "output"):
        (checkout / path.name).symlink_to(path)
    monkeypatch.chdir(checkout)

    def call(*words, caller=str(checkout), **variables):
        with monkeypatch.context() as environment:
            for name in defaults:
                environment.delenv(name, raising=False)
            values = {**defaults, "GPUS": "cpu", "DRY_RUN": "1", **variables}
            values["BASE_DIR"] = string.Template(values["BASE_DIR"]).substitute(values)
            for name, value in values.items():
                environment.setenv(name, value)
            stages = [shlex.split(string.Template(line).substitute(values))[1:] for line in lines]
            declared = [word for stage in stages for word in (str(len(stage)), *stage)]
            code = 0
            try:
                main(["check", caller, *declared, "0", *words])
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def dry_run(call, monkeypatch):
    """The commands of a dry run, where there are as many GPUs as it asks for."""
    monkeypatch.setattr("meme_llava.pipeline.__main__.check_gpus", lambda *given: None)

    def dry_run(*words, **variables):
        code, out, errors = call(*words, **variables)
        assert code == 0 and "error:" not in errors
        return out.splitlines()

    return dry_run


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("EPOCH", "EPOCHS"),
        ("GPU", "GPUS"),
        ("LOW_LRS", "LOW_LR"),
        ("OUTPUT_DIT", "OUTPUT_DIR"),
        ("LORA_ALHPA", "LORA_ALPHA"),
        ("DRYRUN", "DRY_RUN"),
        ("epochs", "EPOCHS"),
        # Flags of the scripts, and what others call them.
        ("GLOBAL_BATCH_SIZE", "GLOBAL_BATCH"),
        ("DEVICE_BATCH_SIZE", "DEVICE_BATCH"),
        ("NUM_TRAIN_EPOCHS", "EPOCHS"),
        ("num_train_epochs", "EPOCHS"),
        ("LORA_RANK", "LORA_R"),
        ("NUM_GPUS", "GPUS"),
        ("BATCH_SIZE", "GLOBAL_BATCH"),
        ("PER_DEVICE_TRAIN_BATCH_SIZE", "DEVICE_BATCH"),
        ("MAX_SEQ_LENGTH", "MODEL_MAX_LENGTH"),
        ("LEARNING_RATE", "HIGH_LR (projector) and LOW_LR (all else)"),
        ("LR", "HIGH_LR (projector) and LOW_LR (all else)"),
        ("OUTPUT", "OUTPUT_DIR"),
        ("OUT_DIR", "OUTPUT_DIR"),
        ("OUTDIR", "OUTPUT_DIR"),
        ("BATCH", "GLOBAL_BATCH"),
        # Of several stages that take such a flag, it is the training's that is meant.
        ("image_folder", "IMAGE_FOLDER"),
        ("output_dir", "OUTPUT_DIR"),
        ("annotations", "ANNOTATIONS"),
    ],
)
def test_a_misspelt_variable_stops_the_run(call, written, meant):
    code, out, errors = call(**{written: "1"})
    assert (code, out) == (2, "")
    assert errors == (
        f"error: the variable {written} is set, which run.sh does not know; did you mean {meant}? "
        f"(else: unset {written})\n"
    )


def test_a_hostfile_of_earlier_versions_is_not_ignored(call):
    code, out, errors = call(HOSTFILE="hosts.txt")
    assert (code, out) == (2, "") and errors.startswith(
        "error: HOSTFILE is no longer a setting; a loop in docs/multi_gpu"
    )


@pytest.mark.parametrize("flag", ["save_steps", "seed"])
def test_a_flag_of_train_py_is_no_variable(call, flag):
    code, out, errors = call(**{flag.upper(): "100"})
    assert (code, out) == (2, "")
    assert errors == (
        f"error: the variable {flag.upper()} is set, which run.sh does not know; it is a flag of train.py: "
        f"bash run.sh --{flag} 100 (else: unset {flag.upper()})\n"
    )


def test_other_variables_are_no_slips(dry_run):
    dry_run(ENV="prod", EPOCHE="", MODEL="1", HIGH="2", RANK="0", MASTER="a", NODE="b", LORA="c", GPU_COUNT="8")


def test_memes_of_ones_own_are_evaluated_before_and_after_training(dry_run):
    *_, infer, before, after, _ = dry_run(EVAL_ANNOTATIONS="data/README.md", EVAL_IMAGE_FOLDER="tests")
    asked = "--annotations data/README.md --image_folder tests"
    assert infer == f"python infer.py --model output/merged {asked} --limit 20"
    assert before == f"python evaluate.py --model output/base --output_dir output/scores_before {asked}"
    assert after == (
        f"python evaluate.py --model output/merged --output_dir output/scores {asked} "
        "--compare_with output/scores_before"
    )


@pytest.mark.parametrize("variables", [{"ANNOTATIONS": "data/README.md"}, {"EVAL_ANNOTATIONS": "none"}])
def test_without_memes_kept_out_of_training_the_trained_ones_are_asked_for(dry_run, variables):
    """The drawn memes of data/unseen say nothing about a model of other memes."""
    *_, merge, infer = dry_run(**variables)
    assert merge == "python merge_lora.py --adapter output/train --output_dir output/merged"
    annotations = variables.get("ANNOTATIONS", "data/annotations.json")
    assert infer == (
        f"python infer.py --model output/merged --annotations {annotations} --image_folder data --limit 20"
    )


def test_kept_memes_lie_where_the_trained_ones_do_unless_told_otherwise(dry_run):
    *_, before, _ = dry_run(EVAL_ANNOTATIONS="data/README.md", IMAGE_FOLDER="tests")
    assert "--annotations data/README.md --image_folder tests" in before


@pytest.mark.parametrize("gpus", ["1", "2", "4", "8"])
def test_nothing_else_edited_runs_on_any_usual_number_of_gpus(dry_run, gpus):
    (train,) = dry_run("train", GPUS=gpus)
    device_batch = {"1": 8, "2": 4, "4": 2, "8": 1}[gpus]
    assert f"--global_batch_size 8 --device_batch_size {device_batch}" in train


def test_training_is_evaluated_on_the_memes_that_are_kept_out_of_it(call, dry_run):
    kept = "--eval_annotations data/unseen/annotations.json --eval_image_folder data/unseen"
    for flag in ("--eval_every 50", "--eval-every=50"):
        (line,) = dry_run("train", *flag.split())
        assert line.endswith(f" {kept} --eval_every 50")
    (line,) = dry_run("train", "--eval_every", "50", "--eval_annotations", "mine.json", "--eval_image_folder", "mine")
    assert kept not in line and "--eval_annotations mine.json" in line
    code, _, errors = call("train", "--eval_every", "50", EVAL_ANNOTATIONS="none")
    assert code == 2
    assert errors.startswith("error: --eval_every needs --eval_annotations, which is not there")
    (line,) = dry_run("train")
    assert "--eval" not in line


def test_several_nodes(dry_run):
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2950", "WORLD_SIZE": "2"}
    (train,) = dry_run("train", GPUS="4", **node)
    assert train.startswith(
        f"{LAUNCHER} 4 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --start_timeout 7200 --master_port 2950 train.py"
    )


def test_no_projector_alone_in_any_spelling(dry_run):
    assert len(dry_run("train", PROJECTOR_EPOCHS="0.0")) == 1


def test_nodes_but_the_first_only_train(dry_run):
    """Node 0 checks, builds and merges."""
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    (train,) = dry_run(GPUS="4", **node)
    assert "--node_rank 1 --master_addr 10.0.0.1 --start_timeout 7200 --master_port 29500" in train


@pytest.mark.parametrize(
    ("gpus", "processes"),
    [
        ("cpu", 1),
        ("cpu:2", 2),
        ("1", 1),
        ("2", 2),
        ("0,3", 2),
        ("3,", 1),
    ],
)
def test_gpus_by_count_or_list(dry_run, gpus, processes):
    (train,) = dry_run("train", GPUS=gpus, GLOBAL_BATCH="8", DEVICE_BATCH="1")
    assert train.startswith("python train.py" if processes == 1 else f"{LAUNCHER} {processes} train.py")


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2"])
def test_every_engine_is_one_word(dry_run, engine):
    (train,) = dry_run("train", ENGINE=engine, GPUS="2")
    assert train.endswith(f" --engine {engine}")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["bild"], {}, "unknown stage bild; expected build, train, merge, infer, evaluate, report"),
        (
            ["evaluate"],
            {"EVAL_ANNOTATIONS": "none"},
            "evaluate needs EVAL_ANNOTATIONS, an annotation file of memes that are not trained on",
        ),
        ([], {"EVAL_ANNOTATIONS": "data/../data/annotations.json"}, "EVAL_ANNOTATIONS is ANNOTATIONS"),
        (["--save_steps", "5", "train"], {}, "train stands after the flags of train.py; put stages first"),
        ([], {"GPUS": "08"}, "GPUS is '08'"),
        ([], {"GPUS": "many"}, "GPUS is 'many', expected auto, a count, a list such as 0,3, cpu or cpu:2"),
        ([], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2, expected 0 to 1, below NNODES"),
        ([], {"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 says that run.sh was started several times at once"),
        ([], {"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8 says that run.sh was started several times"),
        ([], {"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE=2 says that run.sh was started"),
        (["merge"], {"NODE_RANK": "1"}, "NODE_RANK is 1, expected 0 to 0, below NNODES"),
        ([], {"NNODES": "2", "MASTER_ADDR": "node..a"}, "MASTER_ADDR is 'node..a', expected a host's name or address"),
        ([], {"NODE_RANK": "00", "NNODES": "2"}, "NODE_RANK is '00', expected a whole number from 0 to below NNODES"),
        ([], {"DRY_RUN": "false"}, "DRY_RUN is 'false', expected 1 (print the commands, run nothing) or 0"),
        (["infer", "--limit", "5"], {}, "--limit goes to train.py, and train is not among the stages; leave it out"),
        (["evaluate", "--help"], {}, "--help goes to train.py, and train is not among the stages"),
        (["--output_dir", "b"], {}, "--output_dir reaches train alone, and other stages take OUTPUT_DIR; set that in"),
        (["train", "merge", "--model=b"], {}, "--model reaches train alone, and other stages take BASE_DIR"),
        (["train", "--plan=false"], {}, "--plan false: write --plan alone, or leave it out"),
        ([], {"PROJECTOR_LR": "5e-4"}, "PROJECTOR_LR=5e-4 has no use without PROJECTOR_EPOCHS; the projector's rate"),
        ([], {"EVAL_ANNOTATIONS": "none", "EVAL_IMAGE_FOLDER": "data"}, "EVAL_IMAGE_FOLDER=data has no use without"),
        ([], {"TRAIN_TYPE": "projector", "HIGH_LR": "-1"}, "error: HIGH_LR is -1.0, expected greater than 0"),
        ([], {"PROJECTOR_EPOCHS": "-1"}, "error: PROJECTOR_EPOCHS is -1.0, expected greater than 0"),
        ([], {"MASTER_PORT": "99999", "GPUS": "cpu:2"}, "MASTER_PORT is 99999, expected 0 to 65535"),
        ([], {"GPUS": "0,x"}, "GPUS is '0,x'"),
        (
            [],
            {"DEVICE_BATCH": "3"},
            "not a multiple of DEVICE_BATCH x GPUs = 3. Set GLOBAL_BATCH=9 or DEVICE_BATCH=2",
        ),
        ([], {"GLOBAL_BATCH": "ten"}, "GLOBAL_BATCH is 'ten', expected a whole number above 0"),
        ([], {"DEVICE_BATCH": "0"}, "DEVICE_BATCH is '0', expected a whole number above 0"),
        ([], {"GPUS": "2", "ENGINE": "zero7"}, "error: ENGINE zero7: no such engine; there are auto"),
        ([], {"LOW_LR": "-1"}, "error: LOW_LR is -1.0, expected greater than 0"),
        (["train", "--low_lr", "-1"], {}, "error: --low_lr is -1.0, expected greater than 0"),
        ([], {"PROJECTOR_EPOCHS": "1", "PROJECTOR_LR": "fast"}, "error: PROJECTOR_LR: invalid float value: 'fast'"),
        (["train", "--output_dir", "b"], {"PROJECTOR_EPOCHS": "1"}, "error: --output_dir counts for both stages of"),
        ([], {"PROJECTOR_EPOCHS": "1", "TRAIN_TYPE": "projector"}, "train the same; set PROJECTOR_EPOCHS=0"),
        ([], {"MASTER_PORT": "http", "GPUS": "cpu:2"}, "error: MASTER_PORT: invalid int value: 'http'"),
        ([], {"IMAGE_POLICY": "padd"}, "error: IMAGE_POLICY: invalid choice: 'padd'"),
    ],
)
def test_wrong_values_stop_before_anything_runs(call, arguments, variables, message):
    code, out, errors = call(*arguments, **variables)
    assert (code, out) == (2, "")
    assert message in errors


UNDER_A_FILE = "run.sh/{}: run.sh is a file, expected a folder; set another {}"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"EVAL_ANNOTATIONS": "missing.json"}, "EVAL_ANNOTATIONS=missing.json: no such file or folder"),
        ([], {"EVAL_IMAGE_FOLDER": "missing"}, "EVAL_IMAGE_FOLDER=missing: no such file or folder"),
        ([], {"ANNOTATIONS": "missing.json"}, "ANNOTATIONS=missing.json: no such file or folder"),
        # Before 17 GB are downloaded, and before a base is asked for.
        (["build"], {"ANNOTATIONS": "missing.json"}, "ANNOTATIONS=missing.json: no such file or folder"),
        (["train", "--plan"], {"IMAGE_FOLDER": "missing"}, "IMAGE_FOLDER=missing: no such file or folder"),
        (["train", "--image-folder", "missing"], {}, "--image_folder missing: no such file or folder"),
        (["train"], {"OUTPUT_DIR": "new"}, "train needs new/base, which is not there; run first, with the same"),
        ([], {"LANGUAGE_MODEL": "/missing"}, "LANGUAGE_MODEL=/missing: no such folder"),
        (["build"], {"OUTPUT_DIR": "run.sh"}, UNDER_A_FILE.format("base", "BASE_DIR or OUTPUT_DIR")),
        (["build", "train"], {"OUTPUT_DIR": "run.sh", "BASE_DIR": "new"}, UNDER_A_FILE.format("train", "OUTPUT_DIR")),
    ],
)
def test_what_is_not_there_stops_before_anything_runs(call, arguments, variables, message):
    code, out, errors = call(*arguments, DRY_RUN="0", **variables)
    assert (code, out) == (2, "") and errors.startswith(f"error: {message}")
    # The commands of a run elsewhere are shown all the same.
    code, out, errors = call(*arguments, **variables)
    assert code == 0 and out.startswith("python ") and errors.startswith(f"the run would stop: {message}")


def test_a_dry_run_says_that_there_are_too_few_gpus(call, tmp_path):
    asked = {"OUTPUT_DIR": f"{tmp_path}/output", "GPUS": "4", "CUDA_VISIBLE_DEVICES": ""}
    code, out, errors = call(**asked)
    assert code == 0 and out.startswith("python ")
    assert errors.startswith("the run would stop: GPUS=4 asks for 4 GPUs, torch sees 0 (CUDA_VISIBLE_DEVICES=, torch")
    # A base can be had anywhere, to plan what the GPUs will do.
    code, out, errors = call("build", **asked)
    assert (code, errors) == (0, "") and out.startswith("python ")


def test_what_a_stage_does_not_read_may_be_missing(call):
    *_, errors = call("merge", ANNOTATIONS="missing.json", EVAL_ANNOTATIONS="lost.json", DRY_RUN="0")
    assert errors.startswith("error: merge needs output/train, which is not there")


def test_a_training_without_result_is_not_merged(call, tmp_path):
    (tmp_path / "train" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "train" / "checkpoint-5").mkdir()
    expected = (
        f"{tmp_path}/train: its training has not finished (there is checkpoint-10 and no run_record.json). Wait if it "
        "still runs, else continue it (bash run.sh train with the same variables, or train.py "
        f"--resume_from_checkpoint latest), or give {tmp_path}/train/checkpoint-10"
    )
    assert call("merge", OUTPUT_DIR=str(tmp_path), DRY_RUN="0")[2] == f"error: {expected}\n"
    with pytest.raises(UserError) as read:
        read_run_record(tmp_path / "train")
    assert str(read.value) == expected


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_runs(call, monkeypatch, tmp_path):
    """root, who runs some tests, may write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    code, _, errors = call(DRY_RUN="0", OUTPUT_DIR=f"{tmp_path}/new/output")
    assert (code, errors) == (
        2,
        f"error: {tmp_path}/new/output/base: this user may not write to {tmp_path}; set another BASE_DIR or "
        "OUTPUT_DIR\n",
    )


@pytest.fixture
def base(tmp_path):
    """A base as run.sh leaves it that has built one from the towers of data/tiny."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "run_record.json").write_text('{"stage": "build"}')
    towers = {"language_model": ["data/tiny/language_model"], "vision_model": ["data/tiny/vision_tower"]}
    making = describe_making(towers | {"image_policy": ["squash"], "output_dir": [str(folder)]})
    (tmp_path / "base.command").write_text(json.dumps(making))
    return folder


@pytest.mark.parametrize("words", [["train"], ["train", "--plan"], ["train", "--show_batch"], ["build", "train"]])
def test_a_base_of_other_towers_is_not_trained_or_planned(call, base, words):
    """Without PRESET the plan of a 7B model would be that of the tiny one."""
    variables = {"BASE_DIR": str(base), "OUTPUT_DIR": f"{base}/../new"}
    assert call(*words, **variables)[2] == ""
    _, _, errors = call(*words, **variables, LANGUAGE_MODEL="Qwen/Qwen2-7B-Instruct")
    assert errors == (
        "< --language_model data/tiny/language_model (LANGUAGE_MODEL)\n"
        "> --language_model Qwen/Qwen2-7B-Instruct (LANGUAGE_MODEL)\n"
        f"the run would stop: {base} was made from other settings or input (< then, > now). Restore them, or set "
        "another OUTPUT_DIR, and another BASE_DIR if you set it; the old result stays.\n"
    )


def test_a_base_without_its_towers_is_trained(call, base):
    note = base.with_name("base.command")
    note.write_text(note.read_text().replace("data/tiny/language_model", "/gone"))
    variables = {"BASE_DIR": str(base), "OUTPUT_DIR": f"{base}/../new", "LANGUAGE_MODEL": "/gone"}
    assert call("train", **variables)[2] == ""


@pytest.mark.parametrize("record", ['{"stage": "merge"}', None])
def test_a_trained_model_is_a_base_as_it_is(call, base, record, capsys):
    """Going on from output/merged, beside which lies the note of its merge."""
    (base / "run_record.json").unlink()
    if record:
        (base / "run_record.json").write_text(record)
    base.with_name("base.command").write_text('{"--adapter": "output/train"}')
    code, out, errors = call(BASE_DIR=str(base), OUTPUT_DIR=f"{base}/../new", DRY_RUN="0")
    assert (code, out, errors) == (0, "", "")
    build = Stage("build", ["false"], {"output_dir": [str(base)]})
    make_result(build, is_first_node=True)
    assert capsys.readouterr().out == (f"base model: {base}, as it is (LANGUAGE_MODEL and VISION_MODEL are not used)\n")


def test_a_misspelt_base_is_not_built(call, base):
    """Without a word it would be, and trained in place of the model that was meant."""
    (base / "run_record.json").write_text('{"stage": "merge"}')
    base.rename(merged := base.with_name("merged"))
    for name, meant in (("merge", merged), (f"../{merged.parent.name}_/merged", merged)):
        asked = merged.parent / name
        for words in ([], ["train"]):
            *_, errors = call(*words, BASE_DIR=str(asked), OUTPUT_DIR=f"{base}/../new", DRY_RUN="0")
            assert errors.startswith(f"error: BASE_DIR={asked}: no such folder; did you mean ")
            assert errors.endswith(f"? (to build a new base there: mkdir -p {asked})\n")
            assert os.path.samefile(errors.partition("did you mean ")[2].partition("?")[0], meant)
    # A name of its own is built, and so is a folder beside one that run.sh built.
    assert call(BASE_DIR=f"{merged.parent}/another", OUTPUT_DIR=f"{base}/../new")[2] == ""
    (merged / "run_record.json").write_text('{"stage": "build"}')
    assert call(BASE_DIR=f"{merged.parent}/merge", OUTPUT_DIR=f"{base}/../new")[2] == ""


def test_an_adapter_is_no_base(call, tmp_path):
    adapter = tmp_path / "train"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "run_record.json").write_text('{"stage": "train"}')
    *_, errors = call(BASE_DIR=str(adapter), OUTPUT_DIR=f"{tmp_path}/new", DRY_RUN="0")
    assert errors == (
        f"error: BASE_DIR={adapter}: is an adapter, expected a whole model: give what it was merged into, such as "
        f"BASE_DIR={tmp_path}/merged (bash run.sh merge)\n"
    )


def test_warmup_in_steps_takes_the_place_of_the_share(dry_run):
    (train,) = dry_run("train", "--warmup_steps", "5")
    assert "--warmup_ratio" not in train and train.endswith(" --warmup_steps 5")


def test_every_setting_is_known_once():
    names = [found[1] for path in FILES for found in SETTING.finditer(path.read_text(encoding="utf-8"))]
    assert len(names) == len(set(names)) == 30
    with pytest.raises(UserError, match="^run.sh: no line sets GPU, which is needed; expected GPU=\\${GPU:-VALUE}$"):
        read_settings({})["GPU"]
    assert {"EPOCHS", "OUTPUT_DIR", "PROJECTOR_LR", "MASTER_PORT", "PRESET", "DRY_RUN"} <= set(names)


@pytest.mark.parametrize(
    ("global_batch", "device_batch", "gpus", "expected"),
    [
        (64, 8, 8, 8),
        (64, 8, 2, 8),
        (8, 8, 4, 2),
        (
            60,
            8,
            4,
            "DEVICE_BATCH x GPUs = 32. Set GLOBAL_BATCH=64 or DEVICE_BATCH=5.",
        ),
        (
            36,
            8,
            4,
            "DEVICE_BATCH x GPUs = 32. Set GLOBAL_BATCH=32 or DEVICE_BATCH=3.",
        ),
        (10, 8, 4, "GPUs = 4. Set GLOBAL_BATCH=8."),
        (3, 8, 8, "GPUs = 8. Set GLOBAL_BATCH=8."),
    ],
)
def test_the_device_batch_divides_the_step(global_batch, device_batch, gpus, expected):
    if isinstance(expected, int):
        assert choose_device_batch(global_batch, device_batch, gpus) == expected
        return
    with pytest.raises(UserError) as error:
        choose_device_batch(global_batch, device_batch, gpus)
    assert str(error.value) == f"GLOBAL_BATCH={global_batch} is not a multiple of {expected}"


def test_processes_see_the_gpus_that_are_meant(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "1000"}
    assert choose_devices("cpu", None) == (1, cpu)
    assert choose_devices("cpu:3", "5") == (3, cpu)
    assert choose_devices("0", None) == (1, cpu)
    assert choose_devices("8", None) == (8, {})
    assert choose_devices("1", None) == (1, {"CUDA_VISIBLE_DEVICES": "0"})
    assert choose_devices("1", "5,6") == (1, {"CUDA_VISIBLE_DEVICES": "5"})
    assert choose_devices("0,3", None) == (2, {"CUDA_VISIBLE_DEVICES": "0,3"})
    assert choose_devices("3,", None) == (1, {"CUDA_VISIBLE_DEVICES": "3"})
    assert choose_devices("5,6", "4,5,6") == (2, {"CUDA_VISIBLE_DEVICES": "5,6"})
    with pytest.raises(UserError, match="^GPUS=0,1 names GPUs that CUDA_VISIBLE_DEVICES=4,5 leaves out"):
        choose_devices("0,1", "4,5")


@pytest.mark.parametrize(
    ("gpus", "code", "printed", "message"),
    [
        ("1", 1, "", "torch cannot be imported by "),
        ("1", 0, "0 None", "asks for 1 GPU, torch sees 0 (CUDA_VISIBLE_DEVICES=0, torch made without CUDA); set GPUS"),
        ("2", 0, "1 12.8", "asks for 2 GPUs, torch sees 1 (CUDA_VISIBLE_DEVICES=0, torch made for CUDA 12.8; nvidia"),
    ],
)
def test_what_torch_says_of_gpus_is_one_sentence(monkeypatch, gpus, code, printed, message):
    monkeypatch.setattr("subprocess.run", lambda *words, **options: subprocess.CompletedProcess([], code, printed))
    with pytest.raises(UserError) as error:
        check_gpus(gpus, int(gpus), {"CUDA_VISIBLE_DEVICES": "0"})
    assert message in str(error.value)


def test_flags_in_every_spelling():
    assert split_flags(["train", "--a-b=1", "--c", "x", "y", "--d", "--a_b", "-2"]) == (
        ["train"],
        {"a_b": ["-2"], "c": ["x", "y"], "d": []},
    )


def test_one_value_in_several_spellings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert is_same("5e-4", "0.0005")
    assert is_same("out/", "out") and is_same("out", str(tmp_path / "out")) and is_same("a/../out", "./out")
    assert not is_same("5e-4", "5e-5") and not is_same("out", "output") and not is_same("lora", "full")


def test_paths_in_flags_start_where_the_user_is(call):
    flags = ["--projector_from", "mine", "--output-dir=/x", "--resume_from_checkpoint", "latest", "--run_name", "mine"]
    code, out, _ = call("train", *flags, caller="/home/me")
    assert code == 0 and "--output_dir /x " in out
    assert out.endswith("--projector_from /home/me/mine --resume_from_checkpoint latest --run_name mine\n")
    code, out, _ = call("train", "--resume_from_checkpoint", "out/checkpoint-2", caller="/home/me")
    assert code == 0 and out.endswith("--resume_from_checkpoint /home/me/out/checkpoint-2\n")


def test_every_path_of_train_py_is_known():
    types = typing.get_type_hints(TrainArguments)
    paths = {name for name, kind in types.items() if Path in (kind, *typing.get_args(kind))}
    assert paths | {"resume_from_checkpoint"} == PATH_FLAGS


def test_free_settings_are_settings():
    assert free_settings() <= {field.name for field in dataclasses.fields(TrainArguments)}
    assert {"save_steps", "report_to", "eval_every", "run_name", "logging_steps"} <= free_settings()


SCRIPT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir()
(folder / "run_record.json").write_text("{}")
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage whose script writes a run record."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "run_record.json").write_text("1")
    flags = {"annotations": ["data.json"], "model": ["base"], "output_dir": ["out"], "low_lr": ["5e-4"]}
    return Stage("train", ["python", "script.py"], flags | {"engine": ["ddp"], "save_steps": ["5"]})


def test_a_result_is_made_once(stage, capsys):
    make_result(stage, is_first_node=True)
    assert capsys.readouterr().out == ""
    make_result(stage, is_first_node=True)
    assert capsys.readouterr().out == "finished already: out\n"


def test_a_new_base_is_said_to_be_one(stage, tmp_path, capsys):
    make_result(dataclasses.replace(stage, name="build"), is_first_node=True)
    assert capsys.readouterr().out == "out is not there yet: building it from LANGUAGE_MODEL and VISION_MODEL\n"


def test_a_kill_right_after_the_result_is_in_place_leaves_a_finished_stage(stage, tmp_path, capsys):
    (tmp_path / "script.py").write_text(f"{SCRIPT}\nimport os; os.kill(os.getpid(), 9)")
    with pytest.raises(SystemExit):
        make_result(stage, is_first_node=True)
    make_result(stage, is_first_node=True)
    assert capsys.readouterr().out == "finished already: out\n"


def test_a_result_of_other_hands_gets_no_note_before_its_script_agrees(stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_record.json").write_text("{}")
    for _ in range(2):
        # The script finds the folder there and fails, as those of the product do.
        with pytest.raises(SystemExit):
            make_result(stage, is_first_node=True)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "zero2"},
        {"save_steps": "7"},
        {"report_to": "none"},
        {"no_torch_compile": "true"},
        {"low_lr": "0.0005"},
        {"annotations": "./data.json"},
        {"output_dir": "out/"},
        {"model": "base/../base"},
        {"model": "base/", "output_dir": "./out/"},
        {"annotations": "{folder}/data.json", "output_dir": "{folder}/out"},
    ],
)
def test_what_changes_no_result_asks_for_no_new_one(stage, tmp_path, capsys, change):
    make_result(stage, is_first_node=True)
    changed = stage.change(**{name: value.format(folder=tmp_path) for name, value in change.items()})
    make_result(changed, is_first_node=True)
    assert capsys.readouterr().out == f"finished already: {changed.folder}\n"


@pytest.mark.parametrize("name", ["out put", "o'ut", "出 力"])
def test_a_folder_with_a_blank_is_the_same_in_every_spelling(stage, tmp_path, capsys, name):
    make_result(stage.change(output_dir=name), is_first_node=True)
    for spelling in (f"{name}/", f"./{name}", f"{tmp_path}/{name}", f"{tmp_path}//{name}/"):
        make_result(stage.change(output_dir=spelling), is_first_node=True)
    assert capsys.readouterr().out.count("finished already: ") == 4


def test_other_settings_are_refused_with_what_differs(stage, capsys):
    make_result(stage, is_first_node=True)
    with pytest.raises(UserError, match="^out was made from other settings or input .* set another OUTPUT_DIR"):
        make_result(stage.change(low_lr="1e-5", seed="7"), is_first_node=True)
    assert capsys.readouterr().err == "< --low_lr 5e-4 (LOW_LR)\n> --low_lr 1e-5 (LOW_LR)\n> --seed 7\n"


@pytest.mark.parametrize(("folder", "setting"), [("train", "EPOCHS"), ("projector", "PROJECTOR_EPOCHS")])
def test_what_differs_is_named_as_run_sh_names_it(stage, capsys, folder, setting):
    """A flag of train.py says nothing to who only sets variables; the projector's own stage has its own ones."""
    before = stage.change(output_dir=f"out/{folder}", num_train_epochs="3")
    make_result(before, is_first_node=True)
    with pytest.raises(UserError):
        make_result(before.change(num_train_epochs="5"), is_first_node=True)
    assert capsys.readouterr().err == f"< --num_train_epochs 3 ({setting})\n> --num_train_epochs 5 ({setting})\n"


def test_flags_behind_the_stages_are_to_be_repeated(stage, capsys):
    make_result(stage.change(max_steps="3", lora_language_modules="q_proj"), is_first_node=True)
    with pytest.raises(UserError) as error:
        make_result(stage, is_first_node=True)
    assert str(error.value) == (
        "out was made with --max_steps 3 --lora_language_modules q_proj. Repeat that behind the stages (bash run.sh "
        "--max_steps 3 --lora_language_modules q_proj), or set another OUTPUT_DIR; the old result stays."
    )
    assert capsys.readouterr() == ("", "")


def test_other_contents_are_refused(stage, tmp_path, capsys):
    make_result(stage, is_first_node=True)
    (tmp_path / "base" / "run_record.json").write_text("2")
    with pytest.raises(UserError, match="was made from other settings or input"):
        make_result(stage, is_first_node=True)
    assert capsys.readouterr().err == "  contents of --model/run_record.json changed\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("train.py --model output/base\n123 45 data/annotations.json\n", "is not JSON (line 1, column 1: "),
        ("", "is empty"),
        ("[]", "holds a list, expected an object"),
        ("null", "holds null, expected an object"),
        ('{"--model": null}', "is no note of run.sh"),
        ('{"--model": 5}', "is no note of run.sh"),
    ],
)
def test_a_note_that_is_none_is_refused(stage, content, found):
    make_result(stage, is_first_node=True)
    stage.note.write_text(content)
    with pytest.raises(UserError) as error:
        make_result(stage, is_first_node=True)
    assert str(error.value).startswith(f"out.command: {found}")
    assert str(error.value).endswith(". To keep out, set another OUTPUT_DIR.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build", "Run only the stages after it, such as bash run.sh train merge, or set another OUTPUT_DIR, and "
                  "another BASE_DIR if you set it."),
        ("merge", "Run only the stages after it, such as bash run.sh infer evaluate, or set another OUTPUT_DIR."),
    ],
)  # fmt: skip
def test_a_model_of_other_hands_is_left_alone(stage, tmp_path, name, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_record.json").write_text(json.dumps({"stage": name}))
    with pytest.raises(UserError) as error:
        make_result(dataclasses.replace(stage, name=name), is_first_node=True)
    assert str(error.value) == (
        f"out is there, but this run.sh did not make it and cannot tell from what it was made. {message}"
    )
    assert not stage.note.exists()


def test_two_runs_in_one_folder_exchange_no_notes(stage, tmp_path):
    """The second one waits for the first, and sees then what it made, and from what."""
    (tmp_path / "script.py").write_text(f"import time\nopen('started', 'w').close(); time.sleep(1)\n{SCRIPT}")
    program = (
        "import sys; from meme_llava.pipeline.plan import Stage; from meme_llava.pipeline.results import make_result; "
        f"make_result(Stage('train', {stage.program!r}, {stage.flags!r}), is_first_node=True)"
    )
    first = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "started").exists():
        assert first.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match="^out was made from other settings or input"):
        make_result(stage.change(low_lr="1e-5"), is_first_node=True)
    assert first.wait() == 0
    assert read_note(stage.note)["--low_lr"] == "5e-4"


def test_the_other_nodes_write_no_note(stage):
    make_result(stage, is_first_node=False)
    assert stage.is_made and not stage.is_finished


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
        # A signal to this process reaches the command, which says how it ended …
        (
            "import os, signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(75)); "
            "os.kill(os.getppid(), signal.SIGINT); time.sleep(30)",
            75,
        ),
        (
            "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
            "os.kill(os.getppid(), signal.SIGHUP); time.sleep(30)",
            75,
        ),
        # … or does not.
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(30)", 130),
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)", 143),
        # … and a later one ends it, whatever it does.
        (
            "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "[(os.kill(os.getppid(), signal.SIGINT), time.sleep(2.5)) for _ in range(9)]",
            130,
        ),
    ],
)
def test_a_command_ends_the_chain_with_its_code(program, code):
    # Behind nohup and in the background of a shell signals are ignored, and stay so.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with pytest.raises(SystemExit) as stop:
            run_command("python", "-c", program)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.value.code == code


def test_a_command_that_ends_without_a_word_is_named(tmp_path, capfd):
    (tmp_path / "merge.py").write_text("import os, time; os.kill(os.getppid(), 15); time.sleep(30)")
    for flags in ([], ["-u"]):
        with pytest.raises(SystemExit):
            run_command("python", *flags, str(tmp_path / "merge.py"))
        assert capfd.readouterr() == ("", f"stopped by SIGTERM: {tmp_path}/merge.py\n")


COUNTS_SIGNALS = """
import os, signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append("SIGINT"))
print("ready", os.getpid(), flush=True)
end = time.monotonic() + 30
while not heard and time.monotonic() < end:
    time.sleep(0.1)
time.sleep(0.5)
print(*heard, flush=True)
sys.exit(75)
"""


@pytest.fixture
def terminal():
    """A process that runs COUNTS_SIGNALS in the foreground of a terminal, and the terminal's other side."""
    ours, theirs = os.openpty()

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    program = f"from meme_llava.pipeline.commands import run_command; run_command('python', '-c', {COUNTS_SIGNALS!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.communicate()
    os.close(ours)


def test_ctrl_c_reaches_a_command_once(terminal):
    process, ours = terminal
    assert process.stdout.readline().startswith("ready ")
    os.write(ours, b"\x03")
    assert (process.stdout.read(), process.wait()) == ("SIGINT\n", 75)


def test_ctrl_z_holds_a_command_until_it_goes_on(terminal):
    process, ours = terminal
    command = psutil.Process(int(process.stdout.readline().split()[1]))
    both = (psutil.Process(process.pid), command)

    def wait_for(status):
        end = time.monotonic() + 20
        while not all((one.status() == psutil.STATUS_STOPPED) == status for one in both):
            assert time.monotonic() < end
            time.sleep(0.05)

    os.write(ours, b"\x1a")
    wait_for(True)
    process.send_signal(signal.SIGCONT)
    wait_for(False)
    os.write(ours, b"\x03")
    assert (process.stdout.read(), process.wait()) == ("SIGINT\n", 75)


def test_the_input_is_checked_once_however_many_stages_read_it(tmp_path, monkeypatch):
    """Both trainings have the same records, and both evaluations the same questions."""
    commands = []
    monkeypatch.setattr("meme_llava.pipeline.__main__.run_command", lambda *words: commands.append(words))
    trainings = [Stage("train", ["python"], {"output_dir": [f"{tmp_path}/{name}"]}) for name in ("projector", "train")]
    asked = {"annotations": ["memes.json"], "image_folder": ["memes"]}
    evaluations = [Stage("evaluate", ["python"], {"output_dir": [name], **asked}) for name in ("before", "after")]
    check_input([*trainings, *evaluations], trainings)
    # Before a base is built on its own, the records of the training are checked that it is for.
    check_input([Stage("build", ["python"], {"output_dir": [f"{tmp_path}/base"]})], trainings)
    precheck, flags = ("python", "-m", "meme_llava.pipeline.precheck"), ("--output_dir", f"{tmp_path}/train")
    assert commands == [(*precheck, "memes.json", "memes", *flags), (*precheck, *flags)]


@pytest.fixture
def training(tmp_path):
    """Three records on three images of one colour, checked as those of a training."""
    records = []
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\n这是什么？"}, {"from": "gpt", "value": f"一张图，{name}。"}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return records, check_records(tmp_path / "train.json", tmp_path, RecordPolicy())


def test_an_evaluation_of_what_is_trained_on_is_refused(training, tmp_path):
    trained, copied = tmp_path / "train.json", tmp_path / "copied.json"
    shutil.copy(trained, copied)
    with pytest.raises(UserError) as error:
        precheck.check_evaluation(copied, tmp_path, training[1])
    assert str(error.value) == (
        f"EVAL_ANNOTATIONS={copied} holds what {trained} holds; give memes that are not trained on, or "
        "EVAL_ANNOTATIONS=none"
    )


def test_an_evaluation_that_is_partly_trained_on_is_warned_of(training, tmp_path, capsys):
    """One image under another name with the same answer, one with another answer, one that is new."""
    records, checked = training
    shutil.copy(tmp_path / "a.png", tmp_path / "d.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "e.png")
    asked = json.loads(json.dumps(records))
    asked[0]["image"], asked[2]["image"] = "d.png", "e.png"
    asked[1]["conversations"][1]["value"] = "蓝色。"
    (tmp_path / "unseen.json").write_text(json.dumps(asked))
    precheck.check_evaluation(tmp_path / "unseen.json", tmp_path, checked)
    assert capsys.readouterr().err.endswith(
        f"\nwarning: 2 of 3 images of {tmp_path}/unseen.json are trained on, 1 of 3 answers too; leave these records "
        "out of one of both files, or the scores after training say too much\n"
    )
    # Once: train.py says it of the records that it evaluates.
    precheck.check_evaluation(tmp_path / "unseen.json", tmp_path, checked, tmp_path / "unseen.json")
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "unseen.json").write_text(json.dumps(asked[2:]))
    precheck.check_evaluation(tmp_path / "unseen.json", tmp_path, checked)
    assert "warning" not in capsys.readouterr().err


def test_infer_says_whether_its_memes_were_trained_on(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr("meme_llava.pipeline.__main__.run_command", lambda *words: commands.append(words))
    variables = {"OUTPUT_DIR": "none", "NODE_RANK": "0", "ANNOTATIONS": "memes.json"}
    for annotations in ("memes.json", "unseen.json"):
        stage = Stage("infer", ["python", "infer.py"], {"annotations": [annotations]})
        run_stages([stage], [stage], variables)
    assert [words[-1] for words in commands] == ["memes.json", "unseen.json"]
    assert capsys.readouterr().out == "\nthe model was trained on these memes; EVAL_ANNOTATIONS names others\n"


def test_several_stages_have_headings(monkeypatch, capsys):
    monkeypatch.setattr("meme_llava.pipeline.__main__.run_command", lambda *words: None)
    asked = {"annotations": ["memes.json"], "image_folder": ["memes"]}
    before, after = (Stage("evaluate", ["python"], {"output_dir": [name], **asked}) for name in ("before", "after"))
    stages = [before, after, Stage("report", ["python"], {})]
    run_stages(stages, stages, {"OUTPUT_DIR": "none", "NODE_RANK": "0"})
    headings = ["=== 1 of 3: evaluate before ===", "=== 2 of 3: evaluate after ===", "=== 3 of 3: report ==="]
    assert capsys.readouterr().out.split("\n") == ["", headings[0], "", headings[1], "", headings[2], ""]


def test_flags_for_records_go_with_a_build(dry_run, call):
    assert {field.name for field in dataclasses.fields(RecordPolicy)} == RECORD_FLAGS
    assert len(dry_run("build", "--bad_records", "quarantine")) == 1
    assert "goes to train.py, and train is not among" in call("build", "--save_steps", "5")[2]


def test_a_command_that_ends_well_is_followed_by_the_next():
    run_command("python", "-c", "import sys; assert sys.stdin.read() == ''")


def test_no_library_is_needed_before_the_first_stage():
    """Help and most wrong settings are answered before an environment is made."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import meme_llava.pipeline.__main__; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    modules = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "meme_llava" in modules
    assert modules & {"numpy", "torch", "transformers", "yaml", "rich", "psutil"} == set()
