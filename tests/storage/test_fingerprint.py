"""A model's fingerprint: of its tensors, not of its files, and never of what was there before."""

import os
import pwd
import shutil

import pytest
import torch
from conversions import build
from safetensors.torch import load_file, save_file

from meme_llava.storage import fingerprint
from meme_llava.storage.fingerprint import fingerprint_folder
from meme_llava.storage.run_record import read_run_record


@pytest.fixture
def folder(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    return tmp_path / "base"


def test_equal_tensors_have_one_fingerprint_in_any_order_of_the_file(world, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(reversed(tensors.items())), folder / "model.safetensors")
    assert fingerprint_folder(folder) == fingerprint_folder(world.base)


@pytest.mark.parametrize("name", ["language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.bias"])
def test_any_value_counts(world, folder, name):
    tensors = load_file(folder / "model.safetensors")
    flat = tensors[name].view(-1)
    flat[len(flat) // 2] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint_folder(folder) != fingerprint_folder(world.base)


def test_dtype_and_shape_count(world, folder):
    name = "multi_modal_projector.linear_1.weight"
    found = {fingerprint_folder(folder)}
    for change in (lambda tensor: tensor.half(), lambda tensor: tensor.t().contiguous().view_as(tensor.t())):
        tensors = load_file(world.base / "model.safetensors")
        save_file({**tensors, name: change(tensors[name])}, folder / "model.safetensors")
        found.add(fingerprint_folder(folder))
    assert len(found) == 3


def test_what_was_found_is_remembered_until_a_file_changes(folder, monkeypatch):
    first = fingerprint_folder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_hash_tensor", lambda *_: pytest.fail("it was hashed again"))
        assert fingerprint_folder(folder) == first
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert fingerprint_folder(folder) != first


def test_a_user_without_a_home_gets_a_fingerprint_and_no_folder_of_that_name(folder, tmp_path, monkeypatch):
    """As in a container that runs under the number of a user whom it does not know."""
    expected = fingerprint_folder(folder)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    monkeypatch.chdir(tmp_path)
    assert fingerprint_folder(folder) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_build_found_counts_where_it_puts_the_folder(world, tmp_path, monkeypatch):
    """It hashes a folder under another name, which is renamed when it is whole."""
    base = build(world.language_model, world.vision_tower, tmp_path / "base")
    monkeypatch.setattr(fingerprint, "_hash_tensor", lambda *_: pytest.fail("it was hashed again"))
    assert fingerprint_folder(base) == read_run_record(base)["fingerprint"]


def test_another_content_under_the_same_time_and_size_is_hashed_again(folder):
    first, path = fingerprint_folder(folder), folder / "model.safetensors"
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat()[:2] == state[:2] and path.stat().st_size == state.st_size
    assert fingerprint_folder(folder) != first
