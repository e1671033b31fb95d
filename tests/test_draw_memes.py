"""The sample memes in the repository are whole, small and consistent, and can be drawn again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from meme_llava.conversation import ConversationEncoder
from meme_llava.dataset import load_dataset
from meme_llava.images import ImagePolicy
from meme_llava.tiny_towers import train_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
SCRIPT = DATA / "draw_memes.py"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return json.loads((DATA / "annotations.json").read_text(encoding="utf-8"))


def load(folder: Path, max_length: int = 512):
    """Every record as training with run.sh's own settings would see it: 64 positions a picture, 512 a record."""
    texts = [
        turn["value"]
        for record in json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        for turn in record["conversations"]
    ]
    tokenizer = train_tokenizer(texts)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, tokens_per_image=64, source="test")
    policy = ImagePolicy(112, (0.0,) * 3, (1.0,) * 3)
    return load_dataset(folder / "annotations.json", folder, encoder, policy, max_length, "error")


def draw(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "No font with Chinese characters" in process.stderr:
        pytest.skip("no Chinese font is installed; apt install fonts-noto-cjk")
    return process


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- The committed memes ----


def test_the_hundred_committed_records_train_without_a_problem_or_a_cut():
    loaded = load(DATA)
    assert len(loaded.dataset) == 100
    assert loaded.checked.bad == {} and loaded.cut_records == []
    assert loaded.dataset.image_counts.tolist() == [1] * 100
    # Every picture decodes, and not only its header.
    assert all(loaded.dataset[index]["pictures"][0].shape == (3, 112, 112) for index in range(100))


def test_the_committed_pictures_are_those_of_the_records_and_stay_small(records):
    named = sorted(record["image"] for record in records)
    found = sorted(f"images/{path.name}" for path in (DATA / "images").iterdir())
    assert named == found and len(set(found)) == 100
    assert sum(path.stat().st_size for path in (DATA / "images").iterdir()) < 3_000_000
    # What the files are follows their names, and several kinds that memes come in are among them.
    kinds = set()
    for path in (DATA / "images").iterdir():
        with Image.open(path) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            kinds.add((image.format, image.mode))
    assert kinds == {("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA")}


def test_the_committed_texts_differ_and_stand_in_their_answers(records):
    texts = [record["text"] for record in records if record["text"]]
    # A text that stood in two pictures could be answered without looking at which one it is.
    assert len(texts) == len(set(texts)) == 95
    for record in records:
        question, answer = record["conversations"]
        assert (question["from"], answer["from"]) == ("human", "gpt")
        assert question["value"].startswith("<image>\n") and len(question["value"]) > len("<image>\n")
        assert record["character"] in answer["value"] and record["mood"] in answer["value"]
        if record["text"]:
            assert f"“{record['text']}”" in answer["value"]
        else:
            assert "“" not in answer["value"]
    assert [record["id"] for record in records] == [f"meme_{index:03d}" for index in range(100)]


# ---- Drawing them again ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memes") / "data"
    process = draw(folder, "--count", "6", "--seed", "3")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"Drew 6 memes into {folder / 'images'}; fonts found: ")
    return folder


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawn, tmp_path):
    draw(tmp_path / "same", "--count", "6", "--seed", "3")
    draw(tmp_path / "other", "--count", "6", "--seed", "4")
    first = read_all(drawn)
    assert len(first) == 7  # six pictures and their annotations
    assert read_all(tmp_path / "same") == first
    assert not set(read_all(tmp_path / "other").values()) & set(first.values())


def test_what_is_drawn_trains_without_a_problem(drawn):
    loaded = load(drawn)
    assert len(loaded.dataset) == 6 and loaded.checked.bad == {}


def test_drawing_over_other_memes_is_refused_unless_asked_for(drawn, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    # One of ours from another run, under an ending it will not have again, and one of somebody else's.
    (images / "meme_099.png").write_bytes(b"old")
    (images / "mine.png").write_bytes(b"mine")
    refused = draw(tmp_path, "--count", "6", "--seed", "3")
    assert refused.returncode == 2
    assert f"{images} is not empty; give --overwrite" in refused.stderr
    assert read_all(tmp_path) == {"images/meme_099.png": b"old", "images/mine.png": b"mine"}
    assert draw(tmp_path, "--count", "6", "--seed", "3", "--overwrite").returncode == 0
    assert read_all(tmp_path) == {**read_all(drawn), "images/mine.png": b"mine"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--count", "0"], "--count must be 1 to "),
        (["--count", "1000"], "--count must be 1 to "),
        (["--font", "gone.ttf"], "gone.ttf is not a font with all the Chinese characters needed"),
        (["--coun", "6"], "unrecognized arguments: --coun"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(tmp_path, flags, message):
    process = draw(tmp_path / "data", *flags)
    assert process.returncode == 2
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "data").exists()
