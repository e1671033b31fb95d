"""A model's fingerprint: of its tensors, not of its files, and never of what was there before."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from meme_llava.storage import tensor_files
from meme_llava.storage.tensor_files import fingerprint_folder


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
        patch.setattr(tensor_files, "_hash_tensor", lambda *_: pytest.fail("it was hashed again"))
        assert fingerprint_folder(folder) == first
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert fingerprint_folder(folder) != first
