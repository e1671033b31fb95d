"""Merging: one standalone model that answers like base + adapter, or a sentence that says why not."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import LANGUAGE_DIMENSIONS, ROOT, reseal, train_flags
from conversions import BASE_FILES, Bars, build, fail, make_clip, merge, save_language_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    ChineseCLIPVisionModel,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import build_base_model
import merge_lora
import train
from meme_llava.convert import export_clip, merge_check
from meme_llava.convert import merge as merging
from meme_llava.convert.merge import TrainedWeights
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.images import open_image
from meme_llava.errors import CheckpointError
from meme_llava.inference.generation import load_answerer
from meme_llava.model import offloading
from meme_llava.model.llava import load_llava, load_processing, to_disk_name
from meme_llava.model.trainable import apply_trained_weights, save_trained_weights
from meme_llava.storage import tensor_files
from meme_llava.storage.run_record import verify_directory, write_manifest
from meme_llava.storage.tensor_writer import Rounding


@pytest.fixture(scope="module")
def merged(world, trained):
    output_dir = world.folder / "merged"
    merge(["--adapter", str(trained), "--output_dir", str(output_dir)])
    return output_dir


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
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
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
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged")])
    printed = capsys.readouterr().out
    assert "float32: largest logit difference" in printed
    assert "float32: greedy answers" in printed
    assert "standalone model" in printed


def compare_with_data(trained, tmp_path, **data):
    """What a merge says it compared, the training data being `data` as far as given."""
    adapter = copy_adapter(trained, tmp_path)
    record = json.loads((adapter / "run_record.json").read_text())
    record["data"] |= {name: str(path) for name, path in data.items()}
    (adapter / "run_record.json").write_text(json.dumps(record))
    merge(["--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")])
    return read_checks(tmp_path / "merged")["compared on"]


@pytest.mark.parametrize(
    "gone, said", [("annotations", "No such file"), ("image_folder", "no record can be asked"), ("images", "no record")]
)
def test_merges_where_the_training_data_is_not(trained, tmp_path, world, gone, said):
    """On another machine the comparison takes the sample memes, and says so and why."""
    (tmp_path / "empty").mkdir()
    # Every record of these shows an image.
    with_images = tmp_path / "with_images.json"
    with_images.write_text(json.dumps(world.records[:3], ensure_ascii=False), encoding="utf-8")
    places = {"annotations": with_images, "image_folder": tmp_path / "empty"}
    places |= {gone: tmp_path / "gone"} if gone in places else {}
    compared = compare_with_data(trained, tmp_path, **places)
    assert compared.startswith(f"2 records of {ROOT / 'data' / 'annotations.json'}\n") and said in compared


def test_compares_on_the_first_records_that_can_be_asked(world, trained, tmp_path):
    """A damaged image costs its own record alone, and no image is opened for records that are not compared."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "p0.png").write_bytes(b"damaged")
    for name in ("p1.png", "p2.png", "p3.png"):
        shutil.copy(world.image_folder / name, images)
    compared = compare_with_data(trained, tmp_path, image_folder=images)
    assert compared == f"2 records of {world.annotations}"


def test_an_adapter_whose_first_records_are_text_merges(world, trained, tmp_path, capsys):
    """Such prompts come without an image, and so must the comparison's questions."""
    annotations = tmp_path / "text_first.json"
    annotations.write_text(json.dumps([world.records[3], *world.records[:3]], ensure_ascii=False), encoding="utf-8")
    train.main(train_flags(world, tmp_path / "adapter", annotations=annotations, max_steps=1))
    merge(["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    assert "float32: greedy answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "train_type", ["full", *(pytest.param(name, marks=pytest.mark.long) for name in ("projector", "freeze_vision"))]
)
def test_other_train_types_merge_and_answer(world, tmp_path, train_type):
    train.main(train_flags(world, tmp_path / "trained", train_type=train_type, max_steps=2))
    merge(["--adapter", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
    trained = load_file(tmp_path / "trained" / "trained_weights.safetensors")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(world.base / "model.safetensors")
    assert all(torch.equal(stored[name], trained.get(name, tensor)) for name, tensor in base.items())
    assert not all(torch.equal(stored[name], base[name]) for name in trained)


def test_a_checkpoint_merges_like_the_final_output(trained, merged, tmp_path):
    merge(["--adapter", str(trained / "checkpoint-2"), "--output_dir", str(tmp_path / "merged")])
    ours, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", merged))
    assert all(torch.equal(ours[name], final[name]) for name in final)


def test_moved_base_is_found_with_base_model(world, trained, merged, tmp_path, capsys):
    adapter = copy_adapter(trained, tmp_path)
    record = json.loads((adapter / "run_record.json").read_text())
    record["base"]["folder"] = str(tmp_path / "gone")
    (adapter / "run_record.json").write_text(json.dumps(record))
    out = tmp_path / "merged"
    assert "say where it is with --base_model" in fail(capsys, "--adapter", adapter, "--output_dir", out, code=4)
    merge(["--adapter", str(adapter), "--output_dir", str(out), "--base_model", str(world.base)])
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_another_base_of_equal_shapes_is_refused(world, trained, tmp_path, capsys):
    other = tmp_path / "other"
    build_base_model.main(
        [
            *("--language_model", str(world.language_model), "--vision_model", str(world.vision_tower)),
            *("--output_dir", str(other), "--seed", "1"),
        ]
    )
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--base_model", other, code=4)
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


def test_values_too_small_for_float16_are_counted(trained, tmp_path):
    """Half of the smallest subnormal, 2^-24, is rounded to the even 0; what is above it is not."""

    def set_values(tensors):
        tensors["base_model.model.model.multi_modal_projector.linear_2.bias"][:4] = torch.tensor(
            [2.0**-25, 1e-9, 0.0, 3.1e-8]
        )

    adapter = change_adapter(trained, tmp_path, set_values)
    merge(["--adapter", str(adapter), "--output_dir", str(tmp_path / "out"), "--no_verify"])
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "before"), "--no_verify"])
    counts = [
        json.loads((tmp_path / name / "run_record.json").read_text())["summary"]["underflow_count"]
        for name in ("out", "before")
    ]
    assert counts[0] - counts[1] == 2


def test_a_merge_that_float16_breaks_is_refused(trained, tmp_path, monkeypatch, capsys):
    """The weights in the file are not those of the comparison in float32, as if rounding had harmed them."""
    apply = Rounding.apply
    monkeypatch.setattr(Rounding, "apply", lambda self, name, values: apply(self, name, values * 0.5))
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out")
    assert "the weights as they are stored answer differently from base" in error
    assert error.endswith("answers are the same. Store them with --dtype bfloat16 or float32.\n")
    assert list(tmp_path.iterdir()) == []


CRAFTED = [
    ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
    ("adapter_config.json", {"lora_alpha": None}, "lora_alpha is null, expected a number"),
    ("adapter_config.json", {"lora_alpha": "32"}, 'lora_alpha is "32", expected a number'),
    ("adapter_config.json", {"r": 0}, "r, lora_alpha or a pattern of them is not above 0 and finite"),
    ("adapter_config.json", {"r": 4.0}, "r is 4.0, expected a whole number"),
    ("adapter_config.json", {"rank_pattern": {"q_proj": None}}, "a pattern of them is not above 0 and finite"),
    ("adapter_config.json", {"alpha_pattern": {"(a|a)*": 2}}, "a pattern is no name of a module"),
    ("adapter_config.json", {"exclude_modules": "(a|a)*b"}, "uses exclude_modules"),
    ("adapter_config.json", {"peft_type": "IA3"}, "is a IA3 adapter, expected LORA"),
    ("adapter_config.json", [], "holds a list, expected an object {…}"),
    ("run_record.json", [], "holds a list, expected an object {…}"),
    ("run_record.json", {"base": None}, "has no base.folder"),
    ("run_record.json", {"base": {"folder": None, "fingerprint": ""}}, "base.folder is null, expected text"),
    ("run_record.json", {"parameter_groups": 5}, "parameter_groups is 5, expected a list"),
    ("run_record.json", {"parameter_groups": [5]}, "has no tensors"),
    ("run_record.json", {"data": "x"}, "has no data.annotations"),
]


@pytest.mark.parametrize(("name", "change", "fault"), CRAFTED, ids=[f"{one[0]}-{one[2]}" for one in CRAFTED])
def test_a_crafted_file_of_an_adapter_is_one_sentence(trained, tmp_path, capsys, name, change, fault):
    adapter = copy_adapter(trained, tmp_path)
    content = json.loads((adapter / name).read_text())
    (adapter / name).write_text(json.dumps(content | change if change else change))
    reseal(adapter)
    with pytest.raises(SystemExit) as stop:
        merge_lora.main(["--adapter", str(adapter), "--output_dir", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code in (2, 4)
    assert line.startswith(f"error: {adapter / name}: ") and fault in line


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [
        ("", "is empty"),
        ("[]", "holds a list, expected an object {…}"),
        ('{"files": 5}', "has no manifest_sha256"),
        ('{"files": 5, "manifest_sha256": ""}', "files is 5, expected an object"),
        ('{"files": {}, "manifest_sha256": ""}', "is damaged (its own checksum differs)"),
    ],
)
def test_a_crafted_manifest_is_one_sentence(trained, tmp_path, capsys, manifest, fault):
    adapter = copy_adapter(trained, tmp_path)
    (adapter / "manifest.json").write_text(manifest)
    with pytest.raises(SystemExit) as stop:
        merge_lora.main(["--adapter", str(adapter), "--output_dir", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 4 and line.startswith(f"error: {adapter / 'manifest.json'}: {fault}")


@pytest.mark.parametrize("files", [{"../x": {"size": 1, "sha256": ""}}, {"x": 5}, {"x": {"size": "1", "sha256": ""}}])
def test_a_manifest_of_odd_files_is_damaged(tmp_path, files):
    write_manifest(tmp_path, files, {})
    with pytest.raises(CheckpointError, match="manifest.json: (lists '../x'|has no size|size is \"1\")"):
        verify_directory(tmp_path)


@pytest.mark.parametrize("target_modules", [5, None, "(a|a)" * 40 + "b"])
def test_target_modules_of_an_adapter_are_not_matched(world, trained, tmp_path, target_modules):
    """The weights say which modules are adapted; a regular expression of the file could take for ever."""
    adapter = copy_adapter(trained, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": target_modules}))
    reseal(adapter)
    found, expected = (
        apply_trained_weights(load_llava(world.base, torch.float32), one).state_dict() for one in (adapter, trained)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_damaged_base_is_no_base(world, trained, tmp_path, capsys):
    """One bit; the fingerprint of its run record tells, whatever the adapter was trained on."""
    shutil.copytree(world.base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    flags = ("--adapter", trained, "--output_dir", tmp_path / "out", "--base_model", tmp_path / "base")
    error = fail(capsys, *flags, code=4)
    assert f"error: {tmp_path / 'base'}: its weights are not those that it was written with" in error


def test_prompts_of_unequal_length_are_answered_together_as_alone(world, trained, merged, tmp_path):
    """By the stock classes, which pad on the side that our files name."""
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["padding_side"]  # as earlier versions wrote it
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--base_model", str(base), "--no_verify"])
    ours, theirs = (json.loads((one / "tokenizer_config.json").read_text()) for one in (tmp_path / "out", merged))
    assert ours == theirs and ours["padding_side"] == "left"
    model = LlavaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(merged)
    image = open_image(world.image_folder / "p0.png")
    prompts = [f"<image>\n{'图里写了什么？' * times}" for times in (1, 3)]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts
    ]

    def answer(texts):
        inputs = processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    assert answer(prompts) == [*answer(prompts[:1]), *answer(prompts[1:])]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7e4, "has 1, such as 70000. Train with a lower"),
        (float("nan"), "has 1, such as nan"),
        (-float("inf"), "has 1, such as -inf"),
    ],
)
def test_a_value_that_float16_cannot_hold_names_its_tensor(trained, tmp_path, capsys, value, message):
    def set_value(tensors):
        tensors["base_model.model.model.multi_modal_projector.linear_2.bias"][3] = value

    adapter = change_adapter(trained, tmp_path, set_value)
    error = fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")
    assert "multi_modal_projector.linear_2.bias" in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_bias", True, "uses lora_bias"),
        # It changes the base before training, so the stored base is another one.
        ("init_lora_weights", "pissa_niter_4", "uses init_lora_weights=pissa_niter_4"),
    ],
)
def test_special_lora_is_refused_by_name(trained, tmp_path, capsys, name, value, message):
    adapter = copy_adapter(trained, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config[name] = value
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert message in fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")


def test_an_output_never_replaces_its_inputs(world, trained, tmp_path, capsys):
    """--overwrite deletes what it replaces, so adapter and base are out of its reach."""
    adapter, base = copy_adapter(trained, tmp_path), tmp_path / "base"
    shutil.copytree(world.base, base)
    flags = ("--adapter", adapter, "--base_model", base, "--overwrite", "--output_dir")
    assert f"is, holds or lies in the adapter {adapter}" in fail(capsys, *flags, adapter)
    assert f"is, holds or lies in the adapter {adapter}" in fail(capsys, *flags, adapter / "merged")
    assert f"is, holds or lies in the base model {base}" in fail(capsys, *flags, base)
    (tmp_path / "run_record.json").write_text("{}")
    assert "is, holds or lies in the adapter" in fail(capsys, *flags, tmp_path)
    assert (adapter / "adapter_model.safetensors").is_file() and (base / "model.safetensors").is_file()


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


def scale_wrongly(monkeypatch, factor):
    """Let LoRA be merged with another scale than the adapter's."""
    read = merging.TrainedWeights.read.__func__

    def read_wrongly(cls, folder):
        trained = read(cls, folder)
        lora = {name: replace(pair, scale=pair.scale * factor) for name, pair in trained.lora.items()}
        return replace(trained, lora=lora)

    monkeypatch.setattr(merging.TrainedWeights, "read", classmethod(read_wrongly))


def test_a_wrong_merge_is_an_error_and_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    """The comparison must catch a merge that scales LoRA wrongly."""
    scale_wrongly(monkeypatch, 1.5)
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out")
    assert "merged weights answer differently" in error
    assert list(tmp_path.iterdir()) == []


def read_checks(folder):
    return json.loads((folder / "run_record.json").read_text())["checks"]


@pytest.fixture
def no_memory(monkeypatch):
    """No model fits any more, so comparisons run layer by layer."""
    monkeypatch.setattr(offloading, "measure_available_memory", lambda: 0)


@pytest.fixture(scope="module")
def trained_full(world):
    output_dir = world.folder / "trained_full"
    train.main(train_flags(world, output_dir, train_type="full", max_steps=2))
    return output_dir


@pytest.fixture(scope="module")
def trained_tied(world, tmp_path_factory):
    """An adapter for a language model whose head is its embedding, and that base."""
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, tie_word_embeddings=True, **LANGUAGE_DIMENSIONS)
    source = save_language_model(Qwen2ForCausalLM(config), world, folder / "source")
    base = build(source, world.vision_tower, folder / "base")
    train.main(train_flags(world, folder / "trained", model=base, max_steps=2))
    return folder / "trained"


@pytest.mark.parametrize(
    ("adapter", "tensors"),
    [("trained", 86), pytest.param("trained_full", 86, marks=pytest.mark.long), ("trained_tied", 85)],
)
def test_comparison_layer_by_layer(request, tmp_path, monkeypatch, no_memory, capsys, adapter, tensors):
    """Where memory is short the same comparison passes with four tokens a record; a tied head has no tensor."""
    adapter, bars = request.getfixturevalue(adapter), Bars()
    monkeypatch.setattr(merging, "show_bytes", bars)
    monkeypatch.setattr(merge_check, "show_count", bars)
    capsys.readouterr()
    merge(["--adapter", str(adapter), "--output_dir", str(tmp_path / "out")])
    assert "the models ran layer by layer from the disk" in " ".join(capsys.readouterr().out.split())
    checks = read_checks(tmp_path / "out")
    assert checks["the models ran"] == "layer by layer from the disk"
    assert 0 <= float(checks["float32: largest logit difference"].split()[0]) < 1e-4
    assert checks["float32: greedy answers"] == "same"
    assert checks["answer tokens compared"] == "8"
    assert set(bars.shown) == {"merging", "comparing layers"}
    assert all(total == shown > 0 for total, shown in bars.shown.values()), bars.shown
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == tensors


def test_a_tied_head_stays_tied(world, trained_tied, tmp_path):
    """In memory; embedding and head are not targets of LoRA, so both are the base's."""
    merge(["--adapter", str(trained_tied), "--output_dir", str(tmp_path / "out"), "--dtype", "float32"])
    assert read_checks(tmp_path / "out")["the models ran"] == "in memory"
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    base = load_file(trained_tied.parent / "base" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, base["language_model.model.embed_tokens.weight"])


def test_both_ways_of_comparing_run_the_same_model(trained, tmp_path, monkeypatch):
    """The unmerged model's answers and logits are the same in memory and layer by layer."""
    replies, reply = [], merge_check._reply

    def remember(*arguments):
        replies.append(reply(*arguments))
        return replies[-1]

    monkeypatch.setattr(merge_check, "_reply", remember)
    monkeypatch.setattr(merge_check, "VERIFIED_NEW_TOKENS", 4)
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "in memory")])
    monkeypatch.setattr(offloading, "measure_available_memory", lambda: 0)
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "layer by layer")])
    assert len(replies) == 4
    for loaded, offloaded in zip(replies[:2], replies[2:], strict=True):
        assert torch.equal(loaded.tokens, offloaded.tokens)
        assert torch.equal(loaded.logits, offloaded.logits)


@pytest.mark.parametrize("adapter", ["trained_tied", pytest.param("trained", marks=pytest.mark.long)])
def test_a_wrong_merge_is_noticed_layer_by_layer_too(request, tmp_path, monkeypatch, no_memory, capsys, adapter):
    adapter = request.getfixturevalue(adapter)
    scale_wrongly(monkeypatch, 1.5)
    assert "merged weights answer differently" in fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_replacement_is_noticed_layer_by_layer_too(trained_full, tmp_path, monkeypatch, no_memory, capsys):
    """One matrix that learned in full gets lost on the way into the merged model."""
    merge = TrainedWeights.merge

    def merge_wrongly(self, stored):
        factor = 0.0 if stored.name == "language_model.model.layers.1.mlp.down_proj.weight" else 1.0
        return (piece * factor for piece in merge(self, stored))

    monkeypatch.setattr(TrainedWeights, "merge", merge_wrongly)
    error = fail(capsys, "--adapter", trained_full, "--output_dir", tmp_path / "out")
    assert "merged weights answer differently" in error
    assert list(tmp_path.iterdir()) == []


def test_no_verify_writes_the_same_files_without_checks(trained, merged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meme_llava.convert.merge_check.verify_merged", None)
    monkeypatch.setattr("meme_llava.convert.export_clip.verify", None)
    out = tmp_path / "out"
    merge(["--adapter", str(trained), "--output_dir", str(out), "--no_verify"])
    printed = capsys.readouterr().out
    assert "Compared with" not in printed and f"standalone model: {out}" in printed
    assert read_checks(out) == {} and read_checks(merged) != {}
    for path in merged.iterdir():
        if path.name != "run_record.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (json.loads((folder / "run_record.json").read_text()) for folder in (out, merged))
    assert ours["summary"] == theirs["summary"] and ours["fingerprint"] == theirs["fingerprint"]


def make_adapter(world, trained, folder, **settings):
    """Save an adapter as peft itself makes it, every trained value random; gives peft's model."""
    model = load_llava(world.base, torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model\.layers\.\d+\..*(q_proj|o_proj|up_proj|down_proj)|.*vision_tower.*fc1",
        modules_to_save=["multi_modal_projector"],
        **settings,
    )
    model = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in name:  # lengths of rows
                    parameter.mul_(torch.rand_like(parameter).add_(0.5))
                else:
                    parameter.normal_(std=0.1 if "lora_" in name else 0.02)
    save_trained_weights(model, folder)
    record = json.loads((trained / "run_record.json").read_text())
    record["parameter_groups"] = [{"role": "all", "tensors": len(load_file(folder / "adapter_model.safetensors"))}]
    (folder / "run_record.json").write_text(json.dumps(record))
    return model


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        pytest.param({}, [2.0], id="plain", marks=pytest.mark.long),
        # alpha / sqrt(r) = 8 / 2
        pytest.param({"use_rslora": True}, [4.0], id="rslora", marks=pytest.mark.long),
        # 8 / 4, and 8 / 2, 8 / 3, 8 / 1 where a pattern says another rank
        pytest.param(
            {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3, "fc1": 1}},
            [2.0, 8 / 3, 4.0, 8.0],
            id="rank_pattern",
            marks=pytest.mark.long,
        ),
        # 2 / 4, 8 / 4, 16 / 4
        pytest.param(
            {"alpha_pattern": {"down_proj": 2, "layers.0.self_attn.o_proj": 16, "layers.1.self_attn.o_proj": 16}},
            [0.5, 2.0, 4.0],
            id="alpha_pattern",
            marks=pytest.mark.long,
        ),
        # fc1 8 / sqrt(9), the others 8 / sqrt(4), q_proj 18 / sqrt(9)
        pytest.param(
            {"use_rslora": True, "rank_pattern": {"q_proj": 9, "fc1": 9}, "alpha_pattern": {"q_proj": 18}},
            [8 / 3, 4.0, 6.0],
            id="all",
        ),
        pytest.param({"use_dora": True}, [2.0], id="dora", marks=pytest.mark.long),
        pytest.param(
            {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 9}}, [8 / 3, 4.0], id="all, dora"
        ),
    ],
)
def test_adapters_of_pefts_own_kinds_merge_as_peft_merges_them(world, trained, tmp_path, settings, scales):
    model = make_adapter(world, trained, tmp_path / "adapter", **settings)
    expected = {to_disk_name(name): tensor for name, tensor in model.merge_and_unload().state_dict().items()}
    weights = TrainedWeights.read(tmp_path / "adapter")
    assert sorted({pair.scale for pair in weights.lora.values()}) == pytest.approx(scales)
    flags = ["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"]
    merge(flags)
    found, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", world.base))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    # 2 layers x 4 projections, 3 vision layers, 4 tensors of the projector
    assert sum(not torch.equal(found[name], base[name]) for name in base) == 8 + 3 + 4
    assert read_checks(tmp_path / "merged")["float32: greedy answers"] == "same"


def test_a_rank_that_the_config_does_not_know_is_refused(world, trained, tmp_path, capsys):
    """With a wrong rank the scale would be wrong, too."""
    make_adapter(world, trained, tmp_path / "adapter", rank_pattern={"q_proj": 2})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["rank_pattern"] = {}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    error = fail(capsys, "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "out")
    assert "q_proj has rank 2, adapter_config.json says 4; copy or train it again" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, name: tensors.pop(name),
            "has lora_A but no lora_magnitude_vector, and adapter_config.json says",
        ),
        (lambda tensors, name: tensors.update({name: torch.ones(3)}), "lora_magnitude_vector is (3,), expected (32,)"),
        (lambda tensors, name: tensors.update({f"x.{name}": torch.ones(3)}), "has no lora_A"),
    ],
)
def test_a_dora_adapter_without_its_parts_is_refused(world, trained, tmp_path, capsys, change, message):
    make_adapter(world, trained, tmp_path / "adapter", use_dora=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if name.endswith("q_proj.lora_magnitude_vector")))
    save_file(tensors, path)
    record = json.loads((tmp_path / "adapter" / "run_record.json").read_text())
    record["parameter_groups"][0]["tensors"] = len(tensors)
    (tmp_path / "adapter" / "run_record.json").write_text(json.dumps(record))
    assert message in fail(capsys, "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only"}, "uses bias"),
        ({"lora_bias": True}, "uses lora_bias"),
    ],
)
def test_kinds_that_are_no_plain_lora_are_refused(world, trained, tmp_path, capsys, settings, message):
    """As peft saves them."""
    make_adapter(world, trained, tmp_path / "adapter", **settings)
    error = fail(capsys, "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "out")
    assert message in error and "which is not merged here; expected LoRA as train.py writes it" in error
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_written_twice_is_an_error(trained, tmp_path, monkeypatch):
    """One base tensor stands in another's place: equal shapes, so nothing else would notice without a comparison."""
    plan = merging.plan_merged

    def plan_twice(*arguments):
        planned = plan(*arguments)
        first, second = (f"language_model.model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        return planned | {second: planned[first]}

    monkeypatch.setattr(merging, "plan_merged", plan_twice)
    with pytest.raises(RuntimeError, match="2 base tensors were not used exactly once, e.g. .*layers.0.mlp.up_proj"):
        merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--no_verify"])
    assert list(tmp_path.iterdir()) == []


def test_a_trained_tensor_that_is_not_merged_is_an_error(trained, tmp_path, monkeypatch):
    """Both halves of a pair, and one replaced tensor, that reading has lost."""
    read = merging.TrainedWeights.read.__func__

    def lose(cls, folder):
        weights = read(cls, folder)
        return replace(
            weights, lora=dict(list(weights.lora.items())[1:]), replaced=dict(list(weights.replaced.items())[1:])
        )

    monkeypatch.setattr(merging.TrainedWeights, "read", classmethod(lose))
    with pytest.raises(RuntimeError, match="3 trained tensors were not used exactly once"):
        merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--no_verify"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("piece_elements", "tolerance"), [(500, 0.0), pytest.param(7, 1e-6, marks=pytest.mark.long)])
def test_pieces_of_rows_give_the_same_as_one_piece(trained, tmp_path, monkeypatch, piece_elements, tolerance):
    """The same bits from eight rows on; up to three rows are multiplied by another routine, with other last bits.

    A matrix of 48 x 32 comes as four pieces of 12 rows, as 16 of 3, or row by row with empty pieces between.
    """
    flags = ["--adapter", str(trained), "--dtype", "float32", "--no_verify", "--output_dir"]
    merge([*flags, str(tmp_path / "whole")])
    monkeypatch.setattr(merging, "PIECE_ELEMENTS", piece_elements)
    merge([*flags, str(tmp_path / "pieces")])
    whole, pieces = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=0, atol=tolerance, msg=name)


def test_values_that_do_not_fit_are_counted_over_all_tensors(trained, tmp_path, monkeypatch, capsys):
    """One in the first piece of a bias, two in its third, one in a matrix; the tensor with most of them is named."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 16)

    def set_values(tensors):
        prefix = "base_model.model.model.multi_modal_projector"
        tensors[f"{prefix}.linear_2.bias"][[3, 8, 9]] = torch.tensor([-7e4, float("nan"), 8e4])
        tensors[f"{prefix}.linear_1.weight"][0, 0] = 1e5

    adapter = change_adapter(trained, tmp_path, set_values)
    error = fail(capsys, "--adapter", adapter, "--output_dir", tmp_path / "out")
    assert (
        "4 values in 2 tensors are not finite in float16, which holds up to 65504: "
        "multi_modal_projector.linear_2.bias has 3, such as -70000." in error
    )


def test_the_largest_float16_is_no_overflow(trained, tmp_path):
    """65519.99 rounds to 65504, the largest float16; 65520 would be infinite."""

    def set_values(tensors):
        tensors["base_model.model.model.multi_modal_projector.linear_2.bias"][:2] = torch.tensor([65519.99, -65519.99])

    adapter = change_adapter(trained, tmp_path, set_values)
    merge(["--adapter", str(adapter), "--output_dir", str(tmp_path / "out"), "--no_verify"])
    stored = load_file(tmp_path / "out" / "model.safetensors")["multi_modal_projector.linear_2.bias"]
    assert stored[:2].tolist() == [65504.0, -65504.0]


def test_the_summary_is_true(world, trained, merged, tmp_path):
    """Every number recomputed from the files; the hash is that of the weights, or of the shards' index."""
    base, adapter = load_file(world.base / "model.safetensors"), load_file(trained / "adapter_model.safetensors")
    summary = json.loads((merged / "run_record.json").read_text())["summary"]
    changes = {}
    for name, second in adapter.items():
        if name.endswith(".lora_B.weight"):
            module = name.removeprefix("base_model.model.").replace(".lora_B.", ".")
            change = 2.0 * second @ adapter[name.replace(".lora_B.", ".lora_A.")]
            changes[to_disk_name(module)] = (change.norm() / base[to_disk_name(module)].norm()).item()
    most_changed = max(changes, key=changes.get)
    assert summary == {
        "tensors": 86,
        "bytes": sum(tensor.numel() for tensor in base.values()) * 2,
        "lora_merged": 26,
        "replaced": 4,
        "largest_relative_lora_change": pytest.approx(changes[most_changed], abs=1e-4),
        "most_changed": most_changed,
        "overflow_count": 0,
        "underflow_count": sum(
            int((tensor != 0).sum() - (tensor.half() != 0).sum()) for tensor in load_float32(trained, tmp_path)
        ),
        "sha256 of model.safetensors": hash_file(merged / "model.safetensors"),
    }
    assert summary["largest_relative_lora_change"] > 0
    flags = ["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--max_shard_size", "20KB"]
    merge([*flags, "--no_verify"])
    sharded = json.loads((tmp_path / "out" / "run_record.json").read_text())["summary"]
    index = "model.safetensors.index.json"
    assert sharded.pop(f"sha256 of {index}") == hash_file(tmp_path / "out" / index)
    assert sharded == {name: value for name, value in summary.items() if not name.startswith("sha256")}


def load_float32(trained, folder):
    merge(["--adapter", str(trained), "--output_dir", str(folder / "float32"), "--dtype", "float32", "--no_verify"])
    return load_file(folder / "float32" / "model.safetensors").values()


def hash_file(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def exported(world, trained):
    output_dir = world.folder / "exported"
    merge(["--adapter", str(trained), "--output_dir", str(output_dir), "--export", "clip"])
    return output_dir


def test_an_export_changes_one_word_of_the_config(merged, exported):
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (exported, merged))
    assert theirs["vision_config"]["model_type"] == "chinese_clip_vision_model"
    theirs["vision_config"]["model_type"] = "clip_vision_model"
    assert ours == theirs
    for path in merged.iterdir():
        if path.name not in ("config.json", "run_record.json"):
            assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in exported.iterdir()} == BASE_FILES
    checks = read_checks(exported)
    assert checks["export: pixel values"] == "same bits on 4 sample memes"
    assert checks["export: vision features"] == "same bits after each of 3 layers"


@torch.inference_mode()
def test_the_exported_model_sees_what_the_trained_one_sees(world, merged, exported):
    """By the stock classes: CLIP's tower inside LLaVA, and the processor that they give where torchvision is absent."""
    ours, report = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    theirs = LlavaForConditionalGeneration.from_pretrained(merged)
    assert type(ours.model.vision_tower) is CLIPVisionModel
    assert type(theirs.model.vision_tower) is ChineseCLIPVisionModel
    image = open_image(sorted((ROOT / "data" / "images").iterdir())[0])
    processor = AutoProcessor.from_pretrained(exported)
    processor.image_processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    prompt = processor.apply_chat_template([{"role": "user", "content": "<image>\n图里写了什么？"}], tokenize=False)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    pixels = to_pixel_values(image, load_processing(world.base).image_policy)
    assert torch.equal(inputs["pixel_values"], pixels[None])
    ours, theirs = ours.eval().float(), theirs.eval().float()
    towers = [model.model.vision_tower for model in (ours, theirs)]
    features = [tower(pixels[None], output_hidden_states=True).hidden_states for tower in towers]
    assert len(features[0]) == 4 and all(map(torch.equal, *features))
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_a_tower_that_needs_no_export_is_refused_before_anything_is_written(world, tmp_path, capsys, monkeypatch):
    make_clip(tmp_path / "tower")
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base")
    train.main(train_flags(world, tmp_path / "trained", model=base, max_steps=1))
    monkeypatch.setattr(merge_lora, "write_directory", None)
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = ["--adapter", tmp_path / "trained", "--output_dir", tmp_path / "out", "--export", "clip"]
    assert (
        f"error: --export clip: the vision tower of {base} is a 'clip_vision_model', expected "
        "'chinese_clip_vision_model'. Serving engines take CLIP and SigLIP towers as they are; leave --export out."
    ) in fail(capsys, *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("part", ["pixels", "features"])
def test_an_export_that_sees_something_else_is_an_error(trained, tmp_path, monkeypatch, capsys, part):
    """The smallest possible change of a pixel, or CLIP's own activation function in place of Chinese-CLIP's."""
    if part == "pixels":

        def nudge(image, policy):
            pixels = to_pixel_values(image, policy)
            return pixels.nextafter(torch.tensor(9.0))

        monkeypatch.setattr(export_clip, "to_pixel_values", nudge)
    else:
        write = export_clip.write

        def export_wrongly(folder):
            write(folder)
            config = json.loads((folder / "config.json").read_text())
            config["vision_config"]["hidden_act"] = "gelu"
            (folder / "config.json").write_text(json.dumps(config))

        monkeypatch.setattr(export_clip, "write", export_wrongly)
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--export", "clip")
    assert f"gives other {part if part == 'features' else 'pixels'} than" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference", [2, 3])
def test_torchvision_resizes_almost_as_training(world, trained, tmp_path, monkeypatch, capsys, difference):
    """Where it is installed, transformers hands out an image processor that uses it. It stands in here."""

    def process(backend, folder, images):
        policy = load_processing(world.base).image_policy
        pixels = torch.stack([to_pixel_values(image, policy) for image in images])
        if backend == export_clip.TORCHVISION:
            pixels[1] += difference / 255 / torch.tensor(policy.std).view(3, 1, 1)
        return pixels

    monkeypatch.setattr(export_clip, "_process", process)
    monkeypatch.setattr(export_clip, "is_torchvision_available", lambda: True)
    flags = ["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--export", "clip"]
    if difference == 2:
        merge(flags)
        assert read_checks(tmp_path / "out")["export: pixel values by torchvision"] == "differ by up to 2 of 255"
    else:
        assert "pixels differ from training's by 3 of 255, expected up to 2" in fail(capsys, *flags)
