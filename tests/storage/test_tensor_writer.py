"""Writing tensor files: other libraries read the same bits, shards add up, and no half-written model stays behind."""

import json
import os
import resource
import shutil
import struct
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conversions import BASE_FILES, build, fail, run_and_read_error
from safetensors import safe_open
from safetensors.torch import load_file
from tensors import bits, draw_all
from transformers import LlavaForConditionalGeneration

import merge_lora
from meme_llava.errors import UserError
from meme_llava.storage import tensor_writer
from meme_llava.storage.tensor_files import open_model_tensors
from meme_llava.storage.tensor_writer import PlannedTensor, count_bytes, write_tensors

INDEX = "model.safetensors.index.json"


def plan(tensor, pieces=1):
    """A plan that gives a tensor in so many pieces."""
    return PlannedTensor(tensor.dtype, tuple(tensor.shape), lambda: iter(tensor.reshape(-1).tensor_split(pieces)))


def plan_all(tensors, pieces=1):
    return {name: plan(tensor, pieces) for name, tensor in tensors.items()}


def floats(count, value=1.0):
    return torch.full((count,), value)


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_other_libraries_read_the_same_bits(tmp_path, pieces):
    """Every dtype and shape, 100 pieces of which most are empty; read by safetensors and by our own reader."""
    expected = {name: tensor for name, tensor in draw_all().items() if tensor.dtype in tensor_writer.WRITTEN_DTYPES}
    advances = []
    write_tensors(plan_all(expected, pieces), tmp_path, advance=advances.append)
    assert names_of(tmp_path) == ["model.safetensors"]
    assert sum(advances) == count_bytes(plan_all(expected)) == sum(tensor.nbytes for tensor in expected.values())
    path = tmp_path / "model.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == expected.keys()
    tensors = open_model_tensors(tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in expected.items():
            assert bits(loaded[name]) == bits(file.get_tensor(name)) == bits(tensors[name].load()) == bits(tensor), name


def read_places(path):
    """{name: (offset in the file, element size)} from the header, read by hand."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    return {
        name: (8 + length + entry["data_offsets"][0], sizes.get(entry["dtype"], 1))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    """Odd counts of narrow elements come first by name and in the plan; names of all lengths move the header's end."""
    tensors = {f"a{'x' * index}": torch.ones(3, dtype=torch.bfloat16) for index in range(9)}
    tensors |= {"d": floats(3), "f": torch.ones(3, dtype=torch.float16)}
    for count in range(8):
        folder = tmp_path / str(count)
        folder.mkdir()
        chosen = dict(list(tensors.items())[count:])
        write_tensors(plan_all(chosen), folder)
        places = read_places(folder / "model.safetensors")
        assert places.keys() == chosen.keys()
        assert [name for name, (offset, size) in places.items() if offset % size] == []
        assert bits(load_file(folder / "model.safetensors")["d"]) == bits(floats(3))


def test_one_file_where_all_fits(tmp_path):
    """1000 bytes and no more are one file; the header does not count."""
    write_tensors(plan_all({"a": floats(150), "b": floats(100)}), tmp_path, "1KB")
    assert names_of(tmp_path) == ["model.safetensors"]


def test_shards_and_index_are_as_written_by_hand(tmp_path):
    """a and b (600 + 400 bytes) fill the first shard, c (4 bytes) begins the second, and d follows."""
    tensors = {"a": floats(150, 1.0), "b": floats(100, 2.0), "c": torch.tensor(3.0), "d": torch.ones(10).half()}
    advances = []
    write_tensors(plan_all(tensors), tmp_path, "1KB", advances.append)
    assert names_of(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 1024},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
            "d": "model-00002-of-00002.safetensors",
        },
    }
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    assert set(first) == {"a", "b"} and set(second) == {"c", "d"}
    for name, tensor in (first | second).items():
        assert bits(tensor) == bits(tensors[name])
    assert advances == [600, 400, 4, 20]


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path):
    tensors = {"small": floats(10), "large": floats(1000), "after": floats(10)}
    write_tensors(plan_all(tensors), tmp_path, "1KB")
    found = open_model_tensors(tmp_path)
    for name, tensor in tensors.items():
        assert bits(found[name].load()) == bits(tensor)
    shards = {name: stored.path.name for name, stored in found.items()}
    assert list(shards.values()).count(shards["large"]) == 1
    assert shards["small"] == shards["after"]
    assert len(names_of(tmp_path)) == 3


DiskUsage = namedtuple("DiskUsage", "total used free")


def test_too_small_a_disk_is_an_error_before_the_first_byte(tmp_path, monkeypatch):
    """15 GB, of which nothing may be made; 2 GB are free."""

    def make_nothing():
        raise AssertionError("a piece was made")

    planned = {"a": PlannedTensor(torch.float32, (3_750_000_000,), make_nothing)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 2_000_000_000))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError) as error:
        write_tensors(planned, folder)
    assert str(error.value) == (
        f"{tmp_path}: needs 15.0 GB, the disk has 2.0 GB free. Free some, or choose another --output_dir."
    )
    assert list(folder.iterdir()) == []


def test_merging_and_assembling_on_a_full_disk_stop_before_they_start(world, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 1000))
    merge_error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "merged", code=7)
    build_error = run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "base", code=7)
    for error, place in ((merge_error, tmp_path / "merged"), (build_error, tmp_path)):
        assert (
            f"error: {place}: needs " in error
            and " KB, the disk has 1.0 KB free. Free some, or choose another" in error
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def short_files():
    """The kernel refuses bytes of a file after the first 100,000, as it refuses them on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_while_writing_is_named_and_leaves_nothing(trained, tmp_path, capsys, short_files):
    error = fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "merged", "--dtype", "float32", code=7)
    weights = tmp_path / ".merged.incomplete" / "model.safetensors"
    assert error.splitlines()[-1] == f"error: {weights}: cannot be written (File too large)"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def make_disk(tmp_path):
    """Makes a real disk of so many KB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs root and the right to mount")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("is_known", "message"),
    [
        (True, "{disk}/out: needs 116.1 KB, the disk has 81.9 KB free."),
        (False, "{disk}/.out.incomplete/model.safetensors: cannot be written (No space left on device)"),
    ],
    ids=["too_small", "filled_by_others_meanwhile"],
)
def test_a_really_full_disk_stays_empty(trained, make_disk, monkeypatch, capsys, is_known, message):
    """80 KB; the merged float16 weights alone are larger."""
    disk = make_disk(80)
    if not is_known:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 10**12))
    error = fail(capsys, "--adapter", trained, "--output_dir", disk / "out", code=7)
    assert f"error: {message.format(disk=disk)}" in error
    assert list(disk.iterdir()) == []


def test_a_disk_without_room_for_the_small_files_is_named_too(trained, tmp_path, make_disk, capsys):
    """The weights fit, and three more blocks of 4 KB; the config, the tokenizer and the others need more."""
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(tmp_path / "out"), "--no_verify"])
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    disk = make_disk((-(-size // 4096) + 3) * 4)
    error = fail(capsys, "--adapter", trained, "--output_dir", disk / "out", code=7)
    assert f"error: {disk / '.out.incomplete'}: the disk is full. Free some, or choose another --output_dir." in error
    assert list(disk.iterdir()) == []


def test_a_failing_write_is_not_lost_in_the_writing_thread(tmp_path, monkeypatch):
    """The last piece's failure is seen, although no piece after it waits for it."""

    def refuse(file, view):
        if len(view) == 8:
            raise OSError(28, "No space left on device")
        while len(view):
            view = view[file.write(view) :]

    monkeypatch.setattr("meme_llava.storage.tensor_writer._write_bytes", refuse)
    with pytest.raises(UserError) as error:
        write_tensors(plan_all({"a": floats(100), "b": floats(2)}), tmp_path)
    assert str(error.value) == f"{tmp_path / 'model.safetensors'}: cannot be written (No space left on device)"


@pytest.mark.parametrize("pieces", [[floats(9)], [floats(5), floats(6)], []], ids=["few", "many", "none"])
def test_a_plan_that_gives_other_bytes_than_promised_is_an_error(tmp_path, pieces):
    planned = {"good": plan(floats(3)), "odd": PlannedTensor(torch.float32, (10,), lambda: iter(pieces))}
    made = sum(piece.nbytes for piece in pieces)
    with pytest.raises(RuntimeError, match=f"model.safetensors: {made} bytes were made of a tensor of 40"):
        write_tensors(planned, tmp_path)


def test_existing_files_are_never_written_over(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="model.safetensors: cannot be written .File exists."):
        write_tensors(plan_all({"a": floats(3)}), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def load_folder(folder):
    return {name: stored.load() for name, stored in open_model_tensors(folder).items()}


def check_sharded(folder, single):
    """`folder` holds the tensors of `single` in shards of at most 20 KB, and transformers finds them all."""
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 5
    numbered = {f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)}
    assert {path.name for path in folder.iterdir()} == (BASE_FILES - {"model.safetensors"}) | numbered | {INDEX}
    index = json.loads((folder / INDEX).read_text())
    expected = load_folder(single)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    found = {}
    for shard in shards:
        tensors = load_file(shard)
        assert {name for name, file_name in index["weight_map"].items() if file_name == shard.name} == set(tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        found |= tensors
    assert all(bits(found[name]) == bits(tensor) for name, tensor in expected.items())
    sharded, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    whole = LlavaForConditionalGeneration.from_pretrained(single).state_dict()
    assert all(bits(tensor) == bits(whole[name]) for name, tensor in sharded.state_dict().items())


def test_an_assembled_model_in_shards_is_the_same_model(world, tmp_path):
    base = build(world.language_model, world.vision_tower, tmp_path / "base", "--max_shard_size", "20KB")
    check_sharded(base, world.base)
    record = json.loads((base / "run_record.json").read_text())
    assert record["fingerprint"] == json.loads((world.base / "run_record.json").read_text())["fingerprint"]
    assert record["settings"]["max_shard_size"] == "20KB"


def test_shards_in_and_out_merge_to_the_same_model(world, trained, tmp_path):
    """--base_model accepts the same weights in another division: the fingerprint is the tensors' own."""
    shards = ("--max_shard_size", "20KB")
    base = build(world.language_model, world.vision_tower, tmp_path / "base", *shards)
    for name, more in (("whole", []), ("sharded", ["--base_model", str(base), *shards])):
        merge_lora.main(["--adapter", str(trained), "--output_dir", str(tmp_path / name), *more])
    check_sharded(tmp_path / "sharded", tmp_path / "whole")


@pytest.mark.parametrize("value", ["5", "0GB", "-1GB", "5 GB", "fast", "5gb", "1.5GB", "GB", "", "5GiB", "٥GB"])
def test_sizes_that_are_none_stop_with_a_sentence(world, trained, tmp_path, capsys, value):
    flag = f"--max_shard_size={value}"
    errors = [
        fail(capsys, "--adapter", trained, "--output_dir", tmp_path / "out", flag),
        run_and_read_error(capsys, world.language_model, world.vision_tower, tmp_path / "out", flag),
    ]
    for error in errors:
        assert error == (
            f"error: --max_shard_size is {value!r}, expected a whole number and KB, MB, GB or TB, such as 5GB\n"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--max_shard_size", "20KB"]], ids=["one_file", "shards"])
def test_all_is_on_the_disk_before_the_directory_gets_its_name(world, trained, tmp_path, monkeypatch, more):
    """Every file and the directory itself are synced, then renamed, then the parent is synced: in that order."""
    events, fsync, rename = [], os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(path, target):
        events.append(("rename", path))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    out, temporary = tmp_path / "out", tmp_path / ".out.incomplete"
    for run in (
        lambda: merge_lora.main(["--adapter", str(trained), "--output_dir", str(out), "--no_verify", *more]),
        lambda: build(world.language_model, world.vision_tower, out, "--overwrite", "--no_verify", *more),
    ):
        events.clear()
        run()
        position = events.index(("rename", temporary))
        before, after = events[:position], events[position + 1 :]
        synced = [path for kind, path in before if kind == "fsync"]
        assert set(synced) >= {temporary, *(temporary / path.name for path in out.iterdir())}
        assert synced[-1] == temporary, "the directory comes after its files"
        assert ("fsync", tmp_path) in after
