"""Training does what was asked: what learns, how fast, on which records, and what is written."""

import json
import math
import re
import shutil
import time
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import encode_example, read_losses, train_flags
from launching import run_with_torchrun
from PIL import Image
from safetensors.torch import load_file

import train
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.conversation import Turn
from meme_llava.dataset.images import open_image
from meme_llava.model import flops, trainable
from meme_llava.model.llava import load_llava, load_processing
from meme_llava.model.packed_llava import load_packed_llava
from meme_llava.pipeline import precheck
from meme_llava.train import loop, prepared_run, run_plan, session
from meme_llava.train.settings import parse_train_arguments

ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "manifest.json",
    "processor_config.json",
    "run_record.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
}
RESUME_FILES = {"optimizer-00001-of-00001.safetensors"}
# The tiny vision tower has three layers; features come from the second, so the third never learns.
VISION_LORA = {
    f"model.vision_tower.encoder.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("mlp.fc1", "mlp.fc2"),
    )
}
LANGUAGE_LORA = {
    f"model.language_model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
}
PROJECTOR = {f"model.multi_modal_projector.linear_{index}.{kind}" for index in (1, 2) for kind in ("weight", "bias")}


def test_output_and_checkpoint_hold_exactly_what_they_should(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == ADAPTER_FILES | {"checkpoint-2", "training_curves.png"}
    assert {path.name for path in (trained / "checkpoint-2").iterdir()} == ADAPTER_FILES | RESUME_FILES


def test_lora_reaches_all_thirteen_projections_and_no_dead_layer(trained):
    names = set(load_file(trained / "adapter_model.safetensors"))
    lora = {name.removeprefix("base_model.model.") for name in names if "lora_" in name}
    expected = {f"{name}.lora_{side}.weight" for name in VISION_LORA | LANGUAGE_LORA for side in "AB"}
    assert lora == expected
    assert {name.removeprefix("base_model.model.") for name in names if "lora_" not in name} == PROJECTOR


def test_every_lora_matrix_and_the_projector_learned(world, trained):
    tensors = load_file(trained / "adapter_model.safetensors")
    base = load_file(world.base / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        if name.endswith("lora_B.weight"):
            assert tensor.abs().max() > 0, f"{name} is still zero"
        elif "multi_modal_projector" in name:
            assert not torch.equal(tensor, base[name.removeprefix("base_model.model.model.")]), name


def test_run_record_holds_every_number(world, trained):
    record = json.loads((trained / "run_record.json").read_text())
    assert record["stage"] == "train" and record["finished"] is True and record["step"] == 2
    assert record["settings"]["high_lr"] == 1e-2 and record["settings"]["low_lr"] == 5e-3
    assert record["schedule"] == {
        "steps": 2,
        "warmup_steps": 0,
        "processes": 1,
        "accumulation": 1,
        "engine": "single",
    }
    assert record["position"] == {"step": 2, "records": 8}
    assert record["data"]["records"] == 8 and record["data"]["images"] == 8
    assert record["base"]["folder"] == str(world.base)
    assert record["base"]["run_record"]["stage"] == "build"
    assert record["environment"]["libraries"]["torch"] == version("torch")
    # LoRA matrices: per vision layer 5 of 16x16.. written out: r=4 times (in + out) of each projection.
    vision = 2 * 4 * (4 * (16 + 16) + 2 * (16 + 32))
    language = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + 3 * (32 + 48))
    projector = [32 * 16 + 32 * 32, 32 + 32]
    groups = [(g["role"], g["tensors"], g["parameters"], g["learning_rate"]) for g in record["parameter_groups"]]
    assert groups == [
        ("vision_tower", 24, vision, 5e-3),
        ("multi_modal_projector", 2, projector[0], 1e-2),
        ("multi_modal_projector", 2, projector[1], 1e-2),
        ("language_model", 28, language, 5e-3),
    ]


USED_VISION = (
    "model.vision_tower.embeddings",
    "model.vision_tower.pre_layrnorm",
    *(f"model.vision_tower.encoder.layers.{i}." for i in (0, 1)),
)


def keep_loaded_models(monkeypatch) -> list:
    """Gets every model that training loads."""
    models = []
    monkeypatch.setattr(
        prepared_run,
        "load_packed_llava",
        lambda *given, **options: models.append(load_packed_llava(*given, **options)) or models[-1],
    )
    return models


@pytest.mark.parametrize(
    ("train_type", "learning_prefixes"),
    [
        ("projector", ("model.multi_modal_projector",)),
        ("freeze_vision", ("model.multi_modal_projector", "model.language_model", "lm_head")),
        ("full", ("model.multi_modal_projector", "model.language_model", "lm_head", *USED_VISION)),
    ],
)
def test_exactly_the_promised_tensors_change(world, tmp_path, monkeypatch, train_type, learning_prefixes):
    """Two real steps; every parameter that should move moves, every other is bit-identical."""
    models = keep_loaded_models(monkeypatch)
    train.main(train_flags(world, tmp_path / "out", train_type=train_type, max_steps=2))
    before = dict(load_llava(world.base, torch.float32).named_parameters())
    changed = {name for name, parameter in models[0].named_parameters() if not torch.equal(parameter, before[name])}
    # A token that no record holds gets a zero gradient; the embedding as a whole moves.
    expected = {name for name in before if name.startswith(learning_prefixes)}
    assert changed == expected
    saved = load_file(tmp_path / "out" / "trained_weights.safetensors")
    assert len(saved) == len(expected)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    expected_files = ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"}
    expected_files |= {"trained_weights.safetensors", "checkpoint-2", "training_curves.png", "trainer_state.json"}
    assert files == expected_files


def test_lora_leaves_every_base_tensor_alone(world, tmp_path, monkeypatch):
    models = keep_loaded_models(monkeypatch)
    train.main(train_flags(world, tmp_path / "out"))
    before = dict(load_llava(world.base, torch.float32).named_parameters())
    seen = 0
    for name, parameter in models[0].named_parameters():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if plain in before:
            assert torch.equal(parameter, before[plain]), name
            seen += 1
    assert seen == len(before)


@pytest.mark.parametrize(("role", "expected"), [("vision", VISION_LORA), ("language", LANGUAGE_LORA)])
def test_lora_can_be_asked_for_by_role(world, tmp_path, role, expected):
    other = "language_model_training" if role == "vision" else "vision_tower_training"
    train.main(train_flags(world, tmp_path / "out", **{other: "frozen"}, max_steps=1))
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    adapted = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in names if "lora_" in name}
    assert adapted == expected


def test_learning_rates_follow_the_schedule_computed_by_hand(world, tmp_path):
    """Eight steps, two of warmup, cosine: the rate of step k is the schedule's value at k - 1."""
    flags = train_flags(world, tmp_path / "out", max_steps=8, warmup_ratio=0.25, high_lr=1e-3, low_lr=2e-5)
    train.main(flags)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    factors = [0.0, 0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 6)) for step in (1, 2, 3, 4, 5)]
    assert factors[5] == pytest.approx(0.5)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 7, 8]
    for role, peak in (("multi_modal_projector", 1e-3), ("vision_tower", 2e-5), ("language_model", 2e-5)):
        rates = [entry[f"learning_rate/{role}"] for entry in log]
        assert rates == pytest.approx([peak * factor for factor in factors], rel=1e-6)
    assert all("learning_rate" not in entry for entry in log)
    assert log[-1]["epoch"] == 4.0  # 8 steps of 4 records, 8 records


def test_linear_schedule_and_warmup_steps(world, tmp_path):
    flags = train_flags(world, tmp_path / "out", max_steps=4, warmup_steps=1, lr_scheduler_type="linear", high_lr=1e-3)
    train.main(flags)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate/multi_modal_projector"] for entry in log if "loss" in entry]
    assert rates == pytest.approx([0.0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


def test_optimizer_groups_never_decay_biases_and_norms(world):
    arguments = parse_train_arguments(train_flags(world, "unused", train_type="full", weight_decay=0.1), "")
    model = trainable.prepare_trainable(load_llava(world.base, torch.float32), arguments, seed=0)
    groups = trainable.plan_parameter_groups(model, arguments)
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert decay["model.language_model.layers.0.mlp.up_proj.weight"] == 0.1
    assert decay["model.multi_modal_projector.linear_1.weight"] == 0.1
    for name in (
        "model.multi_modal_projector.linear_1.bias",
        "model.language_model.layers.0.input_layernorm.weight",
        "model.language_model.layers.0.self_attn.q_proj.bias",
        "model.vision_tower.encoder.layers.0.layer_norm1.weight",
        "model.vision_tower.embeddings.class_embedding",
    ):
        assert decay[name] == 0.0, name


def test_accumulation_gives_the_losses_of_one_big_batch(world, tmp_path):
    """1 x 8 = 8 x 1, although the records' answers differ in length."""
    for name, device_batch in (("big", 8), ("small", 1)):
        flags = train_flags(
            world, tmp_path / name, global_batch_size=8, device_batch_size=device_batch, max_steps=4, lora_dropout=0
        )
        train.main(flags)
    big, small = read_losses(tmp_path / "big"), read_losses(tmp_path / "small")
    assert len(big) == 4
    assert small == pytest.approx(big, abs=2e-6)


@pytest.mark.parametrize("average", ["token", "caption"])
def test_what_weighs_the_same_does_not_depend_on_the_split(world, tmp_path, average):
    """8 x 1 and 1 x 8, with and without sharing: the losses are the same."""
    changes = {"global_batch_size": 8, "max_steps": 3, "lora_dropout": 0, "loss_average": average}
    train.main(train_flags(world, tmp_path / "big", device_batch_size=8, **changes))
    train.main([*train_flags(world, tmp_path / "small", device_batch_size=1, **changes), "--no_shared_images"])
    expected = read_losses(tmp_path / "big")
    assert read_losses(tmp_path / "small") == pytest.approx(expected, abs=5e-6)


@pytest.mark.long
def test_torchrun_starts_it_too_and_two_processes_average_captions_as_one_does(world, tmp_path):
    changes = {"global_batch_size": 8, "max_steps": 3, "lora_dropout": 0, "loss_average": "caption"}
    train.main(train_flags(world, tmp_path / "one", device_batch_size=8, **changes))
    result = run_with_torchrun(["train.py", *train_flags(world, tmp_path / "two", device_batch_size=2, **changes)])
    assert result.returncode == 0, result.stderr
    assert "2 processes x 2 accumulated" in result.stdout
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=5e-6)


def test_a_short_answer_weighs_as_much_as_a_long_one_when_captions_are_averaged(world, tmp_path):
    """All eight records in one step: the first loss, recomputed from each record's own mean."""
    changes = {"global_batch_size": 8, "device_batch_size": 8, "max_steps": 1}
    losses = {}
    for average in ("token", "caption"):
        train.main(train_flags(world, tmp_path / average, loss_average=average, **changes))
        losses[average] = read_losses(tmp_path / average)[0]
    sums_and_counts = measure_records(world)
    assert losses["caption"] == pytest.approx(sum(total / count for total, count in sums_and_counts) / 8, abs=1e-5)
    by_token = sum(total for total, _ in sums_and_counts) / sum(count for _, count in sums_and_counts)
    assert losses["token"] == pytest.approx(by_token, abs=1e-5)
    assert abs(losses["token"] - losses["caption"]) > 1e-3


def make_turns(record: dict) -> list[Turn]:
    roles = {"human": "user", "gpt": "assistant"}
    return [Turn(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]


def measure_records(world) -> list[tuple[float, int]]:
    """Every record's sum of losses and number of supervised tokens, from the base model and the labels alone."""
    processing, model = load_processing(world.base), load_llava(world.base, torch.float32).eval()
    measured = []
    for record in world.records:
        example = encode_example(processing.encoder, make_turns(record))
        images = record.get("image", [])
        paths = [world.image_folder / name for name in ([images] if isinstance(images, str) else images)]
        pixels = [to_pixel_values(open_image(path), processing.image_policy) for path in paths]
        with torch.no_grad():
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids, pixel_values=torch.stack(pixels) if pixels else None).logits[0]
        losses = [
            -float(torch.log_softmax(logits[position - 1].double(), dim=-1)[label])
            for position, label in enumerate(example.labels)
            if label != -100
        ]
        measured.append((sum(losses), len(losses)))
    return measured


def test_the_log_says_how_fast_it_went_and_what_it_waited_for(world, tmp_path):
    """Two captions of each image: 8 images for 16 captions, whose shared beginnings are computed once."""
    records = json.loads(json.dumps(world.records[4:]))
    for record in world.records[4:]:
        other = json.loads(json.dumps(record, ensure_ascii=False))
        other["id"] += "b"
        other["conversations"][1]["value"] = "困了，" + other["conversations"][1]["value"]
        records.append(other)
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False))
    changes = {"annotations": annotations, "global_batch_size": 8, "device_batch_size": 8, "max_steps": 2}
    figures = {}
    for name, flags in (("shared", []), ("alone", ["--no_shared_images"])):
        train.main([*train_flags(world, tmp_path / name, **changes), *flags])
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        figures[name] = [entry for entry in log if "loss" in entry][1]
    encoder = load_processing(world.base).encoder
    lengths = [len(encode_example(encoder, make_turns(record)).input_ids) for record in records]
    shared, alone = figures["shared"], figures["alone"]
    assert alone["positions_per_caption"] == pytest.approx(sum(lengths) / 8)
    assert shared["positions_per_caption"] < 0.7 * alone["positions_per_caption"]
    assert (shared["images_per_caption"], alone["images_per_caption"]) == (0.5, 1)
    for entry in (shared, alone):
        assert entry["useful_token_share"] == 1 and 0 < entry["data_wait_share"] < 1
        assert entry["captions_per_second"] > 0 and entry["model_tflops_per_second"] > 0
        assert entry["tokens_per_second"] == pytest.approx(
            entry["captions_per_second"] * entry["positions_per_caption"]
        )
        assert "mfu" not in entry  # a CPU has no datasheet


def test_writing_a_checkpoint_between_two_log_lines_is_not_training(world, tmp_path, monkeypatch):
    """By the meter's clock each takes a thousand seconds."""
    saves, write = [], loop.write_checkpoint
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * len(saves))
    monkeypatch.setattr(flops, "time", clock)
    monkeypatch.setattr(loop, "write_checkpoint", lambda *given: saves.append(write(*given)))
    train.main(train_flags(world, tmp_path / "out", max_steps=2, save_steps=1, logging_steps=2))
    (entry,) = read_log(tmp_path / "out")
    assert len(saves) == 2 and 8 / entry["captions_per_second"] < 1000


def test_resumed_run_equals_the_uninterrupted_one(world, tmp_path):
    """Dropout on, accumulation, across a pass over the records: losses and weights are the same bits."""
    changes = {"max_steps": 6, "save_steps": 3, "global_batch_size": 4, "device_batch_size": 2, "lora_dropout": 0.1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(train_flags(world, whole, **changes))
    cut.mkdir()
    (whole / "checkpoint-3").rename(cut / "checkpoint-3")
    train.main(train_flags(world, cut, **changes, resume_from_checkpoint="latest"))
    assert read_losses(cut) == read_losses(whole)
    expected = load_file(whole / "adapter_model.safetensors")
    resumed = load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_resuming_a_finished_run_changes_nothing(world, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train.main(train_flags(world, trained, resume_from_checkpoint="latest"))
    assert f"nothing left to train: {trained}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize("train_type", ["projector", "full"])
def test_a_run_without_lora_resumes_too(world, tmp_path, train_type):
    changes = {"max_steps": 4, "save_steps": 2, "train_type": train_type}
    train.main(train_flags(world, tmp_path / "whole", **changes))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    train.main(train_flags(world, tmp_path / "cut", **changes, resume_from_checkpoint=checkpoint))
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "whole")
    resumed, expected = (load_file(tmp_path / name / "trained_weights.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def fail(capsys, flags, main=train.main, code=2):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_lr": 1e-3}, "low_lr was 0.005, is 0.001"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"global_batch_size": 8}, "global_batch_size was 4, is 8"),
        ({"lora_r": 8, "allow_changes": ""}, "lora_r was 4, is 8. Other tensors would learn"),
    ],
)
def test_resuming_with_another_recipe_is_refused(world, trained, tmp_path, capsys, changes, message):
    changes = {"resume_from_checkpoint": trained / "checkpoint-2", **changes}
    flags = [flag for flag in train_flags(world, tmp_path / "out", **changes) if flag]
    assert message in fail(capsys, flags, code=4)


def test_a_cpu_that_multiplies_bf16_may_train_in_bf16(world, tmp_path, monkeypatch, capsys):
    """Steps compute in bf16 with plain matrix products; what learns is kept in float32 and comes out nearly alike."""
    monkeypatch.setattr("meme_llava.train.session.multiplies_bf16", lambda: True)
    losses = {}
    for precision in ("fp32", "bf16"):
        train.main(train_flags(world, tmp_path / precision, precision=precision, max_steps=2, logging_steps=1))
        losses[precision] = read_losses(tmp_path / precision)
        attention = "matmul" if precision == "bf16" else "sdpa"
        assert f"attention {attention};" in capsys.readouterr().out
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    weights = load_file(tmp_path / "bf16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_resuming_on_other_data_is_refused(world, trained, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(world.records[:7], ensure_ascii=False))
    flags = train_flags(world, tmp_path / "out", annotations=other, resume_from_checkpoint=trained / "checkpoint-2")
    assert "the annotations' contents changed" in fail(capsys, flags, code=4)


def test_wrong_settings_stop_before_the_model_loads(world, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared_run, "load_packed_llava", lambda *given, **options: pytest.fail("was loaded"))
    out = tmp_path / "out"

    def message(**changes):
        return fail(capsys, train_flags(world, out, **changes))

    assert "--learning_rate" in fail(capsys, [*train_flags(world, out), "--learning_rate", "1"])
    assert "did you mean --high_lr?" in fail(capsys, [*train_flags(world, out), "--hihg_lr", "1"])
    assert "not a multiple of --device_batch_size 3" in message(device_batch_size=3)
    assert "no such recipe" in message(train_type="galore")
    assert "warmup takes 2 of 2 steps" in message(warmup_steps=2)
    assert "no such model folder" in message(model=tmp_path / "nowhere")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": ')
    assert "config.json: ends in the middle. Download, copy or make it again." in message(model=tmp_path / "damaged")
    assert "nowhere.json: No such file or directory" in message(annotations=tmp_path / "nowhere.json")
    assert "no such image folder" in message(image_folder=tmp_path / "nowhere")
    assert "is not empty" in fail(capsys, train_flags(world, trained))
    assert "holds no checkpoint" in fail(capsys, train_flags(world, out, resume_from_checkpoint="latest"), code=4)
    assert "no manifest.json" in fail(capsys, train_flags(world, out, resume_from_checkpoint=tmp_path), code=4)
    assert "--engine zero7: no such engine; there are auto, single, ddp, " in message(engine="zero7")
    assert "--engine fsdp2 divides state among several processes, and there is one" in message(engine="fsdp2")
    assert "--save_total_limit is 1, expected at least 2" in message(save_total_limit=1)
    monkeypatch.setattr("meme_llava.train.session.multiplies_bf16", lambda: False)
    assert "--precision bf16 needs a GPU here: on a CPU without AMX or AVX512_BF16" in message(precision="bf16")
    assert "--attention varlen needs a GPU" in message(attention="varlen")
    assert "--accelerator and --gpus belong to --plan" in message(accelerator="a800-80gb")
    assert "pass one of them" in fail(capsys, [*train_flags(world, out), "--plan", "--show_batch"])
    # Prompt and image take 40 positions or more.
    assert "needs" in message(model_max_length=20)
    assert not out.exists()


def test_lora_pattern_that_matches_nothing_is_an_error(world, tmp_path, capsys):
    error = fail(capsys, train_flags(world, tmp_path / "out", lora_vision_modules=["q_proj", "o_proj"]))
    assert "LoRA module 'o_proj' matches nothing in the vision_tower; it has fc1, fc2, k_proj, out_proj" in error


def test_bad_records_are_all_named_or_quarantined(world, tmp_path, capsys):
    records = json.loads(json.dumps(world.records))
    records[0]["image"] = "gone.png"
    records[5]["conversations"][1]["value"] = " "
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False))
    error = fail(capsys, train_flags(world, tmp_path / "out", annotations=annotations))
    assert "2 of 8 records cannot be trained on" in error
    assert "record 0 (id 'r0')" in error and "gone.png" in error
    assert "record 5 (id 'r5'): conversations[1].value is ' '" in error
    train.main(train_flags(world, tmp_path / "out", annotations=annotations, bad_records="quarantine", max_steps=1))
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["record_id"] for line in lines) == ["r0", "r5"]
    record = json.loads((tmp_path / "out" / "run_record.json").read_text())
    assert (record["data"]["records"], record["data"]["bad_records"]) == (6, 2)


def test_left_out_records_are_counted_in_every_line_and_log(world, tmp_path, capsys):
    records = json.loads(json.dumps(world.records))
    records[0]["conversations"][1]["value"] = "抱歉，我无法回答。"
    records[4]["id"] = "r1"
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False))
    flags = train_flags(world, tmp_path / "out", annotations=annotations, bad_records="quarantine", max_steps=2)
    train.main(flags)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert lines and all(line.endswith(", 2 records quarantined") for line in lines)
    assert f"2 bad records left out and listed in {tmp_path / 'out' / 'quarantine.jsonl'}" in printed
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["quarantined_records"] for entry in state["log_history"]] == [2] * len(state["log_history"])
    data = json.loads((tmp_path / "out" / "run_record.json").read_text())["data"]
    assert (data["records"], data["bad_records"]) == (6, 2)
    assert data["findings"] == {"duplicate_id": 1, "refusal": 1, "low_resolution": 8}  # all 8 images are tiny


def test_without_bad_records_no_line_speaks_of_them(world, trained, tmp_path, capsys):
    assert not any("quarantined_records" in entry for entry in read_log(trained))
    train.main(train_flags(world, tmp_path / "out", max_steps=1))
    assert "quarantine" not in capsys.readouterr().out


def read_log(output_dir) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def test_kinds_are_allowed_and_refused_by_flags(world, tmp_path, capsys):
    records = json.loads(json.dumps(world.records))
    records[0]["conversations"][1]["value"] = "抱歉，我无法回答。"
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False))
    error = fail(capsys, train_flags(world, tmp_path / "out", annotations=annotations))
    assert "1 of 8 records cannot be trained on" in error and "[refusal]" in error
    train.main(train_flags(world, tmp_path / "out", annotations=annotations, allow="refusal", max_steps=1))
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    refuse = train_flags(world, tmp_path / "other", refuse="cut_answer", model_max_length=63)
    assert "1 of 8 records cannot be trained on" in fail(capsys, refuse)
    assert "--allow refusals: no such kind" in fail(capsys, train_flags(world, tmp_path / "other", allow="refusals"))


def test_after_the_precheck_a_damaged_image_stops_the_run_before_the_model_is_loaded(
    world, tmp_path, monkeypatch, capsys
):
    """Behind its header the image is damaged; precheck and training both decode it."""
    images = tmp_path / "images"
    shutil.copytree(world.image_folder, images)
    Image.effect_noise((200, 200), 90).save(images / "p5.png")
    (images / "p5.png").write_bytes((images / "p5.png").read_bytes()[:-5000])
    flags = train_flags(world, tmp_path / "out", image_folder=images)
    with pytest.raises(SystemExit) as stop:
        precheck.main(flags)
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert "1 of 8 records cannot be trained on" in found
    assert "annotations.json record 5 (id 'r5'): " in found and "[damaged_image]" in found

    with monkeypatch.context() as patch:
        patch.setattr(prepared_run, "load_packed_llava", lambda *_: pytest.fail("the model was loaded"))
        assert "annotations.json record 5 (id 'r5'): " in fail(capsys, flags)
    train.main([*flags, "--bad_records", "quarantine", "--max_steps", "1"])
    printed = capsys.readouterr().out
    assert "1 bad record left out" in printed and "never decoded" not in printed
    # The file is fixed: nothing that was found before holds it back.
    Image.new("RGB", (40, 30)).save(images / "p5.png")
    precheck.main(flags)
    assert "settings are sound, 8 records can be trained on" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_training_names_its_record(world, tmp_path, capsys, monkeypatch, workers):
    """It was sound when it was checked; the run stops with one line, no traceback."""
    images = tmp_path / "images"
    shutil.copytree(world.image_folder, images)
    Image.effect_noise((200, 200), 90).save(images / "p5.png")

    def damage_and_train(self, train=loop.TrainingLoop.train):
        (images / "p5.png").write_bytes((images / "p5.png").read_bytes()[:-5000])
        return train(self)

    monkeypatch.setattr(loop.TrainingLoop, "train", damage_and_train)
    error = fail(capsys, train_flags(world, tmp_path / "out", image_folder=images, dataloader_workers=workers))
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert line.startswith("error: annotations.json record 5 (id 'r5'): ") and "the image is damaged" in line
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "varlen"}, "--attention varlen needs a GPU"),
        ({"precision": "bf16"}, "--precision bf16 needs a GPU here"),
    ],
)
def test_what_a_machine_cannot_do_stops_before_data_is_read(world, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("meme_llava.train.session.multiplies_bf16", lambda: False)
    monkeypatch.setattr(precheck, "check_records", lambda *_, **__: pytest.fail("the data was checked first"))
    assert message in fail(capsys, train_flags(world, tmp_path / "out", **changes), precheck.main)


def test_one_process_with_several_gpus_is_refused(world, tmp_path, monkeypatch, capsys):
    """All but one of them would idle."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(session, "check_device", lambda arguments: None)
    assert "one process sees 4 GPUs" in fail(capsys, train_flags(world, tmp_path / "out"))


def test_a_tensor_without_gradient_stops_the_run(world, tmp_path, monkeypatch, capsys):
    """As if the dead last vision layer had been made trainable."""
    plan = prepared_run.plan_parameter_groups

    def with_dead_layer(model, *rates):
        layer = "vision_tower.encoder.layers.2.mlp.fc1.weight"
        next(p for name, p in model.named_parameters() if name.endswith(layer)).requires_grad_(True)
        return plan(model, *rates)

    monkeypatch.setattr(prepared_run, "plan_parameter_groups", with_dead_layer)
    error = fail(capsys, train_flags(world, tmp_path / "out"))
    assert "after the first step 1 tensors that should learn have no gradient" in error
    assert "encoder.layers.2.mlp.fc1.weight" in error


def test_the_optimizer_is_fused_and_workers_fetch_ahead(world, tmp_path, monkeypatch):
    optimizers, loaders = [], []
    monkeypatch.setattr(loop, "make_optimizer", lambda *a, make=loop.make_optimizer: keep(optimizers, make(*a)))
    monkeypatch.setattr(loop, "make_loader", lambda *a, make=loop.make_loader: keep(loaders, make(*a)))
    train.main(train_flags(world, tmp_path / "out", max_steps=1, dataloader_workers=1))
    assert type(optimizers[0]) is torch.optim.AdamW and optimizers[0].defaults["fused"]
    assert (loaders[0].num_workers, loaders[0].prefetch_factor) == (1, 4)
    # A CPU's cores compute the step; workers would take time from it.
    train.main(train_flags(world, tmp_path / "cpu", max_steps=1, dataloader_workers=None))
    assert loaders[-1].num_workers == 0


def keep(kept, thing):
    kept.append(thing)
    return thing


def test_text_only_records_train(world, tmp_path):
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps([world.records[3]], ensure_ascii=False))
    flags = train_flags(
        world, tmp_path / "out", annotations=annotations, global_batch_size=1, device_batch_size=1, max_steps=3
    )
    train.main(flags)
    losses = read_losses(tmp_path / "out")
    assert losses[2] < losses[0]


def test_gradient_checkpointing_changes_nothing_but_memory(world, tmp_path):
    for name, value in (("off", "none"), ("on", "full")):
        train.main(train_flags(world, tmp_path / name, gradient_checkpointing=value, max_steps=3, lora_dropout=0))
    assert read_losses(tmp_path / "on") == pytest.approx(read_losses(tmp_path / "off"), abs=1e-6)


def test_show_batch_prints_what_is_supervised_and_reads_no_weights(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_plan, "check_weights", lambda *_: pytest.fail("weights were read"))
    train.main([*train_flags(world, tmp_path / "out"), "--show_batch"])
    printed = capsys.readouterr().out
    assert "<image: 4 tokens at " in printed
    assert "【写着“爱了爱了”。<|im_end|>】" in printed
    assert not (tmp_path / "out").exists()


def test_tables_are_printed_before_the_first_step(world, tmp_path, capsys):
    train.main(train_flags(world, tmp_path / "out", train_type="projector", max_steps=1))
    printed = capsys.readouterr().out
    assert printed.index("What learns") < printed.index("1 step of 4 records") < printed.index("step 1/1")
    assert re.search(r"low_lr +0\.005 +\(not used by this run\)", printed)
    # Of the settings only those that are not as they would be by themselves.
    assert re.search(r"dataloader_workers +0", printed) and "weight_decay" not in printed
    assert re.search(r"^\d\d other settings have their defaults; docs/settings.md and run_record.json", printed, re.M)
    assert re.search(r"multi_modal_projector +matrices +2 +1,536 +0\.01 +0", printed)


def test_nothing_secret_and_no_pickled_arguments_are_written(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "CANARY_TOKEN")
    monkeypatch.setenv("WANDB_API_KEY", "CANARY_KEY")
    train.main(train_flags(world, tmp_path / "out", report_to="tensorboard", max_steps=1))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("tensorboard" in str(path) for path in files)
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in files)
    assert not any(b"CANARY" in path.read_bytes() for path in files)
