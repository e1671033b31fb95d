"""Reading tensor files: every bit as it was stored, no more bytes than needed, and every damage named."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from conversions import build, run_and_read_error
from safetensors.torch import load_file, save_file
from tensors import bits, draw_all

from meme_llava.errors import UserError
from meme_llava.storage import tensor_files
from meme_llava.storage.tensor_files import open_model_tensors, read_tensors, view_bytes


def save_as(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


def write_safetensors(path, header, data=bytes(24)):
    """A file of the format's parts, written by hand: length, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


FILE_NAMES = ["model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("file_name", FILE_NAMES)
@pytest.mark.parametrize("piece_bytes", [8, 24, 16_000_000])
def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path, monkeypatch, file_name, piece_bytes):
    """What safetensors and torch themselves wrote; a piece is one row at least."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece_bytes)
    expected = draw_all()
    tensors = read_tensors([save_as(expected, tmp_path / file_name)])
    assert tensors.keys() == expected.keys() and len(tensors) == 72
    for name, tensor in expected.items():
        stored = tensors[name]
        assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert bits(stored.load()) == bits(stored.map()) == bits(tensor), name
        pieces = list(stored.make_pieces())
        assert all(piece.nbytes <= max(piece_bytes, tensor[:1].nbytes if tensor.dim() else 8) for piece in pieces)
        assert sum((bits(piece)[2] for piece in pieces), []) == bits(tensor)[2], name


@pytest.mark.parametrize("file_name", FILE_NAMES)
def test_loading_converts_like_torch(tmp_path, file_name):
    tensors = {
        "matrix": torch.tensor([[1.0, -2.5, 3.14159], [65519.0, 65520.0, 1e-8]]),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 4),
    }
    stored = read_tensors([save_as(tensors, tmp_path / file_name)])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for name, tensor in tensors.items():
            assert bits(stored[name].load(dtype)) == bits(tensor.to(dtype)), (name, dtype)


def test_what_was_loaded_is_a_copy(tmp_path):
    """Weights that change in training or whose file is replaced must not be the file's own pages."""
    path = save_as({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    loaded = read_tensors([path])["a"].load()
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\xff" * 4000)
    assert not loaded.any()


def read_memory():
    """Bytes of this process in memory: its own, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) * 1024


def test_a_tensor_in_pieces_does_not_stay_in_memory(tmp_path):
    """200 MB in pieces of 16: what was read is given back."""
    path = save_as({"a": torch.ones(5000, 10_000)}, tmp_path / "model.safetensors")
    stored, before, most = read_tensors([path])["a"], read_memory(), 0
    for piece in stored.make_pieces():
        assert piece.sum() == piece.numel()
        most = max(most, read_memory() - before)
    assert most < 100_000_000


def count_read_bytes():
    """Bytes that this process has asked of files so far, by whatever library."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("file_name", FILE_NAMES)
def test_opening_a_large_file_reads_its_description_only(tmp_path, file_name):
    path = save_as({f"t{index}": torch.zeros(1_000_000) for index in range(5)}, tmp_path / file_name)  # 20 MB
    read_tensors([save_as({"small": torch.zeros(1)}, tmp_path / f"small_{file_name}")])  # imports are done here
    before, memory = count_read_bytes(), read_memory()
    tensors = read_tensors([path])
    assert count_read_bytes() - before < 1_000_000 and read_memory() - memory < 10_000_000
    assert len(tensors) == 5


def test_tensors_come_in_the_order_of_the_files(tmp_path):
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]},
    }
    second = write_safetensors(tmp_path / "2.safetensors", header, b"\1\2\3\4\5")
    first = save_as({"zuletzt": torch.ones(1)}, tmp_path / "1.safetensors")
    pickled = save_as({"b": torch.ones(9), "a": torch.ones(9)}, tmp_path / "3.bin")
    tensors = read_tensors([first, second, pickled])
    assert list(tensors) == ["zuletzt", "late", "early", "b", "a"]
    assert tensors["late"].load().tolist() == [1, 2] and tensors["early"].load().tolist() == [3, 4, 5]


def test_views_of_one_storage_are_read_as_they_look(tmp_path, monkeypatch):
    """torch.save stores a shared storage once; offsets and strides say who sees what of it."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 16)
    base = torch.arange(24.0).reshape(4, 6)
    expected = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "every_second": base[::2, ::3],
        "turned_block": base[1:, 2:4].T,
        "last": base[3, 5],
        "spread": base[:3, :1].expand(3, 4),
        "parameter": torch.nn.Parameter(base[2]),
    }
    tensors = read_tensors([save_as(expected, tmp_path / "pytorch_model.bin")])
    for name, tensor in expected.items():
        tensor = tensor.detach().contiguous()
        assert bits(tensors[name].load()) == bits(tensor) and not tensors[name].load().requires_grad, name
        assert sum((list(view_bytes(piece)) for piece in tensors[name].make_pieces()), []) == bits(tensor)[2]


class Hostile:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


NO_PLAIN_FILE = "is not a plain file of tensors as torch.save has written it since PyTorch 1.6"


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    torch.save({"a": torch.ones(2), "b": Hostile(target)}, path)
    with pytest.raises(UserError) as error:
        read_tensors([path])
    assert str(error.value).startswith(f"{path}: {NO_PLAIN_FILE} (UnpicklingError")
    assert "\n" not in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target)))
    assert target.exists(), "the pickle must be dangerous, or this test shows nothing"


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=f"{path}: {NO_PLAIN_FILE}"):
        read_tensors([path])


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"state_dict": {"a": torch.ones(2)}, "epoch": 3},
        {"a": torch.ones(2), "b": None},
        {"a": torch.ones(2), "step": 1000},
        {"a": torch.ones(2), 1: torch.ones(2)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
        torch.nn.Linear(2, 2),
        "a text",
    ],
    ids=["list", "tensor", "nested", "none", "number", "number_as_name", "sparse", "no_bytes", "module", "text"],
)
def test_a_bin_file_that_is_no_flat_dict_of_tensors_is_refused(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(UserError, match=f"{path}: {NO_PLAIN_FILE}"):
        read_tensors([path])


@pytest.mark.parametrize("damage", ["empty", "five_bytes", "html", "half", "last_byte"])
def test_damaged_bin_files_are_named(tmp_path, damage):
    path = save_as({"a": torch.rand(1000)}, tmp_path / "pytorch_model.bin")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "five_bytes": whole[:5],
            "html": b"<!DOCTYPE html><html>Please log in</html>",
            "half": whole[: len(whole) // 2],
            "last_byte": whole[:-1],
        }[damage]
    )
    with pytest.raises(UserError, match=f"{path}: {NO_PLAIN_FILE}.*Download, copy or make it again."):
        read_tensors([path])


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: cannot be read .No such file or directory."):
            read_tensors([tmp_path / name])


def entry(dtype="F32", shape=(2, 3), data_offsets=(0, 24)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


DAMAGED = {
    "empty": b"",
    "five_bytes": b"\x10\0\0\0\0",
    "html": b"<!DOCTYPE html><html>Please log in</html>",
    "length_beyond_file": struct.pack("<Q", 2**63) + b"{}",
    # As a clone without git-lfs leaves it.
    "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n",
    "no_json": b"{'a': 1}",
    "list": b"[1, 2]",
    "deep": b'{"a":' * 30_000,
    "no_offsets": b'{"a": {"dtype": "F32", "shape": [6]}}',
    "negative_shape": {"a": entry(shape=[-2, -3])},
    "float_shape": {"a": entry(shape=[2.0, 3])},
    "backward_offsets": {"a": entry(data_offsets=[24, 0])},
    "overlap": {"a": entry(), "b": entry(shape=[1], data_offsets=[20, 24])},
    "hole": {"a": entry(shape=[2], data_offsets=[0, 8]), "b": entry(shape=[2], data_offsets=[16, 24])},
    "shape_large": {"a": entry(shape=[2, 4])},
    "shape_huge": {"a": entry(shape=[2**40, 2**40])},
    "unknown_dtype": {"a": entry(dtype="f32")},
    "one_byte_less": {"a": entry(shape=[25], dtype="U8", data_offsets=[0, 25])},
    "one_byte_more": {"a": entry(shape=[23], dtype="U8", data_offsets=[0, 23])},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors_files_are_named(tmp_path, damage):
    """safetensors says what is wrong, and the message which file, how long it is, and what to do."""
    path, content = tmp_path / "model.safetensors", DAMAGED[damage]
    if damage in ("empty", "five_bytes", "html", "length_beyond_file", "lfs_pointer"):
        path.write_bytes(content)
    else:
        write_safetensors(path, content)
    with pytest.raises(UserError) as error:
        read_tensors([path])
    size = f"{path.stat().st_size:,} bytes"
    assert str(error.value).startswith(f"{path}: is not a safetensors file, or an incomplete one ({size}; ")
    assert str(error.value).endswith("Download, copy or make it again.")


def test_the_metadata_of_a_header_is_no_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": entry()}
    tensors = read_tensors([write_safetensors(tmp_path / "model.safetensors", header)])
    assert list(tensors) == ["a"] and tensors["a"].load().tolist() == [[0.0] * 3] * 2


def write_sharded(folder, shards):
    """Shards and their index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    for file_name, tensors in shards.items():
        save_as(tensors, folder / file_name)
    is_pickled = next(iter(shards)).endswith(".bin")
    index = folder / ("pytorch_model.bin.index.json" if is_pickled else "model.safetensors.index.json")
    weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_one_model(tmp_path, ending):
    shards = {f"model-1-of-2.{ending}": {"a": torch.ones(2)}, f"model-2-of-2.{ending}": {"b": torch.zeros(3)}}
    write_sharded(tmp_path, shards)
    tensors = open_model_tensors(tmp_path)
    assert list(tensors) == ["a", "b"]
    assert tensors["a"].load().tolist() == [1, 1] and tensors["b"].load().tolist() == [0, 0, 0]


def test_safetensors_come_before_bin_and_one_file_before_shards(tmp_path):
    """As transformers chooses where a folder holds several forms."""
    files = [
        ("pytorch_model.bin.index.json", 4.0),
        ("pytorch_model.bin", 3.0),
        ("model.safetensors.index.json", 2.0),
        ("model.safetensors", 1.0),
    ]
    for name, value in files:
        if name.endswith(".index.json"):
            write_sharded(tmp_path, {f"shard-{value}.{name.split('.')[1]}": {"a": torch.tensor(value)}})
        else:
            save_as({"a": torch.tensor(value)}, tmp_path / name)
        assert open_model_tensors(tmp_path)["a"].load().item() == value


def read_folder_error(folder):
    with pytest.raises(UserError) as error:
        open_model_tensors(folder)
    return str(error.value)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    assert read_folder_error(tmp_path) == (
        f"{tmp_path}: has no weights; expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        "pytorch_model.bin.index.json"
    )


def test_a_missing_shard_is_named_with_its_index(tmp_path):
    index = write_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(2)}})
    (tmp_path / "2.safetensors").unlink()
    assert read_folder_error(tmp_path) == (
        f"{index}: names shard 2.safetensors, which is not in the folder; download it again"
    )


def test_a_damaged_shard_is_named_itself(tmp_path):
    write_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(2)}})
    os.truncate(tmp_path / "2.safetensors", 20)
    assert read_folder_error(tmp_path).startswith(f"{tmp_path / '2.safetensors'}: is not a safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": ["1.safetensors"]}}',
        b'{"weight_map": {"a": 1, "b": "1.safetensors"}}',
        b"\xff",
    ],
)
def test_an_index_of_another_form_is_named(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    assert read_folder_error(tmp_path).startswith(f"{index}: ")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/1.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, outside):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "1.safetensors", folder / "sub" / "1.safetensors"):
        save_as({"a": torch.ones(2)}, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": outside}}))
    name = Path(outside).name
    assert read_folder_error(folder) == f"{index}: names shard {name}, which is not in the folder; download it again"


@pytest.mark.parametrize("shard", ["..", ".", "sub"])
def test_an_index_that_names_a_folder_is_refused(tmp_path, shard):
    (tmp_path / "sub").mkdir()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    assert str(index) in read_folder_error(tmp_path)


@pytest.mark.parametrize("place", ["1.safetensors", "2.safetensors"])
def test_a_tensor_that_is_not_in_the_shard_its_index_says_is_named(tmp_path, place):
    """`c` is nowhere, or in the other shard."""
    first = {"a": torch.ones(2)} | ({} if place == "1.safetensors" else {"c": torch.ones(1)})
    index = write_sharded(tmp_path, {"1.safetensors": first, "2.safetensors": {"b": torch.ones(2)}})
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = place
    index.write_text(json.dumps(content))
    assert read_folder_error(tmp_path).startswith(
        f"{tmp_path / place}: does not hold c, which model.safetensors.index.json places there."
    )


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path):
    write_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(2)}})
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert read_folder_error(tmp_path) == (
        f"{tmp_path / '2.safetensors'}: holds tensor a, and so does {tmp_path / '1.safetensors'}; keep only one"
    )


def to_hub_cache(folder, cache):
    """The same files as huggingface_hub keeps them: links from a snapshot to blobs."""
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / f"hash{number}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"hash{number}")
    return snapshot


def test_a_hub_cache_builds_the_same_model(world, tmp_path):
    language_model = to_hub_cache(world.language_model, tmp_path / "models--org--language")
    vision_tower = to_hub_cache(world.vision_tower, tmp_path / "models--org--vision")
    assert (language_model / "model.safetensors").is_symlink() and (vision_tower / "pytorch_model.bin").is_symlink()
    base = build(language_model, vision_tower, tmp_path / "base")
    expected, found = (load_file(folder / "model.safetensors") for folder in (world.base, base))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(path.is_symlink() for path in base.iterdir())


def test_a_hub_cache_whose_blob_is_gone_is_named(world, tmp_path, capsys):
    """What a download that was stopped, or a cache that was cleaned by hand, leaves."""
    snapshot = to_hub_cache(world.vision_tower, tmp_path / "cache")
    weights = snapshot / "pytorch_model.bin"
    blob = os.readlink(weights)
    (snapshot / blob).unlink()
    error = run_and_read_error(capsys, world.language_model, snapshot, tmp_path / "base")
    assert f"{weights}: is a link to {blob}, which is not there." in error
    assert not (tmp_path / "base").exists()


def test_a_shard_whose_blob_is_gone_is_named(tmp_path):
    index = write_sharded(tmp_path, {"1.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "1.safetensors").symlink_to("../../blobs/gone")
    assert read_folder_error(tmp_path).startswith(f"{index}: names shard 1.safetensors, which is not in the folder")
