"""The real-weights benchmark: a DINOv2 encoder becomes a CLIP tower that computes the same, and its figures add up."""

import json
import math

import pytest
import real_weights
import torch
from real_weights_models import center, make_clip_tower
from transformers import Dinov2Config, Dinov2Model


@pytest.mark.parametrize("side", [28, 56])
def test_a_clip_tower_has_the_features_of_dinov2(side):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    dinov2 = Dinov2Model(config).eval()
    for parameter in dinov2.parameters():  # biases and LayerScale too, which begin as 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    pixel_values = torch.randn(2, 3, side, side)
    tower = make_clip_tower(dinov2.state_dict(), heads=2, image_size=side)
    with torch.inference_mode():
        found = tower(pixel_values, output_hidden_states=True)
        expected = dinov2(pixel_values, output_hidden_states=True)
    for own, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(center(own), center(theirs), rtol=0, atol=1e-4 * theirs.abs().max().item())
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-3)


def test_perplexity_is_over_all_tokens_but_each_texts_first():
    assert real_weights.measure_perplexity(lambda ids: torch.zeros(len(ids), 50), [[1, 2, 3], [4, 5]]) == pytest.approx(
        50
    )
    # The token after 0 is certain, the two after others are one of two: 2 bits on three tokens.
    halves = torch.full((3, 3), -math.inf)
    halves[0, 1] = halves[1, :2] = halves[2, :2] = 0.0
    found = real_weights.measure_perplexity(lambda ids: halves[torch.tensor(ids)], [[0, 1, 0], [2, 1]])
    assert found == pytest.approx(2 ** (2 / 3))


def test_texts_are_the_first_that_say_something(tmp_path, monkeypatch):
    monkeypatch.setattr(real_weights, "TEXTS", 2)
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"description": one}) + "\n" for one in ("一", " ", "二", "三")))
    assert real_weights.read_captions(captions) == ["一", "二"]
    prose = "A sentence of a page of documentation that is long enough to say something, and goes on after a comma."
    (tmp_path / "page.md").write_text(f"# Head\n\n{prose}\n\n| a | table |\n\nShort.\n")
    (tmp_path / "page.zh-CN.md").write_text(f"{prose}\n")
    assert real_weights.read_paragraphs(tmp_path) == [prose]


def test_losses_stand_beside_the_training_since_the_evaluation_before():
    history = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}, {"step": 3, "loss": 1.0}]
    other = [{"step": step, "loss": float(step)} for step in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.75}]
    assert real_weights.table_of_losses({"a": history, "b": other}).splitlines()[2:] == [
        "| 2 | 2.500 (3.000) | – |",
        "| 3 | – | 0.750 (2.000) |",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"description": "一"}]', 'line 1: \'[{"description": "一"}]\', expected {"description": text}'),
        ('{"description": "一"}\n{"caption": "二"}', 'line 2: \'{"caption": "二"}\', expected'),
        ('{"description": 3}', "line 1"),
        ('{"description": " "}', "no description says anything"),
        ("", "no description says anything"),
    ],
)
def test_captions_that_cannot_be_read_are_named_before_hours_of_training(tmp_path, capsys, content, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        real_weights.main(["check", "--captions", str(path)])
    assert f"error: {path}" in (error := capsys.readouterr().err) and message in error
