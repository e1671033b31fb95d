"""A frozen tower's features are computed once and train the same."""

import errno
import os
import shutil
from functools import partial

import pytest
import torch
from conftest import read_losses, train_flags
from launching import run_with_torchrun
from PIL import Image

import train
from meme_llava.dataset.pixels import read_pixels
from meme_llava.distributed.heartbeat import Heartbeat
from meme_llava.errors import UserError
from meme_llava.model.attention_choice import SDPA
from meme_llava.model.llava import load_processing
from meme_llava.model.packed_llava import PackedLlava, load_packed_llava
from meme_llava.train import vision_features
from meme_llava.train.vision_features import encode_images


@pytest.mark.parametrize(
    "recipe",
    [{"train_type": "projector"}, {"train_type": "freeze_vision"}, {"vision_tower_training": "frozen"}],
    ids=["projector", "freeze_vision", "lora on the language model"],
)
def test_losses_are_those_of_images_encoded_in_every_step(world, tmp_path, recipe, capsys):
    """Eight records, one of them text only; three passes."""
    changes = {"num_train_epochs": 3, "lora_dropout": 0, **recipe}
    train.main(train_flags(world, tmp_path / "pixels", **changes))
    train.main([*train_flags(world, tmp_path / "features", **changes), "--cache_vision_features"])
    expected = read_losses(tmp_path / "pixels")
    assert len(expected) == 6
    assert read_losses(tmp_path / "features") == pytest.approx(expected, abs=2e-6)
    assert "images encoded: 8 of 8" in capsys.readouterr().err
    assert not (tmp_path / "features" / "vision_features").exists()


def test_the_tower_runs_once_an_image(world, tmp_path, monkeypatch):
    encoded = []
    original = PackedLlava.encode_images

    def count(self, pixel_values):
        encoded.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(PackedLlava, "encode_images", count)
    flags = train_flags(world, tmp_path / "out", train_type="projector", num_train_epochs=4)
    train.main([*flags, "--cache_vision_features"])
    assert encoded == [8]


@pytest.mark.long
def test_processes_share_the_work_and_the_file(world, tmp_path):
    changes = {"train_type": "projector", "device_batch_size": 1, "max_steps": 3}
    train.main(train_flags(world, tmp_path / "one", **changes))
    flags = [*train_flags(world, tmp_path / "two", **changes), "--cache_vision_features"]
    result = run_with_torchrun(["train.py", *flags])
    assert result.returncode == 0, result.stderr
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=5e-6)
    assert result.stderr.count("images encoded: 4 of 4") == 2


@pytest.mark.parametrize("uses_bf16", [False, True])
def test_what_is_read_is_what_the_tower_gave(world, tmp_path, uses_bf16):
    processing = load_processing(world.base)
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA).requires_grad_(False)
    paths = [world.image_folder / f"p{number}.png" for number in (4, 0, 2)]
    read_image = partial(read_pixels, policy=processing.image_policy)
    with Heartbeat(60) as heartbeat:
        features = encode_images(model, paths, read_image, tmp_path, 0, uses_bf16, heartbeat)
    assert features.size == (tmp_path / "vision_features" / "0" / "features.bin").stat().st_size
    pixels = torch.stack([read_pixels(path, processing.image_policy) for path in paths])
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16):
        expected = model.encode_images(pixels).to(torch.bfloat16 if uses_bf16 else torch.float32)
    assert all(torch.equal(features[path], own) for path, own in zip(paths, expected, strict=True))


def test_a_tower_that_learns_cannot_be_cached(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*train_flags(world, tmp_path / "out"), "--cache_vision_features"])
    assert "--cache_vision_features needs a frozen vision tower; --train_type lora trains it" in capsys.readouterr().err


def test_a_full_disk_and_a_damaged_image_stop_with_one_line(world, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    shutil.copytree(world.image_folder, images)
    Image.effect_noise((200, 200), 90).save(images / "p5.png")
    (images / "p5.png").write_bytes((images / "p5.png").read_bytes()[:-5000])
    flags = train_flags(world, tmp_path / "out", train_type="projector", image_folder=images)
    with pytest.raises(SystemExit):
        train.main([*flags, "--cache_vision_features", "--dataloader_workers", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "p5.png: the image is damaged" in error

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vision_features.os, "posix_fallocate", refuse)
    # What the first start left behind is in nobody's way.
    with pytest.raises(SystemExit):
        train.main([*train_flags(world, tmp_path / "out", train_type="projector"), "--cache_vision_features"])
    assert "the vision features take 0.0 GB" in capsys.readouterr().err


def test_records_without_images_have_nothing_to_cache(tmp_path):
    with pytest.raises(UserError, match="no record has an image"):
        encode_images(None, [], read_pixels, tmp_path, 0, False, Heartbeat(60))
