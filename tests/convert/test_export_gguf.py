"""`merge_lora.py --export gguf`: what the files hold, who can read them, and which bases are refused."""

import json
import shutil
import sys

import jinja2
import pytest
import torch
from conftest import train_flags
from conversions import (
    BASE_FILES,
    build,
    check_room_for_all,
    fail,
    make_clip,
    make_siglip,
    merge,
    save_language_model_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_lora
import train
from meme_llava.convert import export_gguf
from meme_llava.errors import UserError
from meme_llava.model.llava import load_llava, load_processing

gguf = pytest.importorskip("gguf", reason="needs the package of configs/requirements/gguf.txt")

TEXT = "一只猫，hello <|im_end|> 图里写了什么？"


def export(trained, output_dir, *flags):
    merge(["--adapter", str(trained), "--output_dir", str(output_dir), "--export", "gguf", *flags])
    return output_dir


def read_settings(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def exported(world, trained):
    return export(trained, world.folder / "gguf")


def test_three_files_lie_beside_the_merged_model(world, trained, exported, tmp_path, capsys):
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged"), "--no_verify"])
    assert "llama.cpp" not in capsys.readouterr().err
    assert {path.name for path in exported.iterdir()} == BASE_FILES | {"language.gguf", "mmproj.gguf", "Modelfile"}
    for name in BASE_FILES - {"run_record.json"}:
        assert (exported / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    checks = json.loads((exported / "run_record.json").read_text())["checks"]
    assert checks["export: language.gguf"] == "23 settings and 27 tensors read back, same bits"
    assert checks["export: mmproj.gguf"] == "19 settings and 41 tensors read back, same bits"


def test_it_asks_for_the_room_of_all_files_before_the_first(trained, exported, tmp_path, monkeypatch, capsys):
    needed = sum(tensor.nbytes for tensor in load_file(exported / "model.safetensors").values())
    for name in ("language.gguf", "mmproj.gguf"):
        needed += sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(exported / name).tensors)
    flags = ("--adapter", trained, "--export", "gguf")
    check_room_for_all(monkeypatch, capsys, tmp_path / "out", needed, *flags)


@torch.inference_mode()
@pytest.mark.parametrize(
    "dtype", ["float16", *(pytest.param(name, marks=pytest.mark.long) for name in ("bfloat16", "float32"))]
)
def test_transformers_reads_the_same_language_model(trained, tmp_path, dtype):
    """By its own names, settings and tokenizer of GGUF files."""
    folder = export(trained, tmp_path / "out", "--dtype", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="language.gguf", dtype=torch.float32)
    ours = load_llava(folder, torch.float32).model.language_model
    ids = torch.tensor([load_processing(folder).encoder.encode_text(TEXT)])
    assert torch.equal(theirs.model(ids).last_hidden_state, ours(ids).last_hidden_state)
    words = AutoTokenizer.from_pretrained(folder, gguf_file="language.gguf")
    assert words(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_settings_are_those_that_llama_cpp_reads(world, exported):
    """Layers that are run, squashing, and rows of the embedding without a word."""
    vision, language = (read_settings(exported / name) for name in ("mmproj.gguf", "language.gguf"))
    assert vision["clip.vision.block_count"] == 2 and vision["clip.vision.feature_layer"] == [2]
    assert vision["clip.vision.image_grid_pinpoints"] == [0, 0]
    assert vision["clip.use_gelu"] is False and vision["clip.projector_type"] == "mlp"
    tokenizer, rows = AutoTokenizer.from_pretrained(exported), len(language["tokenizer.ggml.tokens"])
    assert rows == load_processing(exported).config.text_config.vocab_size > len(tokenizer)
    kinds = dict(zip(language["tokenizer.ggml.tokens"], language["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<image>"] == kinds["<|im_end|>"] == gguf.TokenType.CONTROL
    assert kinds[f"[PAD{rows - 1}]"] == gguf.TokenType.UNUSED
    assert language["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<__media_aB3__>图里？", "<image>\n图里？"),
        ("<__media_aB3__><__media_aB3__>图里？", "<image>\n<image>\n图里？"),
        ("图里？<__media_aB3__>", "<image>\n图里？"),
        ("a__>b<__media_aB3__>c__>d", "<image>\na__>bc__>d"),
        ("图里？", "图里？"),
    ],
)
def test_the_template_puts_images_where_training_has_them(exported, content, expected):
    """llama-server hands images over as marks in the text; as parts of a message they become the same prompt."""
    template = read_settings(exported / "language.gguf")["tokenizer.chat_template"]
    rendered = jinja2.Template(template).render(messages=[{"role": "user", "content": content}])
    parts = [{"type": "image"}] * expected.count("<image>") + [
        {"type": "text", "text": expected.replace("<image>\n", "")}
    ]
    ours = AutoTokenizer.from_pretrained(exported).apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False
    )
    assert rendered.replace("<__media_aB3__>", "<image>") == ours
    assert expected in rendered.replace("<__media_aB3__>", "<image>")


def test_a_clip_tower_brings_a_warning_and_a_siglip_tower_none(world, tmp_path, capsys):
    make_siglip(tmp_path / "siglip")
    export_gguf.check_base(build(world.language_model, tmp_path / "siglip", tmp_path / "base"))
    assert "warning" not in capsys.readouterr().err
    export_gguf.check_base(world.base)
    error = capsys.readouterr().err
    assert error.startswith("warning: llama.cpp puts the class token of CLIP towers in the wrong place")
    assert "https://github.com/ggml-org/llama.cpp/issues/25814" in error and error.count("\n") == 1


def change(path, **changes):
    """Change settings of a JSON file, those of parts by names such as text_config__hidden_act."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *parts, key = name.split("__")
        part = values
        for name in parts:
            part = part[name]
        part[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"text_config__hidden_act": "gelu"}, "text_config.hidden_act of {base} is 'gelu', expected 'silu'"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            "text_config.rope_parameters.rope_type of {base} is 'linear', expected 'default'",
        ),
        (
            {"text_config__use_sliding_window": True, "text_config__layer_types": ["sliding_attention"] * 2},
            "text_config.layer_types of {base} is ['sliding_attention'], expected ['full_attention']",
        ),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act of {base} is 'relu', expected 'quick_gelu'"),
        ({"vision_config__intermediate_size": 16}, "intermediate_size == hidden_size of {base} is True"),
        ({"vision_feature_layer": [-2, -1]}, "the kind of vision_feature_layer of {base} is 'list', expected 'int'"),
        ({"vision_feature_select_strategy": "full"}, "is 'full', expected 'default'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act of {base} is 'relu', expected 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias of {base} is False, expected True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(world, tmp_path, changes, what):
    base = shutil.copytree(world.base, tmp_path / "base")
    change(base / "config.json", **changes)
    with pytest.raises(UserError) as error:
        export_gguf.check_base(base)
    assert what.format(base=base) in str(error.value)
    assert str(error.value).startswith("--export gguf: ")


@pytest.mark.parametrize(
    ("make", "policy", "what"),
    [
        (make_clip, "crop", "the image policy of {base} is 'crop', expected 'squash' or 'pad'"),
        (make_siglip, "pad", "the colour of padding of {base} is (127, 127, 127), expected (122, 116, 104)"),
    ],
)
def test_ways_to_make_a_square_that_llama_cpp_has_not_are_refused(world, tmp_path, make, policy, what):
    make(tmp_path / "tower")
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base", "--image_policy", policy)
    with pytest.raises(UserError) as error:
        export_gguf.check_base(base)
    assert what.format(base=base) in str(error.value)


def test_padding_is_what_llama_cpp_does_without_tiles(world, tmp_path, capsys):
    make_clip(tmp_path / "tower")
    base = build(world.language_model, tmp_path / "tower", tmp_path / "base", "--image_policy", "pad")
    export_gguf.check_base(base)
    assert "\nwarning: llama.cpp resizes an image before it pads it, and training" in capsys.readouterr().err
    export_gguf.write(base)
    assert "clip.vision.image_grid_pinpoints" not in read_settings(base / "mmproj.gguf")


@pytest.mark.parametrize("split", [r"\p{N}{1,3}", None])
def test_a_tokenizer_that_splits_otherwise_is_refused(world, tmp_path, split):
    base = shutil.copytree(world.base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    if split:
        steps[0]["pattern"]["Regex"] = split
    else:
        tokenizer["pre_tokenizer"] = steps[1]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the pre_tokenizer in tokenizer.json"):
        export_gguf.check_base(base)


def test_another_language_model_is_refused_before_anything_is_written(world, tmp_path, capsys, monkeypatch):
    language_model = save_language_model_of(world, tmp_path / "mistral", "mistral", sliding_window=None)
    base = build(language_model, world.vision_tower, tmp_path / "base")
    train.main(train_flags(world, tmp_path / "trained", model=base, max_steps=1))
    monkeypatch.setattr(merge_lora, "write_directory", None)
    error = fail(capsys, "--adapter", tmp_path / "trained", "--output_dir", tmp_path / "out", "--export", "gguf")
    assert (
        f"error: --export gguf: text_config.model_type of {base} is 'mistral', expected 'qwen2' or 'qwen3'. " in error
    )


def test_a_missing_package_is_named_before_anything_is_written(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--export", "gguf")
    assert error.startswith("error: --export gguf needs the package gguf: pip install -r configs/requirements/gguf.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        ("language.gguf", "blk.0.attn_q.bias", None, "blk.0.attn_q.bias"),
        ("mmproj.gguf", "v.class_embd", None, "v.class_embd"),
        ("mmproj.gguf", "clip.projector_type", b"mlp", "clip.projector_type"),
    ],
)
def test_a_file_with_another_bit_is_an_error(trained, tmp_path, capsys, monkeypatch, file, old, new, what):
    """In a tensor, or in a setting."""
    write = export_gguf.write

    def write_wrongly(folder):
        write(folder)
        path = folder / file
        content = bytearray(path.read_bytes())
        if new is None:
            place = next(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors if tensor.name == old)
        else:
            place = content.index(new, content.index(old.encode()))
        content[place] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export_gguf, "write", write_wrongly)
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", "--export", "gguf")
    assert f"{file}: its {what} is not the merged model's; report this as a bug" in error
    assert list(tmp_path.iterdir()) == []


def test_ollama_finds_both_files_and_the_prompt(exported):
    modelfile = (exported / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./language.gguf\nFROM ./mmproj.gguf\n" in modelfile
    assert "PARAMETER temperature 0\nPARAMETER num_ctx 4096\nPARAMETER stop <|im_end|>\n" in modelfile
