"""Assembling: what comes out loads alone, is what went in, and a wrong source stops with a sentence."""

import contextlib
import itertools
import json
import re
import shutil

import pytest
import torch
from conftest import LANGUAGE_DIMENSIONS, SHARED_DATA
from conversions import BASE_FILES, Bars, build, make_clip, make_siglip, run_and_read_error, save_language_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    ChineseCLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meme_llava.convert import build as assembly
from meme_llava.convert import build_check
from meme_llava.errors import UserError
from meme_llava.model import offloading
from meme_llava.model.llava import load_processing


def test_directory_holds_exactly_what_it_should(world):
    assert {path.name for path in world.base.iterdir()} == BASE_FILES
    assert (world.base / "model.safetensors").stat().st_mode & 0o044, "others must be able to read the weights"


def test_weights_use_the_classic_layout(world):
    names = set(load_file(world.base / "model.safetensors"))
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    prefixes = {name.split(".")[0] + "." + name.split(".")[1] for name in names}
    assert prefixes == {
        "vision_tower.vision_model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "language_model.model",
        "language_model.lm_head",
    }


def test_directory_loads_alone_and_answers_like_its_sources(world, tmp_path):
    """The promise of assembly, checked from outside: copied away from its sources, by the stock classes."""
    alone = tmp_path / "alone"
    shutil.copytree(world.base, alone)
    model = LlavaForConditionalGeneration.from_pretrained(alone).eval()
    processor = AutoProcessor.from_pretrained(alone)
    source = AutoModelForCausalLM.from_pretrained(world.language_model).eval()
    tower = ChineseCLIPModel.from_pretrained(world.vision_tower).vision_model.eval()
    ids = processor.tokenizer("你好，图里写了什么？", return_tensors="pt")["input_ids"]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)
        ours = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(ours, theirs)
    assert (
        model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id
    )
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.do_sample is False


def test_config_holds_what_old_and_new_readers_need(world):
    config = json.loads((world.base / "config.json").read_text())
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == "default"
    assert config["image_seq_length"] == 4
    # transformers 4 reads the first, transformers 5 the second.
    assert config["text_config"]["rope_theta"] == 1_000_000.0
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1_000_000.0
    tokenizer = json.loads((world.base / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer
    assert tokenizer["padding_side"] == "left"
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    processor = json.loads((world.base / "processor_config.json").read_text())
    assert processor["image_processor"]["size"] == {"height": 28, "width": 28}
    assert processor["image_processor"]["do_center_crop"] is False
    assert processor["processor_class"] == "LlavaProcessor"


def test_projector_depends_on_the_seed_alone(world, tmp_path):
    first = load_file(world.base / "model.safetensors")
    torch.randn(7)  # whatever random state the process is in
    same = load_file(build(world.language_model, world.vision_tower, tmp_path / "same") / "model.safetensors")
    other = build(world.language_model, world.vision_tower, tmp_path / "other", "--seed", 1)
    other = load_file(other / "model.safetensors")
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"}


def test_run_record_names_sources_seed_and_checks(world):
    record = json.loads((world.base / "run_record.json").read_text())
    assert record["stage"] == "build"
    assert record["settings"]["language_model"] == str(world.language_model)
    assert record["settings"]["seed"] == 0
    assert record["checks"]["text-only logits equal the language model's"] == "largest difference 0"
    assert len(record["fingerprint"]) == 64


def test_scaled_positions_are_written_for_old_readers(world, tmp_path):
    """transformers 4 does not read rope_parameters; without its own words it would scale nothing, in silence."""
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    config = Qwen2Config(vocab_size=512, rope_parameters=yarn, **LANGUAGE_DIMENSIONS)
    folder = save_language_model(Qwen2ForCausalLM(config), world, tmp_path / "yarn")
    base = build(folder, world.vision_tower, tmp_path / "base")
    text_config = json.loads((base / "config.json").read_text())["text_config"]
    assert text_config["rope_theta"] == 10_000.0
    assert text_config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    reread = LlavaForConditionalGeneration.from_pretrained(base).config.text_config.rope_parameters
    assert {name: reread[name] for name in yarn} == yarn


def test_tied_embeddings_stay_tied(world, tmp_path):
    config = Qwen2Config(vocab_size=512, tie_word_embeddings=True, **LANGUAGE_DIMENSIONS)
    folder = save_language_model(Qwen2ForCausalLM(config), world, tmp_path / "tied")
    base = build(folder, world.vision_tower, tmp_path / "base")
    assert "language_model.lm_head.weight" not in load_file(base / "model.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def make_llama(world, folder, special=("<s>", "</s>")):
    """A Llama with its own begin and end tokens, or none, and no free embedding row. Gives its rows."""
    tokenizer = AutoTokenizer.from_pretrained(world.language_model)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = [
        {
            "id": i,
            "content": c,
            "special": True,
            **dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False),
        }
        for i, c in enumerate(special, start=len(description["model"]["vocab"]))
    ]
    rows = len(description["model"]["vocab"]) + len(special)
    settings, names = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"bos_token_id": None, "eos_token_id": None}
    if special:
        start = {"id": "<s>", "ids": [description["added_tokens"][0]["id"]], "tokens": ["<s>"]}
        description["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": start},
        }
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
        names = {"bos_token_id": rows - 2, "eos_token_id": rows - 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **names, **LANGUAGE_DIMENSIONS)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return rows


def test_llama_without_chatml_gets_its_tokens(world, tmp_path):
    folder = tmp_path / "llama"
    rows = make_llama(world, folder)
    base = build(folder, world.vision_tower, tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<image>"])
    assert ids == [rows, rows + 1, rows + 2]
    assert model.config.text_config.vocab_size % 64 == 0 and model.config.text_config.vocab_size > rows + 2
    # Untrained, the end of a turn is as likely as the end of text, and generation stops at either.
    assert model.generation_config.eos_token_id == [rows + 1, rows - 1]
    assert torch.equal(model.lm_head.weight[rows + 1], model.lm_head.weight[rows - 1])
    prompt = processor.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True)
    assert prompt.startswith("<s><|im_start|>system\n")
    # The name that transformers 4 knows the class by.
    assert json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"])
def test_new_rows_are_copies_or_zero(world, tmp_path, name):
    """<|im_start|> copies <s>, <|im_end|> copies </s>; <image> and the rows up to a multiple of 64 are zero."""
    rows = make_llama(world, tmp_path / "llama")
    base = build(tmp_path / "llama", world.vision_tower, tmp_path / "base")
    source = load_file(tmp_path / "llama" / "model.safetensors")[name.removeprefix("language_model.")]
    found = load_file(base / "model.safetensors")[name]
    assert found.shape == (-(-(rows + 3) // 64) * 64, 32)
    assert torch.equal(found[:rows], source)
    assert torch.equal(found[rows], source[rows - 2]) and torch.equal(found[rows + 1], source[rows - 1])
    assert found[rows + 2 :].count_nonzero() == 0
    assert source.abs().sum(dim=1).min() > 0, "no row of the source is zero, or this test shows nothing"


def test_a_begin_token_of_id_0_is_copied_too(world, tmp_path):
    """As DeepSeek's is: zero is an id, not an absence."""
    rows = make_llama(world, tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    first = tokenizer.convert_ids_to_tokens(0)
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": first}))
    base = build(tmp_path / "llama", world.vision_tower, tmp_path / "base")
    embedding = load_file(base / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(embedding[rows], embedding[0])


def test_a_model_without_begin_and_end_tokens_gets_zero_rows(world, tmp_path):
    """There is nothing to copy; the new tokens are learnt from zero."""
    rows = make_llama(world, tmp_path / "llama", special=())
    base = build(tmp_path / "llama", world.vision_tower, tmp_path / "base")
    embedding = load_file(base / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert embedding[rows:].count_nonzero() == 0 and len(embedding) > rows + 3


@pytest.mark.parametrize(
    ("make", "model_type", "strategy", "tokens"),
    [(make_clip, "clip_vision_model", "default", 4), (make_siglip, "siglip_vision_model", "full", 4)],
)
def test_clip_and_siglip_towers(world, tmp_path, make, model_type, strategy, tokens):
    make(tmp_path / "tower")
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    assert config["vision_config"]["model_type"] == model_type
    assert config["vision_feature_select_strategy"] == strategy
    assert config["image_seq_length"] == tokens
    processor = AutoProcessor.from_pretrained(base)
    assert processor.image_token == "<image>"
    # These folders bring no preprocessor_config.json, so the family's published values are taken.
    assert processor.image_processor.image_mean[0] == (0.5 if "siglip" in model_type else 0.48145466)


def test_vision_only_checkpoint(world, tmp_path):
    model = make_clip(tmp_path / "two_towers")
    vision_only = tmp_path / "vision_only"
    CLIPVisionModel.from_pretrained(tmp_path / "two_towers").save_pretrained(vision_only)
    base = build(world.language_model, vision_only, tmp_path / "base")
    name = "encoder.layers.0.mlp.fc1.weight"
    stored = load_file(base / "model.safetensors")[f"vision_tower.vision_model.{name}"]
    assert torch.equal(stored, model.vision_model.state_dict()[name])


def test_sharded_and_pickled_sources_give_the_same_model(world, tmp_path):
    """The forms that hubs hold: safetensors shards with an index, and .bin."""
    source = AutoModelForCausalLM.from_pretrained(world.language_model)
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    source.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled.mkdir()
    source.config.save_pretrained(pickled)
    torch.save(source.state_dict(), pickled / "pytorch_model.bin")
    expected = load_file(world.base / "model.safetensors")
    for folder in (sharded, pickled):
        AutoTokenizer.from_pretrained(world.language_model).save_pretrained(folder)
        base = build(folder, world.vision_tower, tmp_path / f"base_{folder.name}")
        found = load_file(base / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_part_keeps_the_dtype_of_its_source(world, tmp_path):
    half = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(world.language_model, dtype=torch.bfloat16)
    save_language_model(model, world, half)
    tensors = load_file(build(half, world.vision_tower, tmp_path / "base") / "model.safetensors")
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {
        "language_model": torch.bfloat16,
        "multi_modal_projector": torch.bfloat16,
        "vision_tower": torch.float32,
    }


def test_a_tower_of_336_pixels_gives_576_tokens(world, tmp_path):
    make_clip(tmp_path / "tower", size=336)
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base")
    record = json.loads((base / "run_record.json").read_text())
    assert record["checks"]["one <image> token per feature"] == "576 = 576"


@pytest.mark.long
def test_real_qwen_tokenizer_on_a_thin_model(world, tmp_path):
    """The vocabulary of Qwen2-7B: <image> takes the first free id, inside the padded embedding."""
    source = SHARED_DATA / "qwen_tokenizer"
    if not source.is_dir():
        pytest.skip("the real Qwen tokenizer is not at hand")
    folder = tmp_path / "qwen"
    config = Qwen2Config(vocab_size=152_064, **{**LANGUAGE_DIMENSIONS, "hidden_size": 64}, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in source.iterdir():
        shutil.copy(file, folder)
    base = build(folder, world.vision_tower, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    assert config["image_token_index"] == 151_665
    assert config["text_config"]["vocab_size"] == 152_064
    assert load_file(base / "model.safetensors")["language_model.lm_head.weight"].shape == (152_064, 64)


def test_wrong_sources_stop_with_a_sentence(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such folder" in run_and_read_error(capsys, "./nowhere", world.vision_tower, out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in run_and_read_error(capsys, empty, world.vision_tower, out)
    swapped = run_and_read_error(capsys, world.vision_tower, world.language_model, out)
    assert "expected a" in swapped
    swapped = run_and_read_error(capsys, world.vision_tower, world.vision_tower, out)
    assert "is a 'chinese_clip' model, expected a causal language model" in swapped
    no_tokenizer = tmp_path / "no_tokenizer"
    shutil.copytree(world.language_model, no_tokenizer)
    (no_tokenizer / "tokenizer_config.json").unlink()
    assert "has no tokenizer_config.json" in run_and_read_error(capsys, no_tokenizer, world.vision_tower, out)
    assert not out.exists()


def test_unknown_hub_id_stops_with_a_sentence(world, tmp_path, capsys):
    error = run_and_read_error(capsys, "nobody/no-such-model", world.vision_tower, tmp_path / "out")
    # The tests run offline; tests/storage/test_hub.py has the messages of a hub that answers.
    assert "nobody/no-such-model: is not a local folder, HF_HUB_OFFLINE is set, and the cache" in error


def test_truncated_and_incomplete_weights_are_named(world, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(world.language_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(broken) in run_and_read_error(capsys, broken, world.vision_tower, tmp_path / "out")
    tensors = load_file(world.language_model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    error = run_and_read_error(capsys, broken, world.vision_tower, tmp_path / "out")
    assert "1 tensors are missing" in error and "model.layers.0.self_attn.q_proj.weight" in error


def test_non_empty_output_is_kept_unless_told(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    error = run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "out")
    assert "is not empty" in error and "--overwrite" in error
    # A folder that we did not write may hold anything.
    error = run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "out", "--overwrite")
    assert "has no run_record.json, so it is not an output of ours and --overwrite leaves it alone" in error
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "run_record.json").write_text("{}")
    build(world.language_model, world.vision_tower, tmp_path / "out", "--overwrite")
    assert {path.name for path in (tmp_path / "out").iterdir()} == BASE_FILES


def test_a_wrong_assembly_is_an_error_and_leaves_nothing(world, tmp_path, monkeypatch, capsys):
    """A tensor that was swapped on the way must not pass."""
    plan = assembly.plan_llava

    def swap(*arguments):
        planned = plan(*arguments)
        a, b = (f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
        planned[a], planned[b] = planned[b], planned[a]
        return planned

    monkeypatch.setattr(assembly, "plan_llava", swap)
    error = run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "out")
    assert "text-only logits equal the language model's (largest difference" in error
    assert list(tmp_path.iterdir()) == []


def find_source(world, name):
    """A tensor of the tiny world's sources by its name in the LLaVA; the vision tower is a two-tower .bin."""
    if name.startswith("language_model."):
        return load_file(world.language_model / "model.safetensors")[name.removeprefix("language_model.")]
    tensors = torch.load(world.vision_tower / "pytorch_model.bin", weights_only=True)
    return tensors[name.removeprefix("vision_tower.")]


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.long), torch.float16])
def test_all_tensors_are_rounded_to_the_dtype_that_is_asked_for(world, tmp_path, dtype):
    base = build(world.language_model, world.vision_tower, tmp_path / "base", "--dtype", str(dtype)[6:])
    found, projector = (load_file(folder / "model.safetensors") for folder in (base, world.base))
    assert found.keys() == projector.keys()
    for name, tensor in found.items():
        source = projector[name] if name.startswith("multi_modal_projector.") else find_source(world, name)
        assert torch.equal(tensor, source.to(dtype)) and tensor.dtype == dtype, name
    config = json.loads((base / "config.json").read_text())
    parts = (config, config["text_config"], config["vision_config"])
    assert [part["dtype"] for part in parts] == [str(dtype)[6:]] * 3
    checks = json.loads((base / "run_record.json").read_text())["checks"]
    for check in ("text-only logits equal the language model's", "vision features equal the vision tower's"):
        assert re.fullmatch(r"differ by [01]\.\d\d% \(limit 10%\)", checks[check]), checks[check]
    assert LlavaForConditionalGeneration.from_pretrained(base).dtype == dtype


def change_weights(folder, tmp_path, change):
    """A copy of a source folder whose tensors were changed."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    path = next(path for path in copy.iterdir() if path.suffix in (".bin", ".safetensors"))
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    change(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)
    return copy, path


def test_a_value_that_float16_cannot_hold_names_its_tensor(world, tmp_path, capsys):
    """float16 ends at 65504; bfloat16 and the sources' own dtype hold it."""

    def enlarge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e6

    changed, _ = change_weights(world.language_model, tmp_path, enlarge)
    error = run_and_read_error(capsys, changed, world.vision_tower, tmp_path / "out", "--dtype", "float16")
    assert "1 values in 1 tensors are not finite in float16, which holds up to 65504" in error
    assert "language_model.model.layers.1.mlp.up_proj.weight has 1, such as 1e+06" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]
    for dtype in ("source", "bfloat16"):
        build(changed, world.vision_tower, tmp_path / dtype, "--dtype", dtype)


def test_a_tower_that_vanishes_in_float16_is_noticed(world, tmp_path, capsys):
    """What its norms shrink, the matrices behind them enlarge again, so that the source is sound."""

    def shrink(tensors):
        for layer in ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1"):
            for part, factor in {
                **{f"layer_norm{number}.{kind}": 1e-8 for number in (1, 2) for kind in ("weight", "bias")},
                **{f"{name}.weight": 1e4 for name in ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")},
            }.items():
                tensors[f"{layer}.{part}"] *= factor

    changed, _ = change_weights(world.vision_tower, tmp_path, shrink)
    error = run_and_read_error(capsys, world.language_model, changed, tmp_path / "out", "--dtype", "float16")
    assert "vision features equal the vision tower's (differ by" in error
    assert error.endswith("(limit 10%)). Store it with --dtype bfloat16 or float32\n")
    build(world.language_model, changed, tmp_path / "out", "--dtype", "bfloat16")


def test_the_sources_bytes_are_copied_as_they_are(world, tmp_path):
    """Even what no arithmetic keeps: a NaN with a payload, an infinity, a negative zero; so nothing was converted."""
    odd = torch.tensor([0x7FA00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(torch.float32)

    def set_odd(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = odd

    changed, path = change_weights(world.language_model, tmp_path, set_odd)
    base = build(changed, world.vision_tower, tmp_path / "base", "--no_verify")
    found, source = load_file(base / "model.safetensors"), load_file(path)
    assert {name for name in found if name.startswith("language_model.")} == {f"language_model.{n}" for n in source}
    for name, tensor in found.items():
        if not name.startswith("multi_modal_projector."):
            expected = find_source(world, name) if name.startswith("vision") else source[name[len("language_model.") :]]
            assert tensor.dtype == expected.dtype == torch.float32
            assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32)), name


def test_no_verify_writes_the_same_files_without_checks(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meme_llava.convert.build_check.verify_assembled", None)
    out = build(world.language_model, world.vision_tower, tmp_path / "out", "--no_verify")
    printed = capsys.readouterr().out
    assert "Proved on" not in printed and f"base model: {out}" in printed
    assert {path.name for path in out.iterdir()} == BASE_FILES
    for path in world.base.iterdir():
        if path.name != "run_record.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (json.loads((folder / "run_record.json").read_text()) for folder in (out, world.base))
    assert ours["checks"] == {} and ours["fingerprint"] == theirs["fingerprint"]


@pytest.fixture
def no_memory(monkeypatch):
    """No model fits any more, so comparisons run layer by layer."""
    monkeypatch.setattr(offloading, "measure_available_memory", lambda: 0)


def make_tied(world, folder):
    config = Qwen2Config(vocab_size=512, tie_word_embeddings=True, **LANGUAGE_DIMENSIONS)
    save_language_model(Qwen2ForCausalLM(config), world, folder)


def make_half(world, folder):
    model = AutoModelForCausalLM.from_pretrained(world.language_model, dtype=torch.bfloat16)
    save_language_model(model, world, folder)


SOURCES = {
    "qwen_and_chinese_clip": (None, None),
    "llama_with_new_rows": (make_llama, make_clip),
    "tied_and_siglip": (make_tied, make_siglip),
    "half_language_model": (make_half, None),
}
# Every source and every dtype once; --all takes all pairs.
USUAL_PAIRS = [("tied_and_siglip", "source"), ("llama_with_new_rows", "bfloat16"), ("half_language_model", "float16")]


@pytest.mark.parametrize(
    ("sources", "dtype"),
    [
        pytest.param(*pair, marks=[] if pair in USUAL_PAIRS else pytest.mark.long)
        for pair in itertools.product(SOURCES, ["source", "bfloat16", "float16"])
    ],
)
def test_comparison_layer_by_layer(world, tmp_path, monkeypatch, no_memory, capsys, sources, dtype):
    """Where memory is short the same comparison passes, bit for bit if nothing is rounded; its bar ends in time."""
    make_language_model, make_tower = SOURCES[sources]
    language_model, tower = world.language_model, world.vision_tower
    if make_language_model:
        language_model = tmp_path / "language"
        make_language_model(world, language_model)
    if make_tower:
        tower = tmp_path / "tower"
        make_tower(tower)
    bars = Bars()
    monkeypatch.setattr(assembly, "show_bytes", bars)
    monkeypatch.setattr(build_check, "show_count", bars)
    capsys.readouterr()
    base = build(language_model, tower, tmp_path / "base", "--dtype", dtype)
    assert "the models ran layer by layer from the disk" in " ".join(capsys.readouterr().out.split())
    checks = json.loads((base / "run_record.json").read_text())["checks"]
    assert checks["the models ran"] == "layer by layer from the disk"
    rounds_text = dtype != "source" and (sources, dtype) != ("half_language_model", "bfloat16")
    for check, is_rounded in (
        ("text-only logits equal the language model's", rounds_text),
        ("vision features equal the vision tower's", dtype != "source"),
    ):
        same = r"differ by [01]\.\d\d% \(limit 10%\)" if is_rounded else "largest difference 0"
        assert re.fullmatch(same, checks[check]), checks[check]
    assert checks["one <image> token per feature"] == "4 = 4"
    assert set(bars.shown) == {"assembling", "comparing layers"}
    assert all(total == shown > 0 for total, shown in bars.shown.values()), bars.shown


@pytest.mark.parametrize("memory", ["in memory", "layer by layer"])
@pytest.mark.parametrize(
    ("first", "second", "check"),
    [
        (
            "language_model.model.layers.0.mlp.up_proj.weight",
            "language_model.model.layers.1.mlp.up_proj.weight",
            "text-only logits equal the language model's (largest difference",
        ),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
            "vision features equal the vision tower's (largest difference",
        ),
        (
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
            "text-only logits equal the language model's (largest difference",
        ),
    ],
    ids=["language", "vision", "embedding_and_head"],
)
def test_a_swapped_tensor_is_noticed(world, tmp_path, monkeypatch, capsys, memory, first, second, check):
    """Of a Llama with new rows; in memory and layer by layer."""
    if memory == "layer by layer":
        monkeypatch.setattr(offloading, "measure_available_memory", lambda: 0)
    plan = assembly.plan_llava

    def swap(*arguments):
        planned = plan(*arguments)
        return planned | {first: planned[second], second: planned[first]}

    monkeypatch.setattr(assembly, "plan_llava", swap)
    make_llama(world, tmp_path / "llama")
    error = run_and_read_error(capsys, tmp_path / "llama", world.vision_tower, tmp_path / "out")
    assert check in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


QUERY = "model.layers.1.self_attn.q_proj.weight"
FC1 = "vision_model.encoder.layers.2.mlp.fc1.weight"


def set_tensor(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("language_model", lambda t: t.pop(QUERY), f"{{folder}}: 1 tensors are missing, e.g. {QUERY}\n"),
        ("vision_tower", lambda t: t.pop(FC1), "{folder}: 1 tensors are missing, e.g. encoder.layers.2.mlp.fc1.weight"),
        ("language_model", set_tensor("more", torch.ones(2)), "{folder}: 1 tensors are unexpected, e.g. more"),
        (
            "vision_tower",
            set_tensor("vision_model.more", torch.ones(2)),
            "{folder}: 1 tensors are unexpected, e.g. more",
        ),
        (
            "language_model",
            set_tensor(QUERY, torch.ones(32, 33)),
            f"{{path}}: {QUERY} is (32, 33), config.json asks for (32, 32)",
        ),
        (
            "vision_tower",
            set_tensor(FC1, torch.ones(16, 32)),
            "{path}: encoder.layers.2.mlp.fc1.weight is (16, 32), config.json asks for (32, 16)",
        ),
        (
            "language_model",
            set_tensor(QUERY, torch.ones(32, 32, dtype=torch.int8)),
            f"{{path}}: {QUERY} is torch.int8, expected float32, float16 or bfloat16",
        ),
        (
            "vision_tower",
            set_tensor(FC1, torch.ones(32, 16, dtype=torch.int32)),
            "{path}: encoder.layers.2.mlp.fc1.weight is torch.int32, expected float32, float16 or bfloat16",
        ),
        (
            "language_model",
            set_tensor(QUERY, torch.ones(32, 32).to(torch.float8_e4m3fn)),
            f"{{path}}: {QUERY} is torch.float8_e4m3fn, expected float32, float16 or bfloat16",
        ),
    ],
    ids=[
        *("missing", "vision_missing", "extra", "vision_extra", "shape", "vision_shape"),
        *("int8", "vision_int32", "float8"),
    ],
)
def test_sources_that_are_not_what_their_config_says_are_named(world, tmp_path, capsys, part, change, message):
    changed, path = change_weights(getattr(world, part), tmp_path, change)
    folders = {"language_model": world.language_model, "vision_tower": world.vision_tower, part: changed}
    error = run_and_read_error(capsys, folders["language_model"], folders["vision_tower"], tmp_path / "out")
    assert message.format(folder=changed, path=path) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_the_other_tower_and_computed_buffers_are_passed_over(world, tmp_path):
    """What older releases stored beside the weights, in integers and in other shapes, changes nothing."""

    def add_language(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    def add_vision(tensors):
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        tensors["text_model.anything"] = torch.ones(3, dtype=torch.int64)

    language_model, _ = change_weights(world.language_model, tmp_path / "language", add_language)
    vision_tower, _ = change_weights(world.vision_tower, tmp_path / "vision", add_vision)
    base = build(language_model, vision_tower, tmp_path / "base")
    assert (base / "model.safetensors").read_bytes() == (world.base / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "without model.embed_tokens.weight"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "without model.embed_tokens.weight"),
        ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8}, "without model.embed_tokens.weight"),
        (
            "recurrent_gemma",
            {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "head_dim": 16},
            "without attention",
        ),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "with experts"),
        ("mixtral", {"num_local_experts": 2}, "with experts"),
    ],
)
def test_a_language_model_of_another_kind_is_refused(world, tmp_path, capsys, model_type, settings, reason):
    config = CONFIG_MAPPING[model_type](**{"vocab_size": 512, **LANGUAGE_DIMENSIONS, **settings})
    folder = save_language_model(AutoModelForCausalLM.from_config(config), world, tmp_path / "other")
    error = run_and_read_error(capsys, folder, world.vision_tower, tmp_path / "out", "--no_verify")
    assert error.endswith(
        f"error: {folder}: a {model_type!r} language model is not supported ({reason}); expected one with the layers "
        "of Llama and Qwen2, such as llama, qwen2, qwen3 or mistral\n"
    )


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(world, tmp_path, capsys):
    make_tied(world, tmp_path / "tied")
    path = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    base = build(tmp_path / "tied", world.vision_tower, tmp_path / "base")
    assert "language_model.lm_head.weight" not in load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": head + 1}, path, metadata={"format": "pt"})
    error = run_and_read_error(capsys, tmp_path / "tied", world.vision_tower, tmp_path / "out")
    assert f"error: {path}: holds a lm_head.weight other than the embedding, to which config.json ties" in error


@pytest.mark.parametrize("left", [(), ("vocab.json",)])
@pytest.mark.parametrize("flags", [(), ("--no_verify",)])
def test_a_tokenizer_without_words_is_refused(world, tmp_path, capsys, left, flags):
    copy = tmp_path / "copy"
    shutil.copytree(world.language_model, copy)
    vocabulary = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    (copy / "tokenizer.json").unlink()
    for name in left:
        (copy / name).write_text(json.dumps(vocabulary))
    error = run_and_read_error(capsys, copy, world.vision_tower, tmp_path / "out", *flags)
    assert f"error: {copy}: has no vocabulary; expected tokenizer.json (or vocab.json and" in error


@pytest.mark.parametrize("flags", [(), ("--no_verify",)])
def test_an_empty_vocabulary_is_refused(world, tmp_path, capsys, flags):
    copy = tmp_path / "copy"
    shutil.copytree(world.language_model, copy)
    empty_vocabulary(copy)
    error = run_and_read_error(capsys, copy, world.vision_tower, tmp_path / "out", *flags)
    assert error.endswith(
        f"error: {copy}: the vocabulary of its tokenizer is empty. Download, copy or make it again.\n"
    )


def empty_vocabulary(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_truncation_and_padding_of_the_source_are_not_handed_on(world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world.language_model, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(4, stride=1)
    tokenizer.enable_padding(length=64, direction="right", pad_to_multiple_of=8)
    tokenizer.save(str(copy / "tokenizer.json"))
    base = build(copy, world.vision_tower, tmp_path / "base")
    # transformers' default, which it writes out.
    for name, more in (("tokenizer.json", {}), ("tokenizer_config.json", {"truncation_side": "right"})):
        assert json.loads((base / name).read_text()) == json.loads((world.base / name).read_text()) | more


def test_a_base_without_a_vocabulary_is_refused(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no vocabulary; expected tokenizer.json"):
        load_processing(tmp_path / "base")
    shutil.copy(world.base / "tokenizer.json", tmp_path / "base")
    empty_vocabulary(tmp_path / "base")
    with pytest.raises(UserError, match="the vocabulary of its tokenizer is empty"):
        load_processing(tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("config.json", b'{"model_type"', "ends in the middle"),
        ("config.json", b"", "is empty"),
        ("config.json", b"[1]", "holds a list, expected an object {…}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {', "ends in the middle"),
        ("tokenizer_config.json", b"\xef\xbb\xbf{}", "begins with a byte order mark, expected UTF-8 without one"),
        ("generation_config.json", b"null", "holds null, expected an object {…}"),
    ],
)
def test_a_damaged_file_of_the_language_model_is_named(world, tmp_path, capsys, name, content, fault):
    copy = tmp_path / "copy"
    shutil.copytree(world.language_model, copy)
    (copy / name).write_bytes(content)
    error = run_and_read_error(capsys, copy, world.vision_tower, tmp_path / "out", "--no_verify")
    assert error.splitlines()[-1] == f"error: {copy / name}: {fault}. Download, copy or make it again."


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"image_mean": [0.5, None, 0.5]}, "image_mean is [0.5, None, 0.5], expected three finite numbers"),
        ({"image_std": 0.5}, "image_std is 0.5, expected three finite numbers"),
        ({"image_std": [1, 1, float("nan")]}, "image_std is [1, 1, nan], expected three finite numbers"),
        ({"resample": 9}, "resample is 9, expected 0 to 5"),
        ({"resample": "bicubic"}, "resample is bicubic, expected 0 to 5"),
    ],
)
def test_pixel_settings_that_make_no_image_are_named(world, tmp_path, capsys, settings, fault):
    copy = tmp_path / "copy"
    shutil.copytree(world.vision_tower, copy)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    error = run_and_read_error(capsys, world.language_model, copy, tmp_path / "out")
    assert f"error: {path}: {fault}. Download" in error


CODE = """
open({marker!r}, "w").close()
from transformers import PreTrainedConfig
class ForeignConfig(PreTrainedConfig):
    model_type = "foreign"
"""


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_python_code_of_a_model_folder_is_never_run(world, tmp_path, capsys, monkeypatch, part):
    """Even for a user who would answer yes to transformers' question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    copy = tmp_path / "copy"
    shutil.copytree(getattr(world, part), copy)
    (copy / "configuration_foreign.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    auto_map = {"AutoConfig": "configuration_foreign.ForeignConfig"}
    (copy / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    folders = {"language_model": world.language_model, "vision_tower": world.vision_tower, part: copy}
    error = run_and_read_error(capsys, folders["language_model"], folders["vision_tower"], tmp_path / "out")
    assert error == (
        f"error: {copy}: config.json cannot be used: Python code of the model's own, named by config.json (auto_map), "
        "is never run here. Take a model that transformers itself knows, such as its -hf release\n"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "class_name", "auto_class"),
    [
        ("processor_config.json", "processor_class", "AutoProcessor"),
        ("tokenizer_config.json", "tokenizer_class", "AutoTokenizer"),
    ],
)
def test_python_code_of_a_base_is_never_run(world, tmp_path, monkeypatch, name, class_name, auto_class):
    """transformers may take a class of its own instead."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / "foreign.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    value = "foreign.ForeignConfig" if auto_class == "AutoProcessor" else ["foreign.ForeignConfig", None]
    config = json.loads((base / name).read_text()) | {class_name: "Foreign", "auto_map": {auto_class: value}}
    (base / name).write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        load_processing(base)
    assert not (tmp_path / "ran").exists()


def test_a_quantised_language_model_is_refused(world, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(world.language_model, changed)
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (changed / "config.json").write_text(json.dumps(config))
    error = run_and_read_error(capsys, changed, world.vision_tower, tmp_path / "out")
    assert error == f"error: {changed}: is quantised; give the model it was made from, in bfloat16 or float16\n"


def test_ids_that_disagree_are_an_error(world, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(world.base, broken)
    config = json.loads((broken / "config.json").read_text())
    config["image_token_index"] -= 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the id of <image> differs"):
        load_processing(broken)
