"""Tests of the planner: what a plan promises, against what the real model keeps."""

import copy
import dataclasses
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from batches import load_prepared, make_batch
from conftest import train_flags
from transformers import LlavaConfig

import train
from meme_llava.distributed.environment import DDP, DEEPSPEED, Engine
from meme_llava.errors import UserError
from meme_llava.model.accelerators import Accelerator
from meme_llava.model.flops import TrainingCosts, count_batch
from meme_llava.model.llava import load_processing
from meme_llava.model.trainable import CheckpointedLayers, recompute_layers
from meme_llava.terminal import format_seconds
from meme_llava.train.planning.memory import StepEstimator, find_usable
from meme_llava.train.planning.plan import GIB, find_accelerator, plan_training, print_plan
from meme_llava.train.planning.trace import outline_model, set_depths, trace_step
from meme_llava.train.settings import parse_train_arguments


def make_arguments(world, **changes):
    return parse_train_arguments(train_flags(world, world.folder / "unused", **changes), description="")


def make_estimator(world, on_gpu=False, config=None, **changes) -> StepEstimator:
    config = config or LlavaConfig.from_pretrained(world.base)
    return StepEstimator(
        config,
        load_processing(world.base).image_policy,
        make_arguments(world, **changes),
        make_batch(config.image_token_id),
        1,
        on_gpu,
    )


def count_kept_bytes(model, batch) -> int:
    """Bytes of the different storages that autograd keeps of a real forward pass, parameters and batch apart."""
    known = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, torch.Tensor))]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # a tensor that is held cannot give its address away
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(size for address, (size, _) in kept.items() if address not in addresses)


@pytest.mark.parametrize(
    ("train_type", "dropout"),
    [
        ("lora", 0.1),
        *(pytest.param(name, 0.0, marks=pytest.mark.long) for name in ("lora", "full", "projector", "freeze_vision")),
    ],
)
def test_activations_are_what_the_real_model_keeps(world, train_type, dropout):
    model = load_prepared(world, train_type=train_type, lora_dropout=dropout)
    kept = count_kept_bytes(model, make_batch(model.config.image_token_id))

    memory = make_estimator(world, train_type=train_type, lora_dropout=dropout).estimate(CheckpointedLayers())

    assert memory.activations == pytest.approx(kept, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_deeper_models_are_extrapolated(world, on_gpu):
    config = set_depths(LlavaConfig.from_pretrained(world.base), language=4, vision=3)
    few = {"lora_vision_modules": ["fc1"], "lora_language_modules": ["q_proj"]}
    estimator = make_estimator(world, on_gpu, config, **few)
    model = outline_model(config, estimator.image_policy, estimator.arguments, estimator.precision)

    for recomputed in (
        CheckpointedLayers(),
        CheckpointedLayers(1, 0),
        CheckpointedLayers(4, 1),
        CheckpointedLayers(4, 3),
    ):
        recompute_layers(model, recomputed)
        activations, _, _ = trace_step(model, estimator.batch, estimator.precision)

        # Casts of weights are shared between modules, so layers are alike up to a few bytes.
        assert estimator.estimate(recomputed).activations == pytest.approx(activations, rel=0.005), recomputed


def test_bf16_on_a_gpu_keeps_less_than_float32(world):
    kept = []
    for on_gpu in (False, True):
        estimator = make_estimator(world, on_gpu, train_type="projector")
        kept.append(estimator.estimate(CheckpointedLayers()).activations)

    assert kept[1] < 0.75 * kept[0]


@pytest.fixture(scope="module")
def projector_estimator(world):
    """Runs the fewest operations: the vision tower keeps nothing."""
    return make_estimator(world, on_gpu=True, train_type="projector")


def test_state_is_divided_as_the_engine_says(world, projector_estimator):
    real = load_prepared(world, train_type="projector")
    learns = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in real.parameters()) - learns

    def shard(stage):
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": True}}
        return {"engine": Engine("mine", DEEPSPEED, config=config), "processes": 2}

    expected = [  # weights, gradients, optimizer, communication
        ({}, (2 * frozen + 4 * learns, 4 * learns, 8 * learns, 0)),
        (
            {"engine": Engine("ddp", DDP), "processes": 2},
            (2 * frozen + 4 * learns, 4 * learns, 8 * learns, 4 * learns),
        ),
        (shard(1), (2 * (frozen + learns), 2 * learns, 6 * learns, 4000)),
        (shard(2), (2 * (frozen + learns), learns, 6 * learns, 4000)),
    ]
    for changes, parts in expected:
        projector_estimator = projector_estimator.with_changes(**changes)
        memory = projector_estimator.estimate(CheckpointedLayers())

        assert (memory.weights, memory.gradients, memory.optimizer, memory.communication) == parts, changes
        assert memory.total == sum(dataclasses.astuple(memory))


@pytest.mark.parametrize(
    ("engine", "name", "stage", "keeps_float32"),
    [("zero2", "zero2", 2, False), ("auto", "zero2", 2, False), ("ddp", "ddp", 0, True), ("fsdp2", "fsdp2", 3, True)],
)
def test_the_engine_says_what_is_divided(world, engine, name, stage, keeps_float32):
    config, policy = LlavaConfig.from_pretrained(world.base), load_processing(world.base).image_policy
    estimator = StepEstimator(config, policy, make_arguments(world, engine=engine), {}, 8, on_gpu=True)
    assert (estimator.engine.name, estimator.stage) == (name, stage)
    assert estimator.precision.keeps_float32 == keeps_float32


RUN = SimpleNamespace(data=SimpleNamespace(dataset=range(8)), steps=100, warmup_steps=10)


def make_plan(world, accelerator, processes=1, **changes):
    config, policy = LlavaConfig.from_pretrained(world.base), load_processing(world.base).image_policy
    arguments = make_arguments(world, **{"train_type": "projector", **changes})
    make_records = partial(make_batch, config.image_token_id)
    batch = make_records(4)
    estimator = StepEstimator(config, policy, arguments, batch, processes, on_gpu=True)
    return plan_training(estimator, [count_batch(batch)] * 2, accelerator, make_records)


def make_machine(usable: float) -> Accelerator:
    """A GPU of 100 TFLOP/s of which `usable` bytes may be filled."""
    return Accelerator("test", "test", 100.0, (usable + GIB) / 0.92 / GIB)


def test_auto_recomputes_what_does_not_fit_and_nothing_else(world, projector_estimator):
    off, full = (
        projector_estimator.estimate(recomputed).total
        for recomputed in (CheckpointedLayers(), projector_estimator.most)
    )
    one = projector_estimator.estimate(CheckpointedLayers(1, 0)).total

    def choose(usable):
        memory = int(make_machine(usable).memory_gib * GIB)
        return projector_estimator.choose_recomputed("auto", memory)

    assert find_usable(80 * GIB) == int(80 * GIB * 0.92) - GIB
    assert full < one < off
    assert choose(off + 100) == CheckpointedLayers()
    assert choose(off - 100) == CheckpointedLayers(1, 0)
    assert choose(one - 100) == CheckpointedLayers(2, 0)
    assert choose(full - 100) == projector_estimator.most == CheckpointedLayers(2, 0)


@pytest.mark.parametrize(
    ("needed", "chosen"),
    [
        (0, CheckpointedLayers(0, 0)),
        (2, CheckpointedLayers(2, 0)),
        (5, CheckpointedLayers(3, 2)),
        (99, CheckpointedLayers(3, 4)),
    ],
)
def test_auto_recomputes_the_fewest_layers_language_first(projector_estimator, needed, chosen):
    estimator = copy.copy(projector_estimator)
    estimator.most = CheckpointedLayers(3, 4)
    estimator.estimate = lambda layers: SimpleNamespace(total=0 if layers.language + layers.vision >= needed else 2**50)

    assert estimator.choose_recomputed("auto", 80 * GIB) == chosen


@pytest.fixture(scope="module")
def a800_plan(world):
    return make_plan(world, find_accelerator("a800-80gb"), processes=2, global_batch_size=16)


def test_time_is_work_over_speed(world, a800_plan):
    batch = count_batch(a800_plan.estimator.batch)
    flops = TrainingCosts.of_model(load_prepared(world, train_type="projector")).flops(batch)

    # 16 captions on 2 devices of 4: 4 device batches.
    assert a800_plan.flops == 4 * flops
    assert a800_plan.step_seconds == pytest.approx(4 * flops / (2 * 312e12 * 0.4))


def test_a_printed_plan_says_what_a_run_takes(a800_plan, capsys):
    print_plan(a800_plan, RUN)

    printed = capsys.readouterr().out
    for expected in (
        "16 = 2 devices x 4 x 2 in turn",
        "100, 10 of them warmup",
        "112, 7 per caption",  # four batches of 28
        "3,200, 28.6 times as many",  # 16 captions of 200
        "44 per step, 39%",
        "2 x a800-80gb, engine zero2, in MiB",
        "auto (this run)",
        "not estimated: too little work for the speed of",
    ):
        assert expected in printed
    assert "does not fit" not in printed and "evaluations" not in printed


def test_a_printed_plan_gives_times_of_a_run_with_work_to_do(a800_plan, capsys):
    """16 captions in 2.5 s on 2 devices."""
    print_plan(replace(a800_plan, step_seconds=2.5), RUN)

    printed = capsys.readouterr().out
    for expected in ("40% of 312 TFLOP/s per device", format_seconds(2.5), "6.40, 3.20 per device"):
        assert expected in printed


def test_a_plan_says_how_often_a_run_is_evaluated(world, a800_plan, capsys):
    """100 steps: 33 times every 3 of them, and behind the last."""
    arguments = make_arguments(
        world, eval_every=3, eval_annotations=world.annotations, eval_image_folder=world.image_folder
    )
    estimator = copy.copy(a800_plan.estimator)
    estimator.arguments = arguments
    print_plan(replace(a800_plan, estimator=estimator), RUN)

    assert "34, which are not in the time" in capsys.readouterr().out


def test_a_run_that_does_not_fit_gets_advice_that_was_tried(world, projector_estimator, capsys):
    accelerator = make_machine(projector_estimator.estimate(CheckpointedLayers()).total - 100)
    plan = make_plan(world, accelerator, gradient_checkpointing="none")
    print_plan(plan, RUN)

    assert [planned.fits for _, planned in plan.advice] == [True]
    assert plan.advice[0][0] == "--device_batch_size 2"
    assert "This run does not fit" in capsys.readouterr().out


@pytest.mark.long
def test_one_device_is_advised_to_take_four_bits(world, capsys):
    whole = make_plan(world, make_machine(1000), gradient_checkpointing="none")
    change, planned = whole.advice[0]
    assert change == "--load_in_4bit"
    assert planned.memory.weights < whole.chosen.memory.weights
    rounded = make_plan(world, make_machine(1000), gradient_checkpointing="none", load_in_4bit="true")
    assert rounded.chosen.memory == planned.memory
    print_plan(rounded, RUN)
    assert "language model's layers in four bits" in " ".join(capsys.readouterr().out.split())
    changes = [change for change, _ in rounded.advice]
    assert "--load_in_4bit" not in changes and not any("zero3" in change for change in changes)


@pytest.mark.long
def test_when_the_state_alone_is_too_much_more_devices_are_tried(world):
    plan = make_plan(world, make_machine(1000), processes=2, global_batch_size=16, gradient_checkpointing="none")

    changes = [change for change, _ in plan.advice]
    assert changes[:2] == [
        "--engine zero3, --gradient_checkpointing full",  # ZeRO-2 is what two GPUs have by themselves
        "4 GPUs with --engine zero3, --gradient_checkpointing full",
    ]
    assert changes[-1].startswith("a device with the memory of ") and plan.advice[-1][1].fits


def test_a_device_without_bf16_is_refused(world):
    with pytest.raises(UserError, match="v100-32gb has no bf16; pass --precision fp32"):
        make_plan(world, find_accelerator("v100-32gb"))


def test_a_plan_for_more_gpus_than_there_are_asks_for_their_name(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*train_flags(world, tmp_path / "out", device_batch_size=1), "--plan", "--gpus", "4"])
    assert stop.value.code == 2
    assert "this plan is for 4 GPUs, and there is none here; name one with --accelerator" in capsys.readouterr().err
