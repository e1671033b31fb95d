"""Merging: one standalone model that answers like base + adapter, or a sentence that says why not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, train_flags
from safetensors.torch import load_file, save_file
from test_build_base_model import BASE_FILES
from transformers import AutoProcessor, LlavaForConditionalGeneration

import build_base_model
import merge_lora
import train
from meme_llava import merging
from meme_llava.generation import load_answerer
from meme_llava.images import open_image
from meme_llava.model import load_llava
from meme_llava.trainable import apply_trained_weights


@pytest.fixture(scope="module")
def merged(world, trained):
    output_dir = world.folder / "merged"
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(output_dir)])
    return output_dir


def fail(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        merge_lora.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    return capsys.readouterr().err


def copy_adapter(trained, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    return adapter


def change_adapter(trained, tmp_path, change):
    adapter = copy_adapter(trained, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


def test_directory_holds_exactly_what_it_should(merged):
    assert {path.name for path in merged.iterdir()} == BASE_FILES


def test_every_tensor_is_float16_and_equals_the_formula(world, trained, merged):
    """W + alpha / r * B A, computed here from the files; LoRA r 4 and alpha 8 make the factor 2."""
    base = load_file(world.base / "model.safetensors")
    adapter = load_file(trained / "adapter_model.safetensors")
    stored = load_file(merged / "model.safetensors")
    assert stored.keys() == base.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    peft = "base_model.model."
    renamed = {
        "vision_tower.vision_model.": "model.vision_tower.",
        "language_model.model.": "model.language_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.lm_head.": "lm_head.",
    }
    used = set()
    for name, tensor in base.items():
        prefix = next(prefix for prefix in renamed if name.startswith(prefix))
        module = peft + renamed[prefix] + name.removeprefix(prefix)
        expected = tensor
        if module in adapter:
            expected = adapter[module]
            used.add(module)
        elif module.replace(".weight", ".lora_A.weight") in adapter:
            first, second = (module.replace(".weight", f".lora_{side}.weight") for side in "AB")
            expected = tensor + 2.0 * (adapter[second] @ adapter[first])
            used |= {first, second}
        assert torch.equal(stored[name], expected.half()), name
    assert used == adapter.keys()


def test_merged_model_gives_the_logits_of_base_and_adapter(world, trained, tmp_path):
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
    answerer = load_answerer(tmp_path / "merged")
    inputs = answerer.build_inputs(open_image(world.image_folder / "p0.png"), "图里写了什么？")
    unmerged = apply_trained_weights(load_llava(world.base, torch.float32), trained).eval()
    base = load_llava(world.base, torch.float32).eval()
    with torch.no_grad():
        ours, theirs, before = (model(**inputs).logits for model in (answerer.model, unmerged, base))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - before).abs().max() > 1e-2, "the adapter must make a difference, or this test shows nothing"


def test_merged_directory_loads_alone(merged, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(merged, alone)
    model, report = LlavaForConditionalGeneration.from_pretrained(alone, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float16
    assert AutoProcessor.from_pretrained(alone).image_token_id == model.config.image_token_id
    config = json.loads((alone / "config.json").read_text())
    assert [config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]] == ["float16"] * 3


def test_run_record_tells_the_whole_story(merged, trained):
    record = json.loads((merged / "run_record.json").read_text())
    assert record["stage"] == "merge" and record["settings"]["adapter"] == str(trained)
    assert record["summary"]["lora_merged"] == 26 and record["summary"]["replaced"] == 4
    assert record["training"]["stage"] == "train"
    assert record["training"]["base"]["run_record"]["stage"] == "build"


def test_comparison_is_printed(world, trained, tmp_path, capsys):
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged")])
    printed = capsys.readouterr().out
    assert "float32: largest logit difference" in printed
    assert "float32: greedy answers" in printed
    assert "standalone model" in printed


def test_merges_where_the_training_data_is_not(trained, tmp_path, capsys):
    """On another machine the comparison takes the sample memes, and says so."""
    adapter = copy_adapter(trained, tmp_path)
    record = json.loads((adapter / "run_record.json").read_text())
    record["data"]["annotations"] = str(tmp_path / "gone.json")
    (adapter / "run_record.json").write_text(json.dumps(record))
    merge_lora.main(["--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")])
    merged = json.loads((tmp_path / "merged" / "run_record.json").read_text())
    assert merged["checks"]["compared on"] == f"2 records of {ROOT / 'data' / 'annotations.json'}"


@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "full"])
def test_other_train_types_merge_and_answer(world, tmp_path, train_type):
    train.main(train_flags(world, tmp_path / "trained", train_type=train_type, max_steps=2))
    merge_lora.main(
        ["--adapter", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"]
    )
    trained = load_file(tmp_path / "trained" / "trained_weights.safetensors")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(world.base / "model.safetensors")
    assert all(torch.equal(stored[name], trained.get(name, tensor)) for name, tensor in base.items())
    assert not all(torch.equal(stored[name], base[name]) for name in trained)


def test_a_checkpoint_merges_like_the_final_output(trained, merged, tmp_path):
    merge_lora.main(["--adapter", str(trained / "checkpoint-2"), "--output_dir", str(tmp_path / "merged")])
    ours, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", merged))
    assert all(torch.equal(ours[name], final[name]) for name in final)


def test_moved_base_is_found_with_base_model(world, trained, merged, tmp_path, capsys):
    adapter = copy_adapter(trained, tmp_path)
    record = json.loads((adapter / "run_record.json").read_text())
    record["base"]["folder"] = str(tmp_path / "gone")
    (adapter / "run_record.json").write_text(json.dumps(record))
    out = tmp_path / "merged"
    assert "say where it is with --base_model" in fail(capsys, "--adapter", adapter, "--output_dir", out)
    merge_lora.main(["--adapter", str(adapter), "--output_dir", str(out), "--base_model", str(world.base)])
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_another_base_of_equal_shapes_is_refused(world, trained, tmp_path, capsys):
    other = tmp_path / "other"
    build_base_model.main(
        [
            *("--language_model", str(world.language_model), "--vision_model", str(world.vision_tower)),
            *("--output_dir", str(other), "--seed", "1"),
        ]
    )
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--base_model", other)
    assert f"{other}: is not the base model that {trained} was trained on" in error
    assert not (tmp_path / "out").exists()


def rename(tensors, ending, new_ending, keep=True):
    """Rename the first tensor that ends so; without `keep`, to the new name alone."""
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name.removesuffix(ending) + new_ending if keep else f"base_model.model.{new_ending}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: rename(t, "q_proj.lora_B.weight", "x.lora_B.weight"), "has lora_A but no lora_B"),
        (lambda t: rename(t, "q_proj.lora_A.weight", "x.lora_A.weight"), "has no lora_A"),
        (lambda t: rename(t, "linear_1.bias", "lm_head.bias", keep=False), "is neither LoRA nor projector"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "holds 57 tensors, but 56 learned"),
        (lambda t: t.pop("base_model.model.model.multi_modal_projector.linear_1.bias"), "holds 55 tensors"),
        (
            lambda t: t.update({n: x[:, :2].contiguous() for n, x in t.items() if n.endswith("linear_1.weight")}),
            "in the trained weights",
        ),
    ],
)
def test_incomplete_or_foreign_adapters_are_refused(trained, tmp_path, capsys, change, message):
    adapter = change_adapter(trained, tmp_path, change)
    assert message in fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dropped_lora_pair_is_noticed(trained, tmp_path, capsys):
    """Both halves gone: nothing dangles, but the model would not be the trained one."""

    def drop_pair(tensors):
        module = next(name for name in tensors if name.endswith("q_proj.lora_A.weight")).removesuffix("lora_A.weight")
        del tensors[f"{module}lora_A.weight"], tensors[f"{module}lora_B.weight"]

    adapter = change_adapter(trained, tmp_path, drop_pair)
    assert "holds 54 tensors, but 56 learned" in fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "message"),
    [(7e4, "has 1, such as 70000"), (float("nan"), "has 1, such as nan"), (-float("inf"), "has 1, such as -inf")],
)
def test_a_value_that_float16_cannot_hold_names_its_tensor(trained, tmp_path, capsys, value, message):
    def set_value(tensors):
        tensors["base_model.model.model.multi_modal_projector.linear_2.bias"][3] = value

    adapter = change_adapter(trained, tmp_path, set_value)
    error = fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")
    assert "multi_modal_projector.linear_2.bias" in error and message in error
    assert not (tmp_path / "out").exists()


def test_special_lora_is_refused_by_name(trained, tmp_path, capsys):
    adapter = copy_adapter(trained, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["use_dora"] = True
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "uses use_dora" in fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")


def test_wrong_folders_stop_with_a_sentence(world, trained, merged, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such directory" in fail(capsys, "--adapter", tmp_path / "nowhere", "--output_dir", out)
    assert "holds neither adapter_model.safetensors" in fail(capsys, "--adapter", world.base, "--output_dir", out)
    assert "is not empty" in fail(capsys, "--adapter", trained, "--output_dir", merged)
    assert "invalid choice: 'int8'" in fail(capsys, "--adapter", trained, "--output_dir", out, "--dtype", "int8")
    assert "the following arguments are required: --output_dir" in fail(capsys, "--adapter", trained)
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in fail(capsys, "--adapter", trained, "--output_dir", file)


def test_a_wrong_merge_is_an_error_and_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    """The comparison must catch a merge that scales LoRA wrongly."""
    read = merging.TrainedWeights.read.__func__

    def read_wrongly(cls, folder):
        trained = read(cls, folder)
        lora = {name: replace(pair, scale=pair.scale * 1.5) for name, pair in trained.lora.items()}
        return replace(trained, lora=lora)

    monkeypatch.setattr(merging.TrainedWeights, "read", classmethod(read_wrongly))
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out")
    assert "merged weights answer differently" in error
    assert list(tmp_path.iterdir()) == []
