"""The sample memes in the repository are whole, small and consistent, and can be drawn again."""

import json
import random
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_drawing
from draw_lessons import list_lesson_alphabet  # noqa: E402
from make_towers import train_tokenizer
from meme_characters import MOODS  # noqa: E402
from meme_lines import LINES, LineSource, is_unseen, list_alphabet, list_readable  # noqa: E402
from PIL import Image

from meme_llava.dataset.conversation import ConversationEncoder
from meme_llava.dataset.dataset import load_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.images import ImagePolicy

DATA = ROOT / "data"
MAKING = DATA / "tiny" / "making"


def load(folder: Path, max_length: int = 512):
    """Every record as training with run.sh's own settings would see it: 64 positions an image, 512 a record."""
    texts = [
        turn["value"]
        for record in json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        for turn in record["conversations"]
    ]
    tokenizer = train_tokenizer(texts)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, tokens_per_image=64, source="test")
    policy = ImagePolicy(112, (0.0,) * 3, (1.0,) * 3)
    return load_records(folder / "annotations.json", folder, RecordPolicy(), encoder, max_length, policy)


def draw(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return run_drawing("draw_memes.py", folder, *flags)


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- The committed memes ----


@pytest.fixture(scope="module", params=[("", 400, 3, 300), ("unseen", 200, 2, 0)], ids=["sample memes", "unseen memes"])
def committed(request) -> tuple[Path, int, int, int]:
    """A folder, its number of memes, the records of each, and its number of pages of letters."""
    name, memes, tasks, pages = request.param
    return DATA / name, memes, tasks, pages


def test_the_committed_records_train_without_a_problem_or_a_cut(committed):
    folder, memes, tasks, pages = committed
    loaded = load(folder)
    assert len(loaded.dataset) == memes * tasks + pages
    assert loaded.checked.bad == {} and loaded.cut_records == []
    assert len(loaded.dataset.image_paths) == memes + pages
    # Every image decodes, and not only its header.
    one_of_each = [*range(0, memes * tasks, tasks), *range(memes * tasks, len(loaded.dataset))]
    assert all(loaded.dataset[index]["pixel_values"][0].shape == (3, 112, 112) for index in one_of_each)


def test_the_committed_images_are_those_of_the_records_and_stay_small(committed):
    folder, memes, tasks, pages = committed
    named = sorted(record["image"] for record in read_drawn(folder))
    files = list((folder / "images").iterdir())
    found = sorted(f"images/{path.name}" for path in files if path.name.startswith("meme_"))
    drawn_pages = sorted(f"images/{path.name}" for path in files if "_fields_" in path.name)
    assert named == sorted(found * tasks + drawn_pages)
    assert (len(found), len(drawn_pages), len(files)) == (memes, pages, memes + pages)
    assert sum(path.stat().st_size for path in files) < 16_000 * memes + 45_000 * pages
    # What the files are follows their names, and several kinds that memes come in are among them.
    kinds = set()
    for path in files:
        with Image.open(path) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            kinds.add((image.format, image.mode))
    assert kinds == {("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA")}


def test_the_committed_texts_differ(committed):
    folder, memes, _, _ = committed
    texts = [record["text"] for record in read_drawn(folder) if record.get("task") == "text" and record["text"]]
    # A text that stood in two images could be answered without looking at which one it is.
    assert len(texts) == len(set(texts)) == memes * 9 // 10


def test_the_committed_alphabet_is_that_of_the_lessons():
    assert (MAKING / "alphabet.txt").read_text(encoding="utf-8") == list_lesson_alphabet() + "\n"


def test_no_line_of_the_unseen_memes_is_trained_on():
    seen, unseen = (
        {record["text"] for record in read_drawn(folder) if "text" in record} for folder in (DATA, DATA / "unseen")
    )
    assert seen & unseen == {""}


# ---- Drawing new ones ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memes") / "data"
    process = draw(folder, "--count", "20", "--seed", "3")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"Drew 20 memes into {folder / 'images'}; fonts found: ")
    return folder


def read_drawn(folder: Path) -> list[dict]:
    return json.loads((folder / "annotations.json").read_text(encoding="utf-8"))


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawn, tmp_path):
    draw(tmp_path / "same", "--count", "20", "--seed", "3", "--processes", "2")
    draw(tmp_path / "other", "--count", "20", "--seed", "4")
    first = read_all(drawn)
    assert len(first) == 21  # twenty images and their annotations
    assert read_all(tmp_path / "same") == first
    assert not set(read_all(tmp_path / "other").values()) & set(first.values())


def test_what_is_drawn_trains_without_a_problem(drawn):
    loaded = load(drawn)
    assert len(loaded.dataset) == 60 and loaded.checked.bad == {}


def test_every_meme_has_its_truth_in_three_records(drawn):
    records = read_drawn(drawn)
    assert [record["task"] for record in records] == ["text", "mood", "description"] * 20
    for read, mood, description in zip(records[::3], records[1::3], records[2::3], strict=True):
        assert read["image"] == mood["image"] == description["image"]
        assert mood["conversations"][1]["value"] == mood["mood"]
        told = description["conversations"][1]["value"]
        assert read["character"] in told and read["mood"] in told and (read["prop"] or "") in told
        if read["text"]:
            assert read["conversations"][1]["value"] == read["text"]
            assert f"“{read['text']}”" in told
        else:
            assert read["conversations"][1]["value"] == "图片里没有文字。" and "图片里没有文字" in told
    assert sum(record["text"] == "" for record in records[::3]) == 2  # one in ten
    # Dealt out evenly: ten moods, two memes each.
    moods = [record["mood"] for record in records[::3]]
    assert {moods.count(mood) for mood in set(moods)} == {2} and len(set(moods)) == 10


def test_what_a_transparent_meme_says_stands_on_nothing(drawn):
    kinds = set()
    for path in (drawn / "images").iterdir():
        with Image.open(path) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            kinds.add((image.format, image.mode))
    assert ("JPEG", "RGB") in kinds and ("PNG", "RGBA") in kinds


@pytest.mark.long
def test_seen_and_unseen_lines_have_nothing_in_common(tmp_path):
    texts = {}
    for lines in ("seen", "unseen"):
        draw(tmp_path / lines, "--count", "60", "--lines", lines, "--tasks", "text")
        texts[lines] = {record["text"] for record in read_drawn(tmp_path / lines)} - {""}
        assert len(texts[lines]) == 54  # no line twice
        assert {is_unseen(text) for text in texts[lines]} == {lines == "unseen"}
    assert not texts["seen"] & texts["unseen"]


def test_drawing_over_other_memes_is_refused_unless_asked_for(drawn, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    # One of ours from another run, under an ending it will not have again, and one of somebody else's.
    (images / "meme_000099.png").write_bytes(b"old")
    (images / "mine.png").write_bytes(b"mine")
    refused = draw(tmp_path, "--count", "20", "--seed", "3")
    assert refused.returncode == 2
    assert f"{images} is not empty; give --overwrite" in refused.stderr
    assert read_all(tmp_path) == {"images/meme_000099.png": b"old", "images/mine.png": b"mine"}
    assert draw(tmp_path, "--count", "20", "--seed", "3", "--overwrite").returncode == 0
    assert read_all(tmp_path) == {**read_all(drawn), "images/mine.png": b"mine"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--font", "gone.ttf"], "error: --font gone.ttf: no such file"),
        (["--font", __file__], "is not a font with all the Chinese characters needed"),
        (["--coun", "6"], "unrecognized arguments: --coun"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, flags, message):
    process = draw(tmp_path / "data", *flags)
    assert process.returncode == 2
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "data").exists()


# ---- Lines ----


def test_lines_never_end_and_stay_in_the_alphabet():
    source, rng, alphabet = LineSource(unseen=False), random.Random(0), set(list_alphabet())
    lines = [source.next_line(rng, mood) for _ in range(500) for mood in MOODS]
    texts = [line.replace("|", "") for line in lines]
    assert len(set(texts)) == 5000
    assert all(1 <= len(text) <= 12 and set(text) <= alphabet for text in texts)
    assert len(alphabet) == 169
    # Every character comes up: a model that learned from these has met them.
    assert set("".join(texts)) == alphabet


def test_every_mood_of_the_figures_has_lines_of_its_own():
    assert list(LINES) == list(MOODS)
    assert min(len(list_readable(lines.split())) for lines in LINES.values()) >= 4


def test_readable_is_what_keeps_to_the_alphabet():
    # 熬 and 铁 are not in it; neither a gap's name nor a bar is a letter of the line.
    assert list_readable(["奶茶|到了！", "今天熬夜", "{铁}太难了", "铁{样}", "我"]) == [
        "奶茶|到了！",
        "{铁}太难了",
        "我",
    ]
