"""Reading tensor files: every bit as it was stored, no more bytes than needed, and every damage named."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from conversions import build, run_and_read_error
from safetensors.torch import load_file, save_file
from tensors import bits, draw_all

from meme_llava.errors import UserError
from meme_llava.storage import tensor_reader
from meme_llava.storage.tensor_reader import TensorReader, open_model_tensors


def save_as(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The sizes of all reads of tensor bytes, as they are asked of the system."""
    sizes, preadv = [], os.preadv

    def record(descriptor, buffers, position):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", record)
    return sizes


def write_safetensors(path, header, data=bytes(24)):
    """A file of the format's parts, written by hand: length, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("piece_bytes", [8, 24, 16_000_000])
def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path, monkeypatch, file_name, piece_bytes):
    """What safetensors and torch themselves wrote; pieces of 8 bytes are one float64 or eight bytes."""
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", piece_bytes)
    expected = draw_all()
    with TensorReader([save_as(expected, tmp_path / file_name)]) as tensors:
        assert list(tensors) == sorted(expected) and len(tensors) == 72
        assert "F32.matrix" in tensors and "F32" not in tensors
        for name, tensor in expected.items():
            stored = tensors.stored[name]
            assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert bits(tensors.read(name)) == bits(tensor), name
            pieces = list(tensors.read_pieces(name))
            assert all(piece.nbytes <= piece_bytes and piece.dim() == 1 for piece in pieces)
            assert sum((bits(piece)[2] for piece in pieces), []) == bits(tensor)[2], name
            if tensor.dim():
                for start, stop in ((0, tensor.shape[0]), (tensor.shape[0] // 2, tensor.shape[0]), (0, 0)):
                    assert bits(tensors.read_rows(name, start, stop)) == bits(tensor[start:stop]), name


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_read_as_converts_like_torch(tmp_path, monkeypatch, file_name):
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 16)
    tensors = {
        "matrix": torch.tensor([[1.0, -2.5, 3.14159], [65519.0, 65520.0, 1e-8]]),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 4),
    }
    with TensorReader([save_as(tensors, tmp_path / file_name)]) as reader:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for name, tensor in tensors.items():
                assert bits(reader.read_as(name, dtype)) == bits(tensor.to(dtype)), (name, dtype)


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_no_more_is_read_than_asked_for(tmp_path, monkeypatch, reads, file_name):
    """600 bytes a row: one row is 600 bytes, two are 1200, and opening the file reads no tensor."""
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 1000)
    path = save_as({"a": torch.rand(10, 150), "b": torch.rand(10, 150)}, tmp_path / file_name)
    with TensorReader([path]) as tensors:
        assert reads == []
        tensors.read_rows("a", 9, 10)
        assert reads == [600]
        tensors.read_rows("b", 3, 5)
        assert reads == [600, 1200]
        list(tensors.read_pieces("b"))
        assert reads[2:] == [1000] * 6
        tensors.read("a")
        assert reads[8:] == [6000]


def count_read_bytes():
    """Bytes that this process has asked of files so far, by whatever library."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_opening_a_large_file_reads_its_description_only(tmp_path, file_name):
    path = save_as({f"t{index}": torch.zeros(1_000_000) for index in range(5)}, tmp_path / file_name)  # 20 MB
    TensorReader([save_as({"small": torch.zeros(1)}, tmp_path / f"small_{file_name}")])  # imports are done here
    before = count_read_bytes()
    TensorReader([path])
    assert count_read_bytes() - before < 1_000_000


def test_a_short_read_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The system may give fewer bytes than asked for; 2 GB is the most that Linux gives at once."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: preadv(fd, [buffers[0][:7]], position))
    expected = torch.arange(50, dtype=torch.float32)
    with TensorReader([save_as({"a": expected}, tmp_path / "model.safetensors")]) as tensors:
        assert torch.equal(tensors.read("a"), expected)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = save_as({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    with TensorReader([path]) as tensors:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(UserError, match=f"{path}: ended at byte {path.stat().st_size:d} while it was read"):
            tensors.read("a")


def test_order_in_the_file_is_not_the_order_of_names(tmp_path):
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]},
    }
    second = write_safetensors(tmp_path / "2.safetensors", header, b"\1\2\3\4\5")
    first = save_as({"zuletzt": torch.ones(1)}, tmp_path / "1.safetensors")
    with TensorReader([second, first]) as tensors:
        assert list(tensors) == ["early", "late", "zuletzt"]
        assert tensors.list_in_file_order() == ["zuletzt", "late", "early"]
        assert tensors.read("late").tolist() == [1, 2] and tensors.read("early").tolist() == [3, 4, 5]


def test_files_are_closed_in_the_end(tmp_path):
    path = save_as({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with TensorReader([path]) as tensors:
        tensors.read("a")
        tensors.read("a")
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def make_views():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "block": base[1:3, 2:5],
        "every_second": base[::2, ::3],
        "turned_block": base[1:, 2:4].T,
        "last": base[3, 5],
        "repeated": base[:1].expand(5, 6),
        "spread": base[:3, :1].expand(3, 4),
        "parameter": torch.nn.Parameter(base[2]),
        "own": torch.tensor([7.0]),
    }


def test_views_of_one_storage_are_read_as_they_look(tmp_path, monkeypatch):
    """torch.save stores a shared storage once; offsets and strides say who sees what of it."""
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 16)
    expected = make_views()
    path = save_as(expected, tmp_path / "pytorch_model.bin")
    with TensorReader([path]) as tensors:
        assert tensors.stored["turned_block"].stride == (1, 6)
        assert tensors.stored["rows"].stride is None
        for name, tensor in expected.items():
            tensor = tensor.detach()
            assert bits(tensors.read(name)) == bits(tensor.contiguous()), name
            assert sum((bits(piece)[2] for piece in tensors.read_pieces(name)), []) == bits(tensor.contiguous())[2]
            assert bits(tensors.read_as(name, torch.float16)) == bits(tensor.half().contiguous())
            if tensor.dim():
                assert bits(tensors.read_rows(name, 0, 1)) == bits(tensor[:1].contiguous())
    offsets = {tensors.stored[name].offset for name in ("whole", "transposed", "repeated", "spread")}
    assert len(offsets) == 1, "a shared storage stands in the file once"
    assert tensors.stored["last"].offset - tensors.stored["whole"].offset == 23 * 4


def test_a_small_view_reads_its_own_span_only(tmp_path, reads):
    """Two columns of a 100 x 100 matrix span 99 * 100 + 2 values, two rows of it 200."""
    base = torch.rand(100, 100)
    with TensorReader(
        [save_as({"columns": base[:, :2], "rows": base[5:7]}, tmp_path / "pytorch_model.bin")]
    ) as tensors:
        tensors.read("columns")
        tensors.read("rows")
    assert reads == [9902 * 4, 200 * 4]


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
        TensorReader([path])
    assert str(error.value).startswith(f"{path}: {NO_PLAIN_FILE} (UnpicklingError")
    assert "\n" not in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target)))
    assert target.exists(), "the pickle must be dangerous, or this test shows nothing"


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=f"{path}: {NO_PLAIN_FILE}"):
        TensorReader([path])


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
        TensorReader([path])


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
    with pytest.raises(UserError, match=f"{path}: {NO_PLAIN_FILE}.*Delete it and download or make it again."):
        TensorReader([path])


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: cannot be read .No such file or directory."):
            TensorReader([tmp_path / name])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file or an interrupted one (0 bytes)"),
        (b"\x10\0\0\0\0", "is not a safetensors file or an interrupted one (5 bytes)"),
        (b"<!DOCTYPE html><html>Please log in</html>", "is not a safetensors file or an interrupted one (41 bytes)"),
        (struct.pack("<Q", 1) + b"{}", "is not a safetensors file or an interrupted one (10 bytes)"),
        (struct.pack("<Q", 3) + b"{}", "is not a safetensors file or an interrupted one (10 bytes)"),
        (struct.pack("<Q", 2**63) + b"{}", "is not a safetensors file or an interrupted one (10 bytes)"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "is not a safetensors file or an interrupted one (10 bytes)"),
        # A version of a git-lfs pointer file, as a clone without git-lfs leaves it.
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n", "is not a safetensors file"),
    ],
    ids=["empty", "five_bytes", "html", "length_1", "length_beyond_file", "length_2_63", "length_2_64", "lfs_pointer"],
)
def test_files_without_a_header_are_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        TensorReader([path])
    assert f"{path}: {message}" in str(error.value)
    assert str(error.value).endswith("Delete it and download or make it again.")


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    """100,000,008 bytes, most of them a hole: were it read, it would be called a damaged JSON."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    with pytest.raises(UserError, match="is not a safetensors file"):
        TensorReader([path])


@pytest.mark.parametrize(
    "header",
    [
        b"{'a': 1}",
        b"\xff\xfe{}",
        b"[1, 2]",
        b"null",
        b'{"a":' * 30_000,
        b'{"a": 1}',
        b'{"a": [1]}',
        b'{"a": {"shape": [6], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": [6]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24, 48]}}',
        b'{"a": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]}}',
    ],
    ids=[
        *("no_json", "no_utf8", "list", "null", "deep", "entry_is_number", "entry_is_list", "no_dtype", "no_shape"),
        *("no_offsets", "one_offset", "three_offsets", "dtype_is_list", "shape_is_number"),
    ],
)
def test_headers_of_another_form_are_named(tmp_path, header):
    path = write_safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match=f"{path}: its safetensors header is damaged .*Delete it and download"):
        TensorReader([path])


def entry(dtype="F32", shape=(2, 3), data_offsets=(0, 24)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    "wrong",
    [
        entry(shape=[-2, -3]),
        entry(shape=[2.0, 3]),
        entry(shape=[True, 6]),
        entry(shape="23"),
        entry(shape=[None]),
        entry(shape=[[2], 3]),
        entry(shape={"2": 3}),
        entry(shape=[0, -1], data_offsets=[0, 0]),
        entry(data_offsets=[0.0, 24.0]),
        entry(data_offsets=["0", "24"]),
        entry(data_offsets=[None, 24]),
        entry(data_offsets=[-24, 0]),
        entry(data_offsets=[24, 0]),
    ],
    ids=[
        *("negative_shape", "float_shape", "bool_shape", "text_shape", "null_shape", "nested_shape", "dict_shape"),
        *("negative_and_zero", "float_offsets", "text_offsets", "null_offset", "negative_offset", "backward_offsets"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_named(tmp_path, wrong):
    """A shape of two negative sizes has a positive product, and would fit its bytes."""
    data = b"" if wrong["data_offsets"] == [0, 0] else bytes(24)
    path = write_safetensors(tmp_path / "model.safetensors", {"odd.weight": wrong}, data)
    with pytest.raises(UserError) as error:
        TensorReader([path])
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("Delete it and download or make it again.")


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        # Two tensors that share bytes 20 to 24.
        ({"a": entry(), "b": entry(shape=[2], data_offsets=[20, 28])}, 28, "b takes bytes 20 to 28, expected 8 bytes"),
        # Four bytes that belong to nobody.
        ({"a": entry(), "b": entry(shape=[2], data_offsets=[28, 36])}, 36, "b takes bytes 28 to 36, expected 8 bytes"),
        ({"a": entry(data_offsets=[4, 28])}, 28, "a takes bytes 4 to 28, expected 24 bytes from 0 on"),
        # 2 x 3 float32 are 24 bytes, float16 12, 2 x 4 float32 32.
        ({"a": entry(dtype="F16")}, 24, "a takes bytes 0 to 24, expected 12 bytes from 0 on"),
        ({"a": entry(shape=[2, 4])}, 24, "a takes bytes 0 to 24, expected 32 bytes from 0 on"),
        ({"a": entry(shape=[])}, 24, "a takes bytes 0 to 24, expected 4 bytes from 0 on"),
        ({"a": entry(shape=[2**40, 2**40])}, 24, "a takes bytes 0 to 24, expected 4,835,703,278,458,516,698,824,704"),
        ({"a": entry(dtype="F4")}, 24, "a has dtype F4, which cannot be read; there are F64, F32, F16, BF16"),
        ({"a": entry(dtype="f32")}, 24, "a has dtype f32, which cannot be read"),
    ],
    ids=["overlap", "hole", "late_start", "dtype_small", "shape_large", "scalar", "shape_huge", "dtype", "lower_case"],
)
def test_headers_that_disagree_with_their_bytes_name_the_tensor(tmp_path, header, size, message):
    path = write_safetensors(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(UserError) as error:
        TensorReader([path])
    assert f"{path}: {message}" in str(error.value)


@pytest.mark.parametrize("change", ["one_byte_less", "half", "one_byte_more"])
def test_files_of_another_length_are_named(tmp_path, change):
    """8 bytes of length, a header, 4000 bytes of data."""
    path = save_as({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    whole = path.read_bytes()
    parts = {"one_byte_less": whole[:-1], "half": whole[: len(whole) // 2], "one_byte_more": whole + b"\0"}
    path.write_bytes(parts[change])
    with pytest.raises(UserError) as error:
        TensorReader([path])
    promised = f"is {len(parts[change]):,} bytes long, its header promises {len(whole):,}"
    assert str(error.value) == f"{path}: {promised}. Delete it and download or make it again."


def test_the_metadata_of_a_header_is_no_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": entry()}
    with TensorReader([write_safetensors(tmp_path / "model.safetensors", header)]) as tensors:
        assert list(tensors) == ["a"] and tensors.read("a").tolist() == [[0.0] * 3] * 2


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
    with open_model_tensors(tmp_path) as tensors:
        assert list(tensors) == ["a", "b"]
        assert tensors.read("a").tolist() == [1, 1] and tensors.read("b").tolist() == [0, 0, 0]


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
        with open_model_tensors(tmp_path) as tensors:
            assert tensors.read("a").item() == value


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
    assert re.match(
        f"{index}: (is not an index of weights|names shard (1|None), expected)", read_folder_error(tmp_path)
    )


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/1.safetensors", "./1.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, outside):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "1.safetensors", folder / "sub" / "1.safetensors"):
        save_as({"a": torch.ones(2)}, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": outside}}))
    assert read_folder_error(folder) == f"{index}: names shard {outside!r}, expected a file name without folders"


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
