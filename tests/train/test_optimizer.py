"""--muon_lr: which tensors Muon updates and how, and that a run with it is continued and refused as any other."""

import json

import pytest
import torch
from conftest import read_losses, train_flags
from safetensors.torch import load_file
from torch import nn

import train
from meme_llava.errors import UserError
from meme_llava.model.llava import load_llava
from meme_llava.model.trainable import ParameterGroup, plan_parameter_groups, prepare_trainable
from meme_llava.train.prepared_run import MuonWithAdamW
from meme_llava.train.settings import parse_train_arguments

FULL = {"train_type": "full", "muon_lr": 2e-2}


def test_muon_gets_the_matrices_of_the_vision_layers_and_nothing_else(world, tmp_path):
    model = load_llava(world.base, torch.float32)
    flags = train_flags(world, tmp_path, high_lr=1e-3, low_lr=2e-5, weight_decay=0.1, **FULL)
    arguments = parse_train_arguments(flags, description="")
    prepare_trainable(model, arguments, seed=0)
    groups = plan_parameter_groups(model, arguments)
    layers = [group for group in groups if group.uses_muon]
    assert [(group.role, group.learning_rate, group.weight_decay) for group in layers] == [("vision_tower", 2e-2, 0.1)]
    # A vision layer has 6 matrices; the last one of three is not used.
    assert [len(group.names) for group in layers] == [2 * 6]
    others = {name for group in groups if not group.uses_muon for name in group.names if name.endswith(".weight")}
    language_layers = {name for name in others if ".language_model.layers." in name and "norm" not in name}
    assert len(language_layers) == 2 * 7  # AdamW's
    assert {name for name in others - language_layers if "norm" not in name} == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }


def make_groups(matrix: nn.Parameter, vector: nn.Parameter) -> list[ParameterGroup]:
    return [
        ParameterGroup("vision_tower", 0.1, 0.0, ("matrix",), (matrix,), uses_muon=True),
        ParameterGroup("vision_tower", 0.01, 0.0, ("vector",), (vector,)),
    ]


def test_muon_changes_all_directions_of_a_matrix_alike():
    """The gradient pulls ten times harder along one axis; AdamW's first step is the rate, whatever the gradient."""
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    optimizer = MuonWithAdamW(make_groups(matrix, vector))
    matrix.grad, vector.grad = torch.tensor([[3.0, 0.0], [0.0, -0.3]]), torch.tensor([5.0, -0.5])
    optimizer.step()
    # Five Newton-Schulz steps bring singular values between about 0.7 and 1.2, not to 1.
    assert -0.125 < matrix[0, 0].item() < -0.065 and 0.065 < matrix[1, 1].item() < 0.125
    assert matrix[0, 1].item() == pytest.approx(0, abs=1e-3)
    assert vector.tolist() == pytest.approx([-0.01, 0.01], rel=1e-3)


def test_a_schedule_sets_the_rates_of_both():
    """Also where a library has given the optimizer its own state anew, as accelerate does."""
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    optimizer = MuonWithAdamW(make_groups(matrix, vector))
    optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    matrix.grad, vector.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert not matrix.any() and not vector.any()


def test_a_resumed_run_equals_the_uninterrupted_one(world, tmp_path):
    changes = {**FULL, "max_steps": 6, "save_steps": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(train_flags(world, whole, **changes))
    cut.mkdir()
    (whole / "checkpoint-3").rename(cut / "checkpoint-3")
    train.main(train_flags(world, cut, **changes, resume_from_checkpoint="latest"))
    losses = read_losses(whole)
    assert read_losses(cut) == losses and losses[-1] < losses[0]
    expected, resumed = (load_file(folder / "trained_weights.safetensors") for folder in (whole, cut))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_the_run_says_what_muon_updates_and_logs_its_rate(world, tmp_path, capsys):
    train.main(train_flags(world, tmp_path / "out", **FULL, max_steps=1))
    assert "Muon" in capsys.readouterr().out
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = {name: value for name, value in history[0].items() if name.startswith("learning_rate/")}
    assert rates == {
        "learning_rate/vision_tower": 5e-3,
        "learning_rate/vision_tower by Muon": 2e-2,
        "learning_rate/multi_modal_projector": 1e-2,
        "learning_rate/language_model": 5e-3,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon_lr": 2e-2}, "--muon_lr is for a vision tower that learns in full, and --train_type lora has none"),
        ({**FULL, "muon_lr": 0}, "--muon_lr is 0.0, expected greater than 0"),
        (
            {**FULL, "engine": "fsdp2", "plan": "", "gpus": 2, "device_batch_size": 2},
            "Muon needs whole matrices, and --engine fsdp2 divides",
        ),
    ],
)
def test_where_muon_cannot_be_it_is_refused(world, tmp_path, capsys, changes, message):
    flags = [flag for flag in train_flags(world, tmp_path / "out", **changes) if flag]
    with pytest.raises((SystemExit, UserError)):
        train.main(flags)
    assert message in capsys.readouterr().err
