"""The images of a folder are found whatever their names are, and what is left out is counted by its reason."""

import os
from pathlib import Path

import pytest
from PIL import Image

from meme_llava.dataset.image_files import describe_left_out, find_accepted_format, find_images
from meme_llava.dataset.user_files import check_file_names
from meme_llava.errors import UserError

NAMES = ["1.5倍快乐", "b.PNG", "c.image", "d.download", "好.jpg", "小朋友天天做饭", "明天再说吧.jfif"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images with and without an ending, and one of everything else that lies in such folders."""
    folder = tmp_path / "m"
    (folder / "猫").mkdir(parents=True)
    formats = ("GIF", "PNG", "WEBP", "BMP", "JPEG", "PNG", "JPEG")
    for name, format in zip((*NAMES, "._mac.jpg", "猫/e.png"), (*formats, "JPEG", "PNG"), strict=True):
        Image.new("RGB", (8, 8)).save(folder / name, format)
    (folder / "b.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(40))
    (folder / "IMG_1").write_bytes(b"\0\0\0\x24ftypheic" + bytes(40))
    (folder / "notes.txt").write_text("BMW")
    (folder / "sound").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    (folder / "empty").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache/f.png").touch()
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


def test_contents_decide_where_the_ending_does_not(folder):
    images, left_out = find_images(folder, subfolders=False)
    assert [path.name for path in images] == NAMES
    assert {reason: [path.name for path in paths] for reason, paths in left_out.items()} == {
        "hidden": ["._mac.jpg", ".cache"],
        "in AVIF format, to be converted": ["b.avif"],
        "in HEIF format, to be converted": ["IMG_1"],
        "not an image": ["empty", "notes.txt", "pipe", "sound"],
        "subfolder(s) not looked into": ["linked", "猫"],
    }
    assert "1 in AVIF format, to be converted, e.g. b.avif" in describe_left_out(left_out).split("; ")


def test_subfolders_are_looked_into_but_for_hidden_ones_and_links(folder):
    images, left_out = find_images(folder)
    assert sorted(str(path.relative_to(folder)) for path in images) == sorted([*NAMES, "猫/e.png"])
    assert [path.name for path in left_out["behind a link"]] == ["linked"]
    assert "subfolder(s) not looked into" not in left_out


def test_a_file_that_may_not_be_read_is_counted_and_stops_nothing(folder, monkeypatch):
    def read(path):
        if path.name == "notes.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return path.read_bytes()[:32]

    monkeypatch.setattr("meme_llava.dataset.image_files.read_start", read)
    images, left_out = find_images(folder, subfolders=False)
    assert [path.name for path in images] == NAMES
    assert "1 unreadable, e.g. notes.txt" in describe_left_out(left_out).split("; ")


def test_names_that_are_not_utf8_are_named(tmp_path):
    broken = tmp_path / os.fsdecode("我说的对吧".encode("gbk") + b".png")
    with pytest.raises(
        UserError,
        match=r"--images .*: 1 file name is not UTF-8, the first is '.*我说的对吧.png in GBK.*convmv -f gbk -t utf-8",
    ):
        check_file_names("--images", tmp_path, [tmp_path / "好.png", broken])
    check_file_names("--images", tmp_path, [tmp_path / "好.png"])


@pytest.mark.parametrize(
    "start, expected",
    [
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\xff\xd8", None),
        (b"GIF89a", "GIF"),
        (b"RIFF\x0a\0\0\0WEBPVP8 ", "WEBP"),
        (b"RIFF\0\0\0\0AVI LIST", None),
        (b"BM\x36\x0a\0\0\0\0\0\0", "BMP"),
        (b"BMW, VW and others", None),
        (b"", None),
    ],
)
def test_accepted_formats_are_told_by_their_first_bytes(start, expected):
    assert find_accepted_format(start) == expected
