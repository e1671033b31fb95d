"""Training on a language model in four bits: which layers, what they compute, what it takes, how it goes on."""

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from batches import load_prepared, make_batch
from conftest import read_losses, train_flags
from launching import run
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaConfig

import merge_lora
import train
from meme_llava.convert import merge_check
from meme_llava.errors import UserError
from meme_llava.model import four_bit
from meme_llava.model.llava import LANGUAGE_MODEL, list_linears, load_processing
from meme_llava.model.packed_attention import SDPA, find_optional
from meme_llava.model.packed_llava import load_packed_llava
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train.planning.memory import StepEstimator
from meme_llava.train.session import check_device
from meme_llava.train.settings import parse_train_arguments

bitsandbytes = pytest.importorskip("bitsandbytes", reason="configs/requirements/four_bit.txt is not installed")
CPU = torch.device("cpu")


def load_in_four_bits(world, dtype=torch.float32):
    policy = load_processing(world.base).image_policy
    return load_packed_llava(world.base, dtype, policy, SDPA, four_bit_on=CPU)


def round_linears(model):
    """Give a whole model the weights that one in four bits multiplies by."""
    with torch.no_grad():
        for linear in list_linears(model, LANGUAGE_MODEL).values():
            linear.weight.copy_(four_bit.round_to_four_bit(linear.weight))
    return model


def test_the_linear_layers_of_the_language_model_are_quantised_and_nothing_else(world):
    model = load_in_four_bits(world, torch.bfloat16)
    quantised = [name for name, one in model.named_modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    attention, mlp = (
        (f"self_attn.{name}_proj" for name in "qkvo"),
        (f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
    projections = [*attention, *mlp]
    assert quantised == [f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in projections]
    for name, parameter in model.named_parameters():
        is_quantised = name.removesuffix(".weight") in quantised
        assert parameter.dtype == (torch.uint8 if is_quantised else torch.bfloat16), name
        if is_quantised:
            state = parameter.quant_state
            assert (state.quant_type, state.blocksize, state.nested, state.dtype) == ("nf4", 64, True, torch.bfloat16)


def test_it_computes_with_the_rounded_weights(world):
    """Loss and gradients are those of a whole model that has these weights."""
    flags = {"lora_dropout": 0.0, "load_in_4bit": "true"}
    ours, theirs = load_prepared(world, four_bit_on=CPU, **flags), load_prepared(world, change=round_linears, **flags)
    batch, gradients = make_batch(ours.config.image_token_id), []
    losses = [model(**batch)["loss"] for model in (ours, theirs)]
    for loss, model in zip(losses, (ours, theirs), strict=True):
        loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    whole = load_prepared(world, lora_dropout=0.0)
    assert abs(whole(**batch)["loss"].item() - losses[0].item()) > 1e-4, "rounding must show, or this shows nothing"


def test_no_layer_may_pack_its_weights_anew_for_an_evaluation(world):
    """bitsandbytes does so on CPUs with AVX512_BF16, and knows no gradient of what it packed."""
    # Setting it says nothing unless bitsandbytes has it.
    assert hasattr(bitsandbytes.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    model = load_prepared(world, four_bit_on=CPU, load_in_4bit="true", lora_dropout=0.0)
    linears = [one for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 14 and not any(one.support_avx512bf16_for_cpu for one in linears)


def count_bytes(model: nn.Module) -> int:
    """What the parameters and quantisation states of a real model take; shared tensors once."""
    found = {}
    for parameter in model.parameters():
        tensors = [parameter.data]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        found |= {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(found.values())


@pytest.mark.parametrize("train_type", ["lora", "projector"])
def test_the_plan_counts_the_weights_that_a_real_model_holds(world, train_type):
    model = load_prepared(world, four_bit_on=CPU, train_type=train_type, load_in_4bit="true")
    flags = train_flags(world, world.folder / "unused", train_type=train_type, load_in_4bit="true")
    config, policy = LlavaConfig.from_pretrained(world.base), load_processing(world.base).image_policy
    arguments, batch = parse_train_arguments(flags, description=""), make_batch(config.image_token_id)
    planned = StepEstimator(config, policy, arguments, batch, 1, on_gpu=False).estimate(CheckpointedLayers())
    assert planned.weights == count_bytes(model)


def test_a_large_matrix_takes_half_a_byte_for_each_weight_and_its_share_of_scales():
    assert four_bit.count_four_bit_bytes([2**26]) == pytest.approx(2**26 * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-4)


RUN = {"max_steps": 6, "save_steps": 3, "save_total_limit": 3, "lora_dropout": 0.1, "train_type": "qlora"}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("four_bit") / "out"
    train.main(train_flags(world, output_dir, **RUN))
    return output_dir


def test_a_run_records_what_it_was(world, finished):
    record = json.loads((finished / "run_record.json").read_text())
    assert record["settings"]["load_in_4bit"] is True and record["settings"]["lora_variant"] == "lora"
    assert re.fullmatch(r"0\.50\.\d+", record["environment"]["libraries"]["bitsandbytes"])
    # The adapter is a plain one, in float32.
    tensors = load_file(finished / "adapter_model.safetensors")
    assert len(tensors) == 56 and {one.dtype for one in tensors.values()} == {torch.float32}
    losses = read_losses(finished)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_it_computes_in_bf16(world, tmp_path, monkeypatch, variant):
    """As on the cards for which it is meant."""
    monkeypatch.setattr("meme_llava.train.session.multiplies_bf16", lambda: True)
    flags = {"train_type": "qlora", "lora_variant": variant, "max_steps": 3, "lora_dropout": 0}
    for precision in ("fp32", "bf16"):
        train.main(train_flags(world, tmp_path / precision, precision=precision, **flags))
    assert read_losses(tmp_path / "bf16") != read_losses(tmp_path / "fp32")
    assert read_losses(tmp_path / "bf16") == pytest.approx(read_losses(tmp_path / "fp32"), rel=0.02)


def test_a_checkpoint_goes_on_to_the_last_bit(world, finished, tmp_path):
    checkpoint = finished / "checkpoint-3"
    train.main(train_flags(world, tmp_path / "out", **RUN, resume_from_checkpoint=checkpoint))
    assert read_losses(tmp_path / "out") == read_losses(finished)
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "out", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_goes_on_without_four_bits_only_if_allowed(world, finished, tmp_path, capsys):
    flags = {**RUN, "train_type": "lora", "resume_from_checkpoint": finished / "checkpoint-3"}
    with pytest.raises(SystemExit):
        train.main(train_flags(world, tmp_path / "out", **flags))
    assert "train_type was 'qlora', is 'lora'" in capsys.readouterr().err
    flags |= {"train_type": "qlora", "load_in_4bit": "false"}
    with pytest.raises(SystemExit):
        train.main(train_flags(world, tmp_path / "out", **flags))
    assert "load_in_4bit was True, is False. Restore what changed" in capsys.readouterr().err
    train.main([*train_flags(world, tmp_path / "out", **flags), "--allow_changes"])
    assert "changed since, as allowed: load_in_4bit was True, is False" in capsys.readouterr().out


def test_the_projector_learns_alone_below_four_bits(world, tmp_path, capsys):
    train.main(train_flags(world, tmp_path / "out", train_type="projector", load_in_4bit="true", max_steps=2))
    assert "language model's linear layers in four bits by bitsandbytes 0.50" in capsys.readouterr().out
    assert len(load_file(tmp_path / "out" / "trained_weights.safetensors")) == 4


def test_it_is_evaluated_while_it_trains(world, tmp_path):
    """The model in four bits is; and what it learns afterwards is what it learns without."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps(world.records[:2], ensure_ascii=False), encoding="utf-8")
    evaluation = {"eval_every": 1, "eval_annotations": other, "eval_image_folder": world.image_folder}
    runs = {"out": {}, "evaluated": {**evaluation, "eval_max_new_tokens": 4}}
    for name, changes in runs.items():
        train.main(train_flags(world, tmp_path / name, train_type="qlora", max_steps=3, **changes))
    assert read_losses(tmp_path / "out") == read_losses(tmp_path / "evaluated")


def test_a_merge_has_one_model_at_a_time_in_memory(finished, tmp_path, monkeypatch):
    """Of those that it compares: each is gone before the weights of the next are read."""
    compared, alive = [], []

    def watch(name, act):
        original = getattr(merge_check, name)

        def watched(model, *arguments):
            act(model)
            return original(model, *arguments)

        monkeypatch.setattr(merge_check, name, watched)

    watch("_compare", lambda model: compared.append(weakref.ref(model.get_input_embeddings().weight)))
    watch("fill_weights", lambda model: alive.append([one() is not None for one in compared]))
    merge_lora.main(["--adapter", str(finished), "--output_dir", str(tmp_path / "merged")])
    assert len(compared) == 3 and alive == [[], [False, False]]


def test_a_merge_without_bitsandbytes_says_what_it_did_not_compare(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(four_bit, "find_optional", lambda *names: (None, ""))
    merge_lora.main(["--adapter", str(finished), "--output_dir", str(tmp_path / "merged")])
    checks = json.loads((tmp_path / "merged" / "run_record.json").read_text())["checks"]
    rounded = {check: finding for check, finding in checks.items() if "four bits" in check}
    assert rounded == {"base in four bits": "not compared: bitsandbytes cannot be used here (it is not installed)"}


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"engine": "ddp"}, {"engine": "zero2"}, {"engine": "zero2_offload"}], ids=str)
def test_engines_that_keep_weights_whole_train_the_same(world, tmp_path, changes):
    recipe = {"train_type": "qlora", "lora_dropout": 0}
    one, two = (run(world, tmp_path / str(n), n, **recipe, **(changes if n > 1 else {})) for n in (1, 2))
    assert (one.code, two.code) == (0, 0), two.output
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), abs=1e-5)


def test_without_bitsandbytes_it_says_what_to_install(world, monkeypatch):
    arguments = parse_train_arguments(train_flags(world, world.folder, load_in_4bit="true"), "")
    check_device(arguments)
    monkeypatch.setattr(four_bit, "find_optional", lambda *names: (None, ""))
    with pytest.raises(UserError, match=r"^--load_in_4bit needs the package bitsandbytes: pip install -r configs/"):
        check_device(arguments)
    monkeypatch.setattr(four_bit, "find_optional", lambda *names: (None, "OSError: libcudart.so.11.0"))
    with pytest.raises(UserError, match=r"cannot be used on cpu here \(OSError: libcudart.so.11.0\); install"):
        check_device(arguments)
    monkeypatch.undo()
    assert find_optional(*four_bit.BITSANDBYTES)[0] is bitsandbytes.nn

    def fail(weight):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(four_bit, "round_to_four_bit", fail)
    with pytest.raises(UserError, match=r"cannot be used on cpu here \(RuntimeError: no kernel image\); install one"):
        check_device(arguments)
