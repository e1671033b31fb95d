"""Kinds of LoRA from training to an answer: each goes on, merges, and answers unmerged as merged."""

import json

import pytest
import torch
from batches import load_prepared, make_batch
from conftest import read_losses, train_flags
from launching import run
from safetensors.torch import load_file
from transformers import LlavaConfig

import evaluate
import infer
import merge_lora
import train
from meme_llava.errors import UserError
from meme_llava.model.llava import load_llava, load_processing
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train.planning.memory import StepEstimator
from meme_llava.train.settings import parse_train_arguments

RUN = {"max_steps": 4, "save_steps": 2, "save_total_limit": 3, "lora_dropout": 0.1}


@pytest.fixture(scope="module", params=["rslora", "dora", "qlora dora"])
def variant(request, world, tmp_path_factory):
    """Flags of a kind, and the output of four steps."""
    changes = {"lora_variant": request.param.split()[-1]}
    if "qlora" in request.param:
        pytest.importorskip("bitsandbytes", reason="configs/requirements/four_bit.txt is not installed")
        changes["train_type"] = "qlora"
    output_dir = tmp_path_factory.mktemp("variants") / "out"
    train.main(train_flags(world, output_dir, **RUN, **changes))
    return changes, output_dir


def test_an_adapter_says_what_it_is(variant):
    """In peft's words, which other programs read."""
    changes, output_dir = variant
    config = json.loads((output_dir / "adapter_config.json").read_text())
    is_dora = changes["lora_variant"] == "dora"
    assert (config["use_rslora"], config["use_dora"]) == (not is_dora, is_dora)
    record = json.loads((output_dir / "run_record.json").read_text())
    assert record["settings"]["lora_variant"] == changes["lora_variant"]
    kinds = [(group["role"], group["kind"], group["tensors"]) for group in record["parameter_groups"]]
    magnitudes = [("vision_tower", "DoRA magnitudes", 12), ("language_model", "DoRA magnitudes", 14)]
    assert [kind for kind in kinds if kind[1] == "DoRA magnitudes"] == magnitudes * is_dora


def test_a_checkpoint_goes_on_to_the_last_bit(world, variant, tmp_path):
    changes, output_dir = variant
    flags = {**RUN, **changes, "resume_from_checkpoint": output_dir / "checkpoint-2"}
    train.main(train_flags(world, tmp_path / "out", **flags))
    assert read_losses(tmp_path / "out") == read_losses(output_dir)
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "out", output_dir))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "offloaded",
    [pytest.param(False, id="in memory"), pytest.param(True, id="layer by layer", marks=pytest.mark.long)],
)
def test_it_merges_and_answers_unmerged_as_merged(world, variant, tmp_path, capsys, monkeypatch, offloaded):
    changes, output_dir = variant
    if offloaded:
        monkeypatch.setattr("meme_llava.model.offloading.measure_available_memory", lambda: 0)
    merge_lora.main(["--adapter", str(output_dir), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
    said, checks = capsys.readouterr().out, json.loads((tmp_path / "merged" / "run_record.json").read_text())["checks"]
    assert float(checks["float32: largest logit difference"].split()[0]) < 1e-4
    of_four_bits = "learned on a base in four bits (--load_in_4bit) and was merged onto the base as it is stored"
    rows = ["base in four bits: largest logit difference", "base in four bits: greedy answers"]
    if changes.get("train_type") == "qlora":
        assert of_four_bits in said and checks.keys() >= set(rows)
        assert float(checks[rows[0]].split()[0]) > 1e-3, "rounding must show"
    else:
        assert of_four_bits not in said and not checks.keys() & set(rows)
    answers = []
    for folder in (output_dir, tmp_path / "merged"):
        infer.main(["--model", str(folder), "--image", str(world.image_folder), "--json", "--max_new_tokens", "8"])
        answers.append([json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 8


def test_evaluate_takes_an_unmerged_adapter(world, variant, tmp_path):
    _, output_dir = variant
    flags = ["--model", output_dir, "--annotations", world.annotations, "--image_folder", world.image_folder]
    evaluate.main([*map(str, flags), "--output_dir", str(tmp_path / "scores"), "--max_new_tokens", "4"])
    assert (tmp_path / "scores" / "run_record.json").is_file()


def test_a_checkpoint_of_another_kind_is_refused(world, variant, tmp_path, capsys):
    changes, output_dir = variant
    for other in {"lora", "rslora", "dora"} - {changes["lora_variant"]}:
        flags = {**RUN, **changes, "lora_variant": other, "resume_from_checkpoint": output_dir / "checkpoint-2"}
        with pytest.raises(SystemExit) as stop:
            train.main([*train_flags(world, tmp_path / "out", **flags), "--allow_changes"])
        assert stop.value.code == 4
        said = capsys.readouterr().err
        assert f"lora_variant was '{changes['lora_variant']}', is '{other}'. Other tensors would learn" in said


def test_dora_begins_where_the_base_is(world):
    """In bfloat16, too, where rows measured in half precision would be longer or shorter by up to 0.4 %."""
    base = load_llava(world.base, torch.float32)
    model = load_prepared(world, lora_variant="dora", change=lambda model: model.bfloat16())
    magnitudes = {name: one for name, one in model.named_parameters() if "magnitude" in name}
    assert len(magnitudes) == 26
    for name, magnitude in magnitudes.items():
        place = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector.default.weight")
        expected = base.get_submodule(place).weight.bfloat16().float().norm(dim=1)
        torch.testing.assert_close(magnitude.data, expected, rtol=1e-6, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_engines_train_dora_the_same(world, tmp_path, engine):
    recipe = {"lora_variant": "dora", "lora_dropout": 0}
    one, two = run(world, tmp_path / "1", 1, **recipe), run(world, tmp_path / "2", 2, engine=engine, **recipe)
    assert (one.code, two.code) == (0, 0), two.output
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), abs=1e-5)


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload", "fsdp2"])
@pytest.mark.parametrize(
    ("flag", "changes"),
    [("--load_in_4bit", {"load_in_4bit": "true"}), ("--lora_variant dora", {"lora_variant": "dora"})],
)
def test_engines_that_divide_weights_are_refused(world, engine, flag, changes):
    with pytest.raises(UserError) as caught:
        parse_train_arguments(train_flags(world, world.folder, engine=engine, **changes), "")
    assert str(caught.value) == (
        f"{flag} needs whole weights on every device, and --engine {engine} divides them; choose single, ddp or zero2, "
        f"or leave {flag} out"
    )


def test_four_bits_are_not_compiled(world):
    flags = train_flags(world, world.folder, train_type="qlora", torch_compile="true")
    with pytest.raises(
        UserError, match="^--load_in_4bit and --torch_compile: layers in four bits do not compile; leave"
    ):
        parse_train_arguments(flags, "")


@pytest.mark.long
def test_dora_compiles(world, tmp_path):
    for name, changes in (("plain", {}), ("compiled", {"torch_compile": "true"})):
        flags = {"lora_variant": "dora", "lora_dropout": 0, "max_steps": 2, **changes}
        train.main(train_flags(world, tmp_path / name, **flags))
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-4)


@pytest.mark.parametrize("train_type", ["full", "freeze_vision"])
def test_what_learns_in_full_does_not_stand_in_four_bits(world, train_type):
    with pytest.raises(UserError) as caught:
        parse_train_arguments(train_flags(world, world.folder, train_type=train_type, load_in_4bit="true"), "")
    assert str(caught.value) == (
        f"--load_in_4bit: the language model learns in full (--train_type {train_type}), and weights in four bits "
        "cannot learn; choose lora or projector, or leave --load_in_4bit out"
    )
    arguments = parse_train_arguments(train_flags(world, world.folder, train_type=train_type, lora_variant="dora"), "")
    assert "lora_variant" in arguments.list_unused()


@pytest.mark.long
def test_a_plan_knows_dora(world):
    """A matrix of the base layer's size is made nowhere, and none stays for the backward pass."""
    config, policy = LlavaConfig.from_pretrained(world.base), load_processing(world.base).image_policy
    batch, found = make_batch(config.image_token_id), {}
    for kind in ("lora", "dora"):
        arguments = parse_train_arguments(train_flags(world, world.folder, lora_variant=kind), "")
        found[kind] = StepEstimator(config, policy, arguments, batch, 1, on_gpu=False).estimate(CheckpointedLayers())
    assert found["dora"].weights > found["lora"].weights
    assert found["lora"].activations < found["dora"].activations < 1.5 * found["lora"].activations
