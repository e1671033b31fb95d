"""Every layout in which a release of transformers has written a LLaVA loads, trains and merges to the same bits."""

import shutil

import pytest
import torch
from conftest import train_flags
from conversions import merge
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import train
from meme_llava.errors import UserError
from meme_llava.model.llava import load_llava, open_llava_tensors
from meme_llava.storage.fingerprint import fingerprint_folder

VISION, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
LANGUAGE, HEAD = "language_model.model.", "language_model.lm_head."
# What stands in place of those four.
LAYOUTS = {
    "4.52": ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    "5 in memory": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    "5 on the disk": ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    "short": ("vision_tower.", "multi_modal_projector.", "language_model.", "lm_head."),
}


def rename(tensors, layout):
    renamed = {}
    for name, tensor in tensors.items():
        ours, theirs = next(
            pair for pair in zip((VISION, PROJECTOR, LANGUAGE, HEAD), layout, strict=True) if name.startswith(pair[0])
        )
        renamed[theirs + name.removeprefix(ours)] = tensor
    return renamed


def copy_base(world, folder):
    """A folder that says nothing of the names in its weights."""
    shutil.copytree(world.base, folder)
    (folder / "run_record.json").unlink()
    return folder, load_file(world.base / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_same_model(world, tmp_path, layout):
    folder, tensors = copy_base(world, tmp_path / "base")
    save_file(rename(tensors, LAYOUTS[layout]), folder / "model.safetensors")
    expected, found = (load_llava(one, torch.float32).state_dict() for one in (world.base, folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_transformers_saves_trains_and_merges_to_the_same_bits(world, trained, tmp_path):
    folder, _ = copy_base(world, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    LlavaForConditionalGeneration.from_pretrained(world.base).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()  # transformers 5 has it in processor_config.json
    train.main(train_flags(world, tmp_path / "trained", model=folder))
    for name, adapter in (("ours", trained), ("theirs", tmp_path / "trained")):
        merge(["--adapter", str(adapter), "--output_dir", str(tmp_path / name)])
    assert fingerprint_folder(tmp_path / "theirs") == fingerprint_folder(tmp_path / "ours")
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()


def test_a_tensor_under_two_names_is_refused(world, tmp_path):
    folder, tensors = copy_base(world, tmp_path / "base")
    tensors["lm_head.weight"] = tensors[f"{HEAD}weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="which are one tensor of a LLaVA; keep only one of them"):
        open_llava_tensors(folder)
