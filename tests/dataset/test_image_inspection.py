"""What is found in image files: each is decoded once, in parallel as alone, and remembered until it changes."""

import contextlib
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from PIL import Image

from meme_llava.dataset import image_cache as image_cache
from meme_llava.dataset import image_inspection as images
from meme_llava.dataset.findings import KINDS
from meme_llava.dataset.image_cache import ImageCache, ImageFacts
from meme_llava.dataset.image_inspection import (
    EXTENSIONS,
    IMAGE_SUFFIXES,
    check_image,
    inspect_image,
    inspect_images,
)
from meme_llava.storage.cache import find_default_cache

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


@pytest.fixture
def inspected(monkeypatch) -> list[str]:
    """The names of the files that were looked at, in one process."""
    names = []

    def inspect(path: Path, *arguments, **options) -> ImageFacts:
        names.append(path.name)
        return inspect_image(path, *arguments, **options)

    monkeypatch.setattr(images, "inspect_image", inspect)
    return names


def look(folder: Path, cache_file: Path | None, max_pixels: int = LIMIT, workers: int = 1) -> dict[str, ImageFacts]:
    found = inspect_images(sorted(folder.iterdir()), max_pixels, ImageCache(cache_file), workers)
    return {path.name: facts for path, facts in found.items()}


ALL = ["cut.jpg", "empty.png", "palette.png", "red.png"]


def test_facts_written_out(folder):
    facts = look(folder, None)
    assert facts["empty.png"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (facts["red.png"].format, facts["red.png"].width, facts["red.png"].height) == ("PNG", 100, 80)
    assert facts["red.png"].notes == () and facts["red.png"].fault is None and facts["red.png"].decoded
    assert facts["palette.png"].notes == (("palette", "P"),)
    assert facts["cut.jpg"].fault[0] == "damaged_image" and facts["empty.png"].fault[0] == "empty_file"


def test_the_second_check_decodes_nothing(folder, tmp_path, inspected):
    first = look(folder, tmp_path / "cache.sqlite")
    assert inspected == ALL
    inspected.clear()
    assert look(folder, tmp_path / "cache.sqlite") == first
    assert inspected == []


def test_a_changed_file_is_looked_at_again(folder, tmp_path, inspected):
    look(folder, tmp_path / "cache.sqlite")
    inspected.clear()
    # As long as before, and with the old time of writing put back.
    before = (folder / "empty.png").stat()
    Image.new("P", (71, 90)).save(folder / "red.png")
    os.utime(folder / "empty.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look(folder, tmp_path / "cache.sqlite")["red.png"].width == 71
    # Setting a time changes the time of change, as any writing does; the file's contents are known all the same.
    assert inspected == ["red.png"]


def test_the_same_size_and_time_of_writing_do_not_hide_a_change(folder, tmp_path):
    look(folder, tmp_path / "cache.sqlite")
    path = folder / "red.png"
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:60] + bytes(len(content) - 60))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert look(folder, tmp_path / "cache.sqlite")["red.png"].fault[0] == "damaged_image"


def test_a_file_replaced_by_another_under_its_name_is_that_other_one(folder, tmp_path, inspected):
    look(folder, tmp_path / "cache.sqlite")
    inspected.clear()
    (folder / "palette.png").replace(folder / "red.png")
    assert look(folder, tmp_path / "cache.sqlite")["red.png"].width == 70
    assert inspected == []


def test_the_same_bytes_under_another_name_are_known(folder, tmp_path, inspected):
    look(folder, tmp_path / "cache.sqlite")
    inspected.clear()
    (folder / "copy.jpg").write_bytes((folder / "red.png").read_bytes())
    found = look(folder, tmp_path / "cache.sqlite")
    assert inspected == []
    assert found["copy.jpg"] == found["red.png"]
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (5,)
        assert database.execute("SELECT count(*) FROM contents").fetchone() == (4,)
    # What is said about a file names that file, although the facts are shared.
    assert check_image(folder / "copy.jpg", found["copy.jpg"], LIMIT) == [
        ("wrong_extension", f"{folder / 'copy.jpg'}: holds a PNG")
    ]
    assert check_image(folder / "red.png", found["red.png"], LIMIT) == []


def test_the_fault_of_shared_bytes_names_no_other_file(folder, tmp_path):
    (folder / "twin.jpg").write_bytes((folder / "cut.jpg").read_bytes())
    for _ in range(2):
        for name, facts in look(folder, tmp_path / "cache.sqlite").items():
            for kind, detail in check_image(folder / name, facts, LIMIT):
                assert kind in KINDS and detail.startswith(f"{folder / name}: ")
                assert not any(str(folder / other) in detail for other in {*ALL, "twin.jpg"} - {name})


def test_other_limits_of_pixels_are_kept_both_ways(folder, tmp_path, inspected):
    def judge(max_pixels: int) -> list[str]:
        facts = look(folder, tmp_path / "cache.sqlite", max_pixels)["red.png"]
        return [kind for kind, _ in check_image(folder / "red.png", facts, max_pixels)]

    assert judge(7999) == ["too_many_pixels"]
    inspected.clear()
    assert judge(7999) == ["too_many_pixels"] and inspected == []
    # It was not decoded before, so a higher limit has to look again …
    assert judge(8000) == [] and inspected == ["cut.jpg", "red.png"]
    inspected.clear()
    # … and a lower one has not.
    assert judge(7999) == ["too_many_pixels"] and judge(8000) == [] and inspected == []


def test_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "open_image", lambda *_, **__: pytest.fail("was decoded"))
    assert not inspect_image(tmp_path / "a.png", 7999).decoded


def test_a_glance_reads_the_header_alone(folder, monkeypatch):
    monkeypatch.setattr(images, "open_image", lambda *_, **__: pytest.fail("was decoded"))
    monkeypatch.setattr(images, "hash_file", lambda path: pytest.fail("was read whole"))
    assert inspect_image(folder / "cut.jpg", LIMIT, decode=False) == ImageFacts(None, "JPEG", 100, 80)
    assert inspect_image(folder / "palette.png", LIMIT, decode=False) == ImageFacts(None, "PNG", 70, 90)
    assert inspect_image(folder / "empty.png", LIMIT, decode=False).fault[0] == "empty_file"


def test_in_parallel_is_as_one_after_the_other(folder):
    for number in range(40):
        Image.new("RGB", (64 + number, 80), (number, 0, 0)).save(folder / f"{number}.png")
    assert look(folder, None, workers=2) == look(folder, None, workers=1)


def test_progress_counts_every_file_once(folder, tmp_path):
    paths = [*sorted(folder.iterdir()), folder / "red.png", folder / "gone.png"]
    for _ in range(2):
        counts = []
        inspect_images(paths, LIMIT, ImageCache(tmp_path / "cache.sqlite"), 1, counts.append)
        assert sum(counts) == 5


def test_a_missing_file_is_not_remembered(folder, tmp_path):
    cache = ImageCache(tmp_path / "cache.sqlite")
    assert inspect_images([folder / "gone.png"], LIMIT, cache)[folder / "gone.png"].fault[0] == "missing_image"
    Image.new("RGB", (70, 80)).save(folder / "gone.png")
    assert inspect_images([folder / "gone.png"], LIMIT, cache)[folder / "gone.png"].width == 70


@pytest.mark.parametrize("name", ["表情包😀.png", "a\nb.png", "%3f?#.png"])
def test_any_name_is_remembered(tmp_path, inspected, name):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (70, 80)).save(tmp_path / "images" / name)
    # The database's own name goes through a URI.
    for _ in range(2):
        look(tmp_path / "images", tmp_path / f"cache {name}")
    assert inspected == [name]


def test_a_name_that_is_no_unicode_is_remembered(tmp_path, inspected):
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (70, 80)).save(tmp_path / "images" / name)
    for _ in range(2):
        assert look(tmp_path / "images", tmp_path / "cache.sqlite")[name].width == 70
    assert inspected == [name]


# ---- The cache itself ----


def test_the_default_cache_lies_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert find_default_cache() == tmp_path / "caches" / "meme_llava" / "images.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_default_cache() == tmp_path / "home" / ".cache" / "meme_llava" / "images.sqlite"


def test_two_may_make_the_cache_at_the_same_time(tmp_path, monkeypatch, capsys):
    """The second looks at the file, finds it empty, and gets to write when the first has made the tables."""
    file = tmp_path / "cache.sqlite"
    looked = ImageCache._was_made_by
    answers = []

    def look(cache, maker):
        answers.append(looked(cache, maker))
        if len(answers) == 1:
            ImageCache(file)  # another process, in between
        return answers[-1]

    monkeypatch.setattr(ImageCache, "_was_made_by", look)
    ImageCache(file)
    # The first look of both, the other's before it writes, and ours, which leaves the other's tables alone.
    assert answers == [False, False, False, True]
    assert capsys.readouterr().err == ""


def test_a_cache_makes_its_folder(folder, tmp_path, inspected):
    look(folder, tmp_path / "new" / "folder" / "cache.sqlite")
    look(folder, tmp_path / "new" / "folder" / "cache.sqlite")
    assert inspected == ALL


def test_without_a_file_nothing_is_remembered(folder, inspected):
    look(folder, None)
    look(folder, None)
    assert inspected == ALL * 2


def make_damaged(file: Path) -> None:
    file.write_bytes(b"this is not a database" * 100)


def make_directory(file: Path) -> None:
    file.mkdir()


def put_below_a_file(file: Path) -> None:
    file.parent.rmdir()
    file.parent.write_bytes(b"")


def damage_within(file: Path) -> None:
    """A database whose pages of facts are overwritten; its first page is whole, so opening it says nothing."""
    look_once = ImageCache(file)
    for number in range(200):
        look_once._unwritten.append((b"/a/%d" % number, "state", f"sha {number}", "x" * 500))
    look_once.commit()
    content = bytearray(file.read_bytes())
    content[4096 * 3 :] = b"\xee" * (len(content) - 4096 * 3)
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [make_damaged, make_directory, put_below_a_file, damage_within])
def test_a_cache_that_cannot_be_used_is_said_and_costs_time_only(folder, tmp_path, capsys, inspected, damage):
    file = tmp_path / "caches" / "cache.sqlite"
    file.parent.mkdir()
    damage(file)
    assert sorted(look(folder, file)) == ALL and inspected == ALL
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: checked images cannot be remembered there (")


def test_an_unwritable_folder_costs_time_only(folder, tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "caches").mkdir(mode=0o500)
    assert sorted(look(folder, tmp_path / "caches" / "cache.sqlite")) == ALL
    assert "checked images cannot be remembered there" in capsys.readouterr().err


def test_two_checks_at_once_do_not_hinder_each_other(folder, tmp_path, capsys, inspected):
    slow = ImageCache(tmp_path / "cache.sqlite")
    slow.remember(folder / "red.png", inspect_image(folder / "red.png", LIMIT))  # and goes on for a long time
    look(folder, tmp_path / "cache.sqlite")
    slow.commit()
    inspected.clear()
    look(folder, tmp_path / "cache.sqlite")
    assert inspected == [] and capsys.readouterr().err == ""


def test_a_check_that_is_stopped_goes_on_from_there(folder, tmp_path, inspected, monkeypatch):
    def stop_at_palette(path: Path, *arguments, **options):
        if path.name == "palette.png":
            raise KeyboardInterrupt
        return inspect_image(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images, "inspect_image", stop_at_palette)
        look(folder, tmp_path / "cache.sqlite")
    look(folder, tmp_path / "cache.sqlite")
    assert inspected == ["palette.png", "red.png"]


def test_another_pillow_starts_afresh(folder, tmp_path, monkeypatch, inspected):
    look(folder, tmp_path / "cache.sqlite")
    inspected.clear()
    monkeypatch.setattr(image_cache, "version", lambda name: "999.0")
    look(folder, tmp_path / "cache.sqlite")
    assert inspected == ALL
    inspected.clear()
    look(folder, tmp_path / "cache.sqlite")
    assert inspected == []


def test_other_code_starts_afresh(folder, tmp_path, monkeypatch, inspected):
    look(folder, tmp_path / "cache.sqlite")
    inspected.clear()
    monkeypatch.setattr(image_cache, "CACHE_VERSION", image_cache.CACHE_VERSION + 1)
    look(folder, tmp_path / "cache.sqlite")
    assert inspected == ALL


def test_a_reading_cache_writes_nothing(folder, tmp_path, monkeypatch):
    file = tmp_path / "cache.sqlite"
    reader = ImageCache(file, read_only=True)
    assert reader.look_up(folder / "red.png") is None and not file.exists()

    look(folder, file)
    before = file.read_bytes()
    reader = ImageCache(file, read_only=True)
    assert reader.look_up(folder / "red.png").decoded
    Image.new("RGB", (70, 80)).save(folder / "new.png")
    reader.remember(folder / "new.png", inspect_image(folder / "new.png", LIMIT))
    reader.commit()
    assert reader.look_up(folder / "new.png") is None
    # Made by another Pillow: of no use to a reader, and left alone.
    monkeypatch.setattr(image_cache, "version", lambda name: "999.0")
    assert ImageCache(file, read_only=True).look_up(folder / "red.png") is None
    assert file.read_bytes() == before


def test_many_facts_come_back_as_they_went(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "FILES_PER_COMMIT", 2)
    first = look(folder, tmp_path / "cache.sqlite")
    cache = ImageCache(tmp_path / "cache.sqlite", read_only=True)
    assert {name: cache.look_up(folder / name) for name in ALL} == first


# ---- Tables ----


def test_the_suffixes_are_those_of_the_formats():
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"} <= IMAGE_SUFFIXES
    assert len(IMAGE_SUFFIXES) == sum(map(len, EXTENSIONS.values()))


def test_shapes_are_judged_by_their_sides():
    def judge(width: int, height: int) -> list[str]:
        facts = ImageFacts("0", "PNG", width, height, decoded=True)
        return [kind for kind, _ in check_image(Path("a.png"), facts, sys.maxsize)]

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
    whole = look(folder, None)
    monkeypatch.setattr(images, "inspect_image", inspect_and_die)
    found = look(folder, None, workers=2)
    assert {name for name in found if found[name] != whole[name]} == {"33.png", "58.png"}
    assert found["33.png"].fault == ("damaged_image", "decoding it kills the program that does it")
