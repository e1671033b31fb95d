"""Lessons ask what stands on the page, in the order of the patches, and the sample data can be drawn again."""

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_drawing
from draw_lessons import parse_arguments, plan_all  # noqa: E402
from meme_groups import Group, draw_group  # noqa: E402
from meme_images import Meme  # noqa: E402
from meme_lines import list_alphabet  # noqa: E402
from meme_pages import MOOD_MARKS, Letter, Page  # noqa: E402
from PIL import Image

HALVES = (slice(0, 80), slice(80, 160))


def draw(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return run_drawing("draw_lessons.py", folder, *flags)


def read_turns(folder: Path) -> dict[str, tuple[str, str]]:
    records = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    return {record["id"]: tuple(turn["value"] for turn in record["conversations"]) for record in records}


def test_a_field_names_the_patch_of_every_letter():
    # Patches are 16 pixels a side, ten a row.
    letters = [
        Letter("我", 15.9, 8, 16),
        Letter("太", 16.1, 8, 16),
        Letter("难", 159, 40, 30),
        Letter("了", 0, 150, 60),
    ]
    page = Page("p", letters, is_plain=True)
    rows = ["□" * 10] * 10
    rows[0] = "我太" + "□" * 8
    rows[2] = "□" * 9 + "难"
    rows[9] = "了" + "□" * 9
    assert page.field == "".join(rows)


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lessons")
    process = draw(
        folder,
        *("--full_fields", "3", "--crowded_fields", "12", "--group_fields", "12", "--memes", "2"),
        *("--seed", "5", "--plain", "1"),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"Drew 29 images into {folder / 'images'}, wrote 33 lessons; fonts found: ")
    return folder


def test_each_lesson_is_answered_from_its_page(lessons):
    turns = read_turns(lessons)
    assert len(turns) == 33
    for identifier, (question, answer) in turns.items():
        page, _, words = question.partition("\n")
        assert page == "<image>"
        if "_fields_" in identifier:
            assert words == "逐格读出图中的文字。" and len(answer) == 100
        if identifier.startswith("group_fields"):
            assert len(answer.replace("□", "")) in (1, 4, 9) and set(answer) <= {"□", *MOOD_MARKS.values()}
        elif identifier.startswith("crowded_fields"):
            assert len(answer.replace("□", "")) > 7 and not set(answer) & {*MOOD_MARKS.values()}


def test_the_sample_data_have_the_records_of_their_command():
    flags = ["--memes", "400", "--full_fields", "100", "--crowded_fields", "100", "--group_fields", "100"]
    arguments = parse_arguments([*flags, "--plain", "0.3", "--words", "0", "--output_dir", "data"])
    planned = list(plan_all(arguments))
    records = [record for lessons, _ in planned for record in lessons]
    assert records == json.loads((ROOT / "data" / "annotations.json").read_text(encoding="utf-8"))
    # No letter is drawn that the field leaves out.
    pages = [page for _, page in planned if isinstance(page, Page)]
    assert all(len(page.letters) == 100 - page.field.count("□") for page in pages) and len(pages) == 200


def test_ink_stands_where_the_field_says(lessons):
    """The first and last lettered rows of patches of plain pages, by hand from the pixels."""
    for identifier, (_, answer) in read_turns(lessons).items():
        if not identifier.startswith("crowded_fields"):
            continue
        with Image.open(lessons / "images" / f"{identifier}.png") as image:
            ink = np.asarray(image.convert("L")) < 200
        assert ink.shape == (160, 160)
        inked_rows = ink.any(axis=1).nonzero()[0]
        rows = [answer[start : start + 10] for start in range(0, 100, 10)]
        lettered = [number for number, row in enumerate(rows) if set(row) - {"□"}]
        # A letter's ink is around its middle, and letters are 14 to 36 pixels high.
        assert 0 <= lettered[0] * 16 + 16 - inked_rows[0] and lettered[0] * 16 - inked_rows[0] <= 30
        assert inked_rows[-1] >= lettered[-1] * 16 - 16 and inked_rows[-1] - lettered[-1] * 16 <= 16 + 30


def test_a_crowded_page_is_full(tmp_path):
    draw(tmp_path, "--crowded_fields", "12", "--smallest", "20", "--largest", "20")
    counts = [100 - answer.count("□") for _, answer in read_turns(tmp_path).values()]
    # Letters of 20 pixels, at most 24 apart: 6 to 8 rows of 6 to 8, of which a tenth may be left out.
    assert len(counts) == 12 and min(counts) > 26 and max(counts) <= 64


def test_a_full_page_has_a_letter_in_every_patch(tmp_path):
    draw(tmp_path, "--full_fields", "2", "--plain", "1")
    for identifier, (_, answer) in read_turns(tmp_path).items():
        assert len(answer) == 100 and set(answer) <= set(list_alphabet()) and len(set(answer)) > 50
        with Image.open(tmp_path / "images" / f"{identifier}.png") as image:
            ink = np.asarray(image.convert("L")) < 200
        patches = ink.reshape(10, 16, 10, 16).any(axis=(1, 3))  # (10, 10)
        # Wherever a Chinese letter should be there is ink.
        assert all(inked for character, inked in zip(answer, patches.flat, strict=True) if character > "一")


def test_pages_without_words_are_letters_by_chance(tmp_path):
    draw(tmp_path / "chance", "--crowded_fields", "8", "--words", "0")
    draw(tmp_path / "words", "--crowded_fields", "8", "--words", "1")
    shares = {}
    for name in ("chance", "words"):
        text = "".join(answer for _, answer in read_turns(tmp_path / name).values()).replace("□", "")
        shares[name] = sum(text.count(common) for common in "我你的了天") / len(text)
    # By chance 5 in 169.
    assert shares["chance"] < 0.04 and shares["words"] > 0.055


def test_a_group_shows_the_moods_of_its_field_in_order():
    """Red hearts, and nothing else as red, stand where someone is in love."""
    figures = [Meme("g", "小猫", mood, None, "", "jpeg") for mood in ("无语", "心动", "惊讶", "心动")]
    group = Group("g", figures)
    # A cell is 80 pixels or five patches, its middle 40 pixels: in the third patch.
    blank = "□"
    rows = [blank * 10] * 10
    rows[2] = blank * 2 + "⑤" + blank * 4 + "⑧" + blank * 2
    rows[7] = blank * 2 + "④" + blank * 4 + "⑧" + blank * 2
    assert group.field == "".join(rows)
    red = np.asarray(draw_group(random.Random(0), group)).astype(int)
    red = (red[..., 0] > 180) & (red[..., 1] < 110) & (red[..., 2] < 140)
    counts = [red[rows, columns].sum() for rows in HALVES for columns in HALVES]
    assert min(counts[1], counts[3]) > 4 * max(counts[0], counts[2])


def test_the_same_seed_draws_the_same_lessons(lessons, tmp_path):
    draw(tmp_path / "one", "--crowded_fields", "4", "--memes", "2", "--seed", "5", "--processes", "2")
    draw(tmp_path / "two", "--crowded_fields", "4", "--memes", "2", "--seed", "5")
    draw(tmp_path / "other", "--crowded_fields", "4", "--memes", "2", "--seed", "6")
    one, two, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two", "other")
    )
    assert one == two and len(one) == 8  # six images, annotations, alphabet
    assert [name for name in one if one[name] == other.get(name)] == ["alphabet.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no lesson is asked for; give at least one of --full_fields, --crowded_fields"),
        (["--full_fields", "-1"], "--full_fields must not be negative"),
        (["--full_fields", "1", "--processes", "0"], "--processes must be at least 1"),
        (["--full_fields", "1", "--plain", "30"], "--plain must be 0 to 1"),
        (["--full_fields", "1", "--words", "-1"], "--words must be 0 to 1"),
        (["--crowded_fields", "1", "--smallest", "40", "--largest", "30"], "--smallest and --largest must be 4 to 160"),
    ],
)
def test_lessons_that_cannot_be_meant_are_refused(tmp_path, flags, message):
    process = draw(tmp_path / "lessons", *flags)
    assert process.returncode == 2 and message in process.stderr
    assert not (tmp_path / "lessons").exists()


def test_a_folder_with_images_is_left_alone(lessons):
    before = sorted(path.name for path in (lessons / "images").iterdir())
    process = draw(lessons, "--crowded_fields", "1")
    assert process.returncode == 2 and "is not empty; choose another --output_dir" in process.stderr
    assert sorted(path.name for path in (lessons / "images").iterdir()) == before


def test_every_character_of_a_lesson_is_in_the_alphabet(lessons):
    alphabet = (lessons / "alphabet.txt").read_text(encoding="utf-8").strip()
    assert set(list_alphabet()) | {"□"} <= set(alphabet)
    for question, answer in read_turns(lessons).values():
        text = question.removeprefix("<image>\n") + answer
        assert set(text) - {"\n"} <= set(alphabet)
