"""Every engine trains the same: losses, learning rates, whole results; and a run moves from one to another."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_losses, reseal, train_flags
from launching import make_command, run, weights_equal
from safetensors.torch import load_file, save_file

import infer
import merge_lora
import train
from meme_llava.distributed import environment
from meme_llava.distributed.environment import choose_engine, list_engines
from meme_llava.distributed.processes import check_engine_runs, make_accelerator, make_deepspeed_plugin
from meme_llava.errors import ProcessError, UserError

DIVIDED = ("ddp", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2")
# Twenty steps; two rounds a step on two processes.
CHANGES = {"max_steps": 20, "save_steps": 10, "warmup_ratio": 0.2, "lora_dropout": 0, "save_total_limit": 3}
ROLES = ("vision_tower", "multi_modal_projector", "language_model")


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("engines") / "single"
    flags = train_flags(world, output_dir, global_batch_size=4, device_batch_size=1, **CHANGES)
    train.main(flags)
    return output_dir


@pytest.fixture(
    scope="module",
    params=[name if name == "zero2" else pytest.param(name, marks=pytest.mark.long) for name in DIVIDED],
)
def divided(request, world, tmp_path_factory):
    """The same run on two processes, by engine."""
    output_dir = tmp_path_factory.mktemp("engines") / request.param
    result = run(world, output_dir, 2, engine=request.param, **CHANGES)
    assert result.code == 0, result.output
    assert f"engine {request.param}" in result.output
    return request.param, output_dir


def read_rates(output_dir, role):
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry[f"learning_rate/{role}"] for entry in log if "loss" in entry]


def test_losses_rates_and_results_are_those_of_one_process(single, divided):
    _, output_dir = divided
    assert len(read_losses(single)) == 20
    assert read_losses(output_dir) == pytest.approx(read_losses(single), abs=1e-5)
    for role in ROLES:
        assert read_rates(output_dir, role) == read_rates(single, role)
    # Steps 1 to 4 rise to the peaks that were asked for.
    assert read_rates(output_dir, "multi_modal_projector")[4] == pytest.approx(1e-2)
    assert read_rates(output_dir, "language_model")[4] == pytest.approx(5e-3)
    ours = load_file(output_dir / "adapter_model.safetensors")
    theirs = load_file(single / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    assert all(tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in ours.values())
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_results_merge_and_answer_like_those_of_one_process(world, single, divided, tmp_path, capsys):
    name, output_dir = divided
    if name not in ("zero3", "fsdp2"):
        return
    answers = []
    for number, adapter in enumerate((single, output_dir)):
        merged = tmp_path / str(number)
        merge_lora.main(["--adapter", str(adapter), "--output_dir", str(merged)])
        capsys.readouterr()
        infer.main(["--model", str(merged), "--image", str(world.image_folder / "p0.png"), "--json"])
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["answer"])
    assert answers[0] == answers[1]


def test_a_checkpoint_of_any_engine_goes_on_in_one_process(world, single, divided, tmp_path, capsys):
    """Its moments and weights are whole: the other ten steps lose what they would have lost."""
    name, output_dir = divided
    flags = train_flags(
        world,
        tmp_path / "out",
        global_batch_size=4,
        device_batch_size=2,
        resume_from_checkpoint=output_dir / "checkpoint-10",
        **CHANGES,
    )
    train.main(flags)
    said = capsys.readouterr().out
    assert f"continuing from {output_dir}/checkpoint-10, after 10 steps and 40 records" in said
    assert "2 processes wrote it, and it goes on with 1: the same records come next" in said
    assert f"the engine was {name}, is single; weights and optimizer state are the same" in said
    assert read_losses(tmp_path / "out") == pytest.approx(read_losses(single), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("engine", DIVIDED)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(world, tmp_path, engine):
    """Dropout, two rounds a step, workers, in the middle of a pass, packed rows with shared images."""
    changes = {"engine": engine, "dataloader_workers": 1, "global_batch_size": 6, "save_total_limit": 3}
    assert run(world, tmp_path / "whole", 2, **changes).code == 0
    result = run(world, tmp_path / "cut", 2, **changes, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert result.code == 0, result.output
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "whole")
    assert weights_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
def test_more_processes_continue_what_one_began(world, single, tmp_path):
    """One process to two, and from no engine to ZeRO-2: the same records, so the same losses but for rounding."""
    result = run(world, tmp_path / "out", 2, engine="zero2", **CHANGES, resume_from_checkpoint=single / "checkpoint-10")
    assert result.code == 0, result.output
    assert "1 process wrote it, and it goes on with 2" in result.output
    assert read_losses(tmp_path / "out") == pytest.approx(read_losses(single), abs=1e-5)


def test_a_checkpoint_holds_no_program(divided):
    _, output_dir = divided
    names = {path.name for path in (output_dir / "checkpoint-20").iterdir()}
    assert {"optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"json", "jinja", "safetensors"}


def test_moments_of_another_model_are_refused(world, single, tmp_path, capsys):
    """A checkpoint put together from two, with a manifest of its own."""
    checkpoint = tmp_path / "checkpoint-10"
    subprocess.run(["cp", "-r", single / "checkpoint-10", checkpoint], check=True)
    path = checkpoint / "optimizer-00001-of-00001.safetensors"
    tensors = load_file(path)
    dropped = sorted(tensors)[0]
    del tensors[dropped]
    save_file(tensors, path)
    facts = json.loads((checkpoint / "manifest.json").read_text())
    reseal(checkpoint, {name: facts[name] for name in facts if name not in ("files", "manifest_sha256")})
    flags = train_flags(
        world,
        tmp_path / "out",
        global_batch_size=4,
        device_batch_size=1,
        resume_from_checkpoint=checkpoint,
        **CHANGES,
    )
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 4
    assert f"1 optimizer tensors are missing, e.g. {dropped}" in capsys.readouterr().err


def test_an_engine_is_chosen_by_one_word():
    assert list(list_engines()) == ["single", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2"]
    assert choose_engine("auto", 1, on_gpu=True).name == "single"
    assert choose_engine("auto", 8, on_gpu=True).name == "zero2"
    assert choose_engine("auto", 2, on_gpu=False).name == "ddp"
    assert choose_engine("ddp", 1, on_gpu=True).name == "single"
    assert (choose_engine("zero3", 8, on_gpu=True).kind, choose_engine("zero3", 8, on_gpu=True).zero_stage) == (
        "deepspeed",
        3,
    )
    with pytest.raises(UserError, match="--engine single is for one process, and there are 2"):
        choose_engine("single", 2, on_gpu=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optimizer": {"type": "AdamW"}}', "remove its key 'optimizer', which would replace the two learning rates"),
        ('{"scheduler": {}}', "remove its key 'scheduler'"),
        ("{", "ends in the middle. Correct it, or choose another --engine."),
        ('{"bf16": {"enabled": true, "enabled": false}}', "the key 'enabled' stands twice. Correct it"),
        ("[]", "holds a list, expected an object {…}. Correct it"),
        ("{}", "has no zero_optimization.stage. Correct it"),
        ('{"zero_optimization": null}', "has no zero_optimization.stage. Correct it"),
        (
            '{"zero_optimization": {"stage": "3"}}',
            'zero_optimization.stage is "3", expected a whole number. Correct it',
        ),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage is 0, expected 1, 2 or 3. Correct it"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', 'offload_optimizer is "cpu", expected an'),
    ],
)
def test_a_deepspeed_file_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, content, message):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "mine.json").write_text(content)
    monkeypatch.setattr(environment, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match=re.escape(f"mine.json: {message}")):
        choose_engine("mine", 2, on_gpu=True)


@pytest.mark.parametrize(
    ("name", "kind", "option", "message"),
    [
        ("zero2", "deepspeed", {"zero_optimization": {"stage": 2, "overlap": True}}, "zero_optimization.overlap: "),
        ("fsdp2", "fsdp", {"reshard_after": True}, "FullyShardedDataParallelPlugin.__init__() got an "),
    ],
)  # fmt: skip
def test_an_option_that_the_library_does_not_know_is_named(tmp_path, monkeypatch, name, kind, option, message):
    content = json.loads((ROOT / "configs" / kind / f"{name}.json").read_text())
    (tmp_path / kind).mkdir()
    (tmp_path / kind / "mine.json").write_text(json.dumps({**content, **option}))
    monkeypatch.setattr(environment, "CONFIGS", tmp_path)
    monkeypatch.setenv("RANK", "0")
    engine = choose_engine("mine", 2, on_gpu=False)
    with pytest.raises(UserError, match=re.escape(f"mine.json: {message}")):
        if kind == "deepspeed":
            make_deepspeed_plugin(engine, 1, 1, 1.0, False, 64)
        make_accelerator(engine, 1, False, None)


def test_a_library_that_fell_back_to_another_engine_is_noticed():
    """accelerate trains copies where it was asked to divide, and says nothing."""
    with pytest.raises(ProcessError, match="the engine zero2 was asked for, but Linear holds the model"):
        check_engine_runs(choose_engine("zero2", 2, on_gpu=True), torch.nn.Linear(1, 1))


@pytest.mark.long
def test_one_process_may_move_its_optimizer_to_main_memory(world, single, tmp_path):
    """ZeRO with offloading is of use to a single GPU, too; it needs no launcher."""
    command = make_command(world, tmp_path / "out", 1, engine="zero2_offload", **CHANGES)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert read_losses(tmp_path / "out") == pytest.approx(read_losses(single), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("engine", DIVIDED)
def test_in_bf16_what_learns_is_kept_in_float32(world, single, tmp_path, engine):
    """As on GPUs: steps compute in bf16, updates are made and saved in float32, and a resumed run loses no bit."""
    bf16 = [{"kind": "compute_in_bf16"}]
    if "zero3" in engine:
        bf16.append({"kind": "refuse_whole_moves"})
    changes = {**CHANGES, "max_steps": 6, "save_steps": 2, "save_total_limit": 3, "engine": engine}
    result = run(world, tmp_path / "whole", 2, bf16, **changes)
    assert result.code == 0, result.output
    # bf16 holds 8 bits; a loss that were rounded to them would end in many zeros.
    losses = read_losses(tmp_path / "whole")
    assert losses != read_losses(single)[:6]
    assert losses[:1] == pytest.approx(read_losses(single)[:1], rel=1e-3)
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in losses)
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    moved = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all(not torch.equal(weight, weight.bfloat16().float()) for weight in moved.values())
    result = run(
        world, tmp_path / "cut", 2, bf16, **changes, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2"
    )
    assert result.code == 0, result.output
    assert read_losses(tmp_path / "cut") == losses
    assert weights_equal(tmp_path / "cut", tmp_path / "whole")


ON_GPUS = """
import json
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from meme_llava.distributed.environment import choose_engine
from meme_llava.distributed.processes import make_deepspeed_plugin

found = {"accelerator": get_accelerator()._name, "backend": get_accelerator().communication_backend_name()}
for name in ("zero2", "zero3", "zero2_offload", "zero3_offload"):
    plugin = make_deepspeed_plugin(choose_engine(name, 1, on_gpu=True), 8, 4, 1.0, True, 3584)
    config = DeepSpeedConfig(plugin.deepspeed_config)
    zero = config.zero_config
    offloads = [part is not None and part.device for part in (zero.offload_optimizer, zero.offload_param)]
    found[name] = [config.bfloat16_config.enabled, config.grad_accum_dtype, zero.stage, zero.reduce_bucket_size,
                   zero.prefetch_bucket_size, zero.param_persistence_threshold, config.train_batch_size, *offloads]
print(json.dumps(found))
"""


@pytest.mark.long
def test_on_gpus_deepspeed_takes_what_the_run_says():
    """As far as a machine without one can tell: its configuration for CUDA and NCCL, of 7B's width, in bf16."""
    environment = os.environ | {"DS_ACCELERATOR": "cuda", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ON_GPUS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    zero2 = [True, "fp32", 2, 12_845_056, 50_000_000, 100_000, 32]
    zero3 = [True, "fp32", 3, 12_845_056, 11_560_550, 35_840, 32]
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "accelerator": "cuda",
        "backend": "nccl",
        "zero2": [*zero2, False, False],
        "zero3": [*zero3, False, False],
        "zero2_offload": [*zero2, "cpu", False],
        "zero3_offload": [*zero3, "cpu", "cpu"],
    }
