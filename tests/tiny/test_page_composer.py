"""Pages are composed as planned, and their labels say what stands where."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data" / "tiny" / "making"))

from composer import compose  # noqa: E402
from glyphs import CELL, EM, LEVELS, Atlas, choose_level  # noqa: E402
from layout import PATCHES, ROWS, SIDE, Dice, Layout, label_pages, make_label_table, plan_layout  # noqa: E402
from scenery import SIZE, Scenery  # noqa: E402
from studio import Studio  # noqa: E402
from style import find_room, measure_rows  # noqa: E402
from texts import GAP, ROW, Alphabet, RowWriter, TextBank  # noqa: E402
from wear import compress, wear_out  # noqa: E402

KNOWN = list("一二三四五六七八九十〇abc")


@pytest.fixture
def alphabet():
    return Alphabet(KNOWN)


@pytest.fixture
def atlas(alphabet):
    """Every letter is a block that fills half of its em box's width and height; it is one em wide."""
    levels, starts, start = [], [], 0
    for side in LEVELS:
        block = torch.zeros(2, side, side, dtype=torch.uint8)
        quarter = round(side * EM / CELL / 4)
        block[1, side // 2 - quarter : side // 2 + quarter, side // 2 - quarter : side // 2 + quarter] = 255
        levels.append(block.flatten())
        starts.append(start)
        start += block.numel()
    cells = torch.ones(1, len(alphabet.drawn) + 1, dtype=torch.long)
    cells[0, [0, alphabet.gap]] = 0
    return Atlas(torch.cat(levels), torch.tensor(starts), cells, torch.ones(1, len(alphabet.drawn) + 1))


@pytest.fixture
def scenery():
    pixels = torch.full((3, 4, SIZE, SIZE), 128, dtype=torch.uint8)
    return Scenery(pixels, [0, 1, 2, 3], torch.tensor([[4, 2, 1], [-1, -1, -1], [-1, -1, -1]]))


def make_layout(alphabet, rows, vertical=False, size=16.0):
    """One page; each row is a text with the x and y of its middle."""
    letters, middles = torch.zeros(1, ROWS, ROW, dtype=torch.long), torch.full((1, ROWS, 2), 80.0)
    for number, (text, x, y) in enumerate(rows):
        letters[0, number, : len(text)] = torch.tensor([alphabet.numbers[character] for character in text])
        middles[0, number] = torch.tensor([x, y])
    labelled = (letters > 0).any(-1)
    em = torch.full((1, ROWS, 2), size)
    zeros = torch.zeros(1, ROWS)
    return Layout(
        letters=letters,
        labelled=labelled,
        faces=zeros.long(),
        em=em,
        advances=(letters > 0) * size,
        middles=middles,
        angles=zeros,
        vertical=torch.tensor([vertical]),
        split=torch.tensor([ROWS]),
        kinds=torch.tensor([1]),
    )


def test_letters_of_a_row_stand_side_by_side_and_those_of_a_column_below_each_other(alphabet):
    row = make_layout(alphabet, [("三二一", 80, 40)]).place_letters()
    assert row[0, 0, :3].tolist() == [[64, 40], [80, 40], [96, 40]]
    column = make_layout(alphabet, [("三二一", 80, 40)], vertical=True).place_letters()
    assert torch.allclose(column[0, 0, :3], torch.tensor([[80.0, 24.0], [80.0, 40.0], [80.0, 56.0]]), atol=1e-4)


def test_labels_say_which_letters_lie_in_which_patch_and_in_which_order(alphabet):
    # Letters of 8 pixels: two to a patch of 16. The row begins at x = 64, the edge of patch 4.
    layout = make_layout(alphabet, [("一二三四", 80, 24), ("五", 72, 30)], size=8.0)
    labels = label_pages(layout, make_label_table(alphabet, "cpu"))
    number = alphabet.numbers
    text = labels.text[0, :6].tolist()
    assert text == [number[character] for character in "一二三四五"] + [0]
    second_line = labels.slots[0].view(PATCHES, PATCHES, -1)[1]
    assert second_line[4].tolist() == [number["一"], number["二"], number["五"]]
    assert second_line[5].tolist() == [number["三"], number["四"], 0]
    assert int((labels.slots > 0).sum()) == 5
    # 一 has its middle at x = 68, a quarter of the patch from its left edge, and y = 24, its middle.
    place = labels.places[0].view(PATCHES, PATCHES, 3, 2)[1, 4, 0]
    assert place.tolist() == [-0.25, 0.0]


def test_strangers_are_answered_with_a_circle_and_gaps_with_nothing(alphabet):
    layout = make_layout(alphabet, [(f"一{GAP}說", 80, 80)])
    labels = label_pages(layout, make_label_table(alphabet, "cpu"))
    assert labels.text[0, :3].tolist() == [alphabet.numbers["一"], alphabet.numbers["〇"], 0]


def test_a_watermark_is_drawn_but_not_labelled(alphabet, atlas, scenery):
    layout = make_layout(alphabet, [("一", 80, 80)])
    layout.labelled[:] = False
    assert int(label_pages(layout, make_label_table(alphabet, "cpu")).text.sum()) == 0
    page, _, _ = compose(Dice(0, "cpu"), layout, atlas, scenery, plain=1)
    assert float(page.min()) < 0.1


@pytest.mark.parametrize("vertical", [False, True])
def test_ink_stands_where_the_label_says(alphabet, atlas, scenery, vertical):
    layout = make_layout(alphabet, [("一二", 48, 100)], vertical, size=32.0)
    page, facts, _ = compose(Dice(0, "cpu"), layout, atlas, scenery, plain=1)
    ink = (page[0].mean(0) < 0.5).nonzero()
    # Two blocks of half an em, 16 pixels, an em apart.
    low, high = ink.min(0).values.tolist(), ink.max(0).values.tolist()
    wanted = ([76, 40], [123, 55]) if vertical else ([92, 24], [107, 71])
    for found, expected in zip((low, high), wanted, strict=True):
        assert found == pytest.approx(expected, abs=1)
    assert len(ink) == pytest.approx(2 * 16 * 16, rel=0.1)
    assert facts.tolist() == [[-1, -1, -1]]


def test_planned_rows_lie_on_the_page_and_apart(alphabet, atlas):
    writer = RowWriter(alphabet, [("一二", 1.0), ("三四五", 1.0)], 0)
    rows = torch.zeros(60, ROW, dtype=torch.long)
    for number in range(60):
        text = writer.write_words(ROW if number >= 40 else number % 9 + 1)[:ROW]
        rows[number, : len(text)] = torch.tensor([alphabet.numbers[character] for character in text])
    layout = plan_layout(Dice(3, "cpu"), TextBank(rows, 40), atlas, 200)
    places = layout.place_letters()[layout.letters > 0]
    assert float(places.min()) > -1 and float(places.max()) < SIDE + 1
    boxes = measure_rows(layout)
    upright = (layout.angles[:, 0] == 0) & ~layout.vertical
    for page in upright.nonzero().flatten().tolist():
        shown = boxes[page][layout.labelled[page]]
        ordered = shown[shown[:, 1].argsort()]
        assert bool((ordered[1:, 1] - ordered[:-1, 3] > -0.06 * SIDE).all())
    assert set(layout.kinds.tolist()) == {0, 1, 2, 3, 4}


def test_aligned_pages_have_a_letter_in_the_middle_of_every_patch_but_those_at_two_edges(alphabet, atlas):
    bank = TextBank(torch.full((10, ROW), alphabet.numbers["一"]), 8)
    layout = plan_layout(Dice(0, "cpu"), bank, atlas, 5, aligned=(1, 0))
    labels = label_pages(layout, make_label_table(alphabet, "cpu"))
    count = (labels.slots > 0).sum(-1).view(5, PATCHES, PATCHES)
    assert bool((count[:, :-1, :-1] == 1).all()) and int(count.sum()) == 5 * 81
    assert float(labels.places.abs().max()) < 1e-5
    loose = plan_layout(Dice(0, "cpu"), bank, atlas, 5, aligned=(1, 1))
    places = loose.place_letters()[loose.letters > 0]
    assert 0 <= float(places.min()) and float(places.max()) <= SIDE
    assert len(loose.em[:, 0, 0].unique()) == 5


def test_copies_stand_a_letter_a_patch(alphabet, atlas, scenery):
    rows = torch.zeros(5, ROW, dtype=torch.long)
    rows[:, :4] = torch.tensor([alphabet.numbers[character] for character in ("一", "說", GAP, "三")])
    batch = Studio(alphabet, atlas, TextBank(rows, 4), scenery, 0, "cpu").spell_copies(6)
    wanted = [alphabet.numbers[character] for character in "一〇三"]
    for slots, text in zip(batch.slots, batch.text, strict=True):
        first = int((slots[:, 0] > 0).nonzero()[0])
        assert slots[first : first + 3, 0].tolist() == wanted and int((slots > 0).sum()) == 3
        assert text.tolist() == wanted + [0] * (ROW - 3)


def test_a_image_gets_the_largest_room(alphabet):
    layout = make_layout(alphabet, [("一二三", 80, 140)])
    room = find_room(layout, measure_rows(layout))
    assert room[0].tolist() == pytest.approx([0, 0, 160, 140 - 0.55 * 16])


def test_the_same_seed_gives_the_same_pages(alphabet, atlas, scenery):
    rows = torch.full((10, ROW), alphabet.numbers["一"])
    bank = TextBank(rows, 8)
    pages = []
    for _ in range(2):
        dice = Dice(7, "cpu")
        pages.append(compose(dice, plan_layout(dice, bank, atlas, 6), atlas, scenery)[0])
    assert torch.equal(*pages)
    assert float(pages[0].min()) >= 0 and float(pages[0].max()) <= 1


def test_compression_keeps_flat_pages_and_loses_more_when_coarser():
    flat = torch.full((1, 3, SIDE, SIDE), 0.5)
    assert torch.allclose(compress(flat, torch.tensor([1.0])), flat, atol=0.02)
    noise = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    errors = (compress(noise, torch.tensor([0.05, 2.0])) - noise).abs().mean((1, 2, 3))
    assert errors[0] < 0.02 < errors[1]


def test_worn_pages_are_images_of_256_shades():
    pages = wear_out(Dice(0, "cpu"), torch.rand(8, 3, SIDE, SIDE))
    assert torch.equal(pages, (pages * 255).round() / 255)


def test_the_level_of_a_letter_is_the_smallest_that_is_not_enlarged():
    sizes = torch.tensor([100.0, 48.0, 30.0, 8.0])
    assert choose_level(sizes).tolist() == [0, 0, 1, 5]
