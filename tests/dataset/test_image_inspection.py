"""What is found in image files: in parallel as alone."""

import os
from pathlib import Path

import pytest
from PIL import Image

from meme_llava.dataset import inspection as images
from meme_llava.dataset.image_files import EXTENSIONS, IMAGE_SUFFIXES
from meme_llava.dataset.inspection import ImageFacts, check_image, inspect_image, inspect_images

LIMIT = 50_000_000


@pytest.fixture
def folder(tmp_path) -> Path:
    """A red PNG, a palette PNG, a truncated JPEG and an empty file."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (100, 80), "red").save(folder / "red.png")
    Image.new("P", (70, 90)).save(folder / "palette.png")
    Image.effect_noise((100, 80), 90).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "empty.png").write_bytes(b"")
    return folder


def look(folder: Path, workers: int = 1) -> dict[str, ImageFacts]:
    found = inspect_images(sorted(folder.iterdir()), LIMIT, workers=workers)
    return {path.name: facts for path, facts in found.items()}


def test_facts_written_out(folder):
    facts = look(folder)
    assert facts["empty.png"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (facts["red.png"].format, facts["red.png"].width, facts["red.png"].height) == ("PNG", 100, 80)
    assert facts["red.png"].notes == (("one_colour", "every pixel is (255, 0, 0)"),) and facts["red.png"].fault is None
    assert facts["palette.png"].notes == (("palette", "P"), ("one_colour", "every pixel is (0, 0, 0)"))
    assert facts["cut.jpg"].fault[0] == "damaged_image" and facts["empty.png"].fault[0] == "empty_file"


def test_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "open_image", lambda *_, **__: pytest.fail("was decoded"))
    facts = inspect_image(tmp_path / "a.png", 7999)
    assert facts.fault == ("too_many_pixels", "100x80 pixels, more than the limit of 7,999; scale it down")
    assert inspect_image(tmp_path / "a.png", 7999, decode=False).fault == facts.fault and facts.sha256 is not None


def test_a_glance_reads_the_header_alone(folder, monkeypatch):
    monkeypatch.setattr(images, "open_image", lambda *_, **__: pytest.fail("was decoded"))
    monkeypatch.setattr(images, "hash_file", lambda path: pytest.fail("was read whole"))
    assert inspect_image(folder / "cut.jpg", LIMIT, decode=False) == ImageFacts(None, "JPEG", 100, 80)
    assert inspect_image(folder / "palette.png", LIMIT, decode=False) == ImageFacts(None, "PNG", 70, 90)
    assert inspect_image(folder / "empty.png", LIMIT, decode=False).fault[0] == "empty_file"


def test_in_parallel_is_as_one_after_the_other(folder):
    for number in range(40):
        Image.new("RGB", (64 + number, 80), (number, 0, 0)).save(folder / f"{number}.png")
    assert look(folder, workers=2) == look(folder)


def test_progress_counts_every_file_once(folder, capsys):
    inspect_images([*sorted(folder.iterdir()), folder / "red.png", folder / "gone.png"], LIMIT, workers=1)
    assert "images 5/5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["表情包😀.png", "a\nb.png", "%3f?#.png", os.fsdecode(b"\xff.png")])
def test_any_name_is_looked_at(tmp_path, name):
    Image.new("RGB", (70, 80)).save(tmp_path / name)
    assert look(tmp_path)[name].width == 70


# ---- Tables ----


def test_the_suffixes_are_those_of_the_formats():
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"} <= IMAGE_SUFFIXES
    assert len(IMAGE_SUFFIXES) == sum(map(len, EXTENSIONS.values()))


def test_shapes_are_judged_by_their_sides():
    def judge(width: int, height: int) -> list[str]:
        facts = ImageFacts("0", "PNG", width, height)
        return [kind for kind, _ in check_image(Path("a.png"), facts, {})]

    assert judge(64, 256) == judge(64, 64) == judge(3000, 3000) == []
    assert judge(3, 3) == ["too_small"]
    assert judge(4, 4) == judge(63, 64) == judge(64, 63) == ["low_resolution"]
    assert judge(64, 257) == judge(257, 64) == judge(3200, 64) == ["stretched_shape"]
    assert judge(3201, 64) == judge(64, 3201) == ["extreme_shape"]
    assert judge(1, 51) == ["too_small", "extreme_shape"]
    assert judge(4, 17) == ["low_resolution", "stretched_shape"]


def inspect_and_die(path: Path, *arguments, **options) -> ImageFacts:
    if path.name in ("33.png", "58.png"):
        os._exit(11)
    return inspect_image(path, *arguments, **options)


def test_an_image_that_kills_its_decoder_is_blamed_and_no_other(folder, monkeypatch):
    for number in range(60):
        Image.new("RGB", (64 + number, 80), (number, 0, 0)).save(folder / f"{number:02d}.png")
    whole = look(folder)
    monkeypatch.setattr(images, "inspect_image", inspect_and_die)
    found = look(folder, workers=2)
    assert {name for name in found if found[name] != whole[name]} == {"33.png", "58.png"}
    assert found["33.png"].fault == ("damaged_image", "decoding it kills the program that does it")
