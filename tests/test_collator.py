"""How examples become one batch, against batches written out by hand."""

import pytest
import torch

from meme_llava.collator import PaddingCollator

A, B, C, D, E, F = 11, 12, 13, 14, 15, 16
IMAGE, PAD, NONE = 90, 91, -100


@pytest.fixture
def collator() -> PaddingCollator:
    return PaddingCollator(pad_token_id=PAD, image_token_id=IMAGE, tokens_per_image=2, image_size=3)


def make_example(input_ids: list[int], labels: list[int], *shades: float, record_id: str = "r") -> dict:
    """A dataset item whose pictures are of one shade each."""
    pictures = [torch.full((3, 3, 3), shade) for shade in shades]
    return {
        "record_id": record_id,
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "pixel_values": torch.stack(pictures) if pictures else torch.empty(0, 3, 3, 3),
    }


def test_the_batch_of_the_docstring(collator):
    first = make_example([A, IMAGE, IMAGE, B, C], [NONE, NONE, NONE, B, C], 0.5)
    second = make_example([D, E, F], [NONE, E, F])
    batch = collator([first, second])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["input_ids"].tolist() == [[A, IMAGE, IMAGE, B, C], [D, E, F, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[NONE, NONE, NONE, B, C], [NONE, E, F, NONE, NONE]]
    assert torch.equal(batch["pixel_values"], torch.full((1, 3, 3, 3), 0.5))
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].dtype == torch.int64
    assert batch["pixel_values"].dtype == torch.float32


def test_pictures_stand_in_the_order_of_their_rows(collator):
    # The model hands picture features to image tokens row by row, so the order of pictures is which row they belong to.
    rows = [
        make_example([A], [A]),
        make_example([IMAGE, IMAGE, B, IMAGE, IMAGE], [NONE, NONE, B, NONE, NONE], 0.1, 0.2),
        make_example([IMAGE, IMAGE, C], [NONE, NONE, C], 0.3),
    ]
    batch = collator(rows)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert batch["input_ids"].tolist() == [
        [A, PAD, PAD, PAD, PAD],
        [IMAGE, IMAGE, B, IMAGE, IMAGE],
        [IMAGE, IMAGE, C, PAD, PAD],
    ]


def test_a_single_row_is_not_padded(collator):
    batch = collator([make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 1.0)])
    assert batch["input_ids"].tolist() == [[IMAGE, IMAGE, A]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_batch_of_text_carries_a_blank_picture_that_nobody_sees(collator):
    # Every process has to run the vision tower; the blank picture stands where nothing attends and nothing is learnt.
    batch = collator([make_example([A, B], [NONE, B]), make_example([C, D, E], [NONE, D, E])])
    assert batch["input_ids"].tolist() == [[A, B, PAD, IMAGE, IMAGE], [C, D, E, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[NONE, B, NONE, NONE, NONE], [NONE, D, E, NONE, NONE]]
    assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, 3, 3))
    assert batch["pixel_values"].dtype == torch.float32
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_a_pad_token_inside_a_text_still_counts(collator):
    # The mask follows lengths, not ids: a tokenizer may pad with its end token, which is part of every answer.
    batch = collator([make_example([A, PAD], [NONE, PAD], record_id="a"), make_example([B], [B])])
    assert batch["attention_mask"][:, :2].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"][:, :2].tolist() == [[NONE, PAD], [B, NONE]]


def test_image_tokens_that_are_wrong_in_two_rows_but_right_in_sum_are_refused(collator):
    # 1 + 3 tokens for 2 + 2: LLaVA itself compares the sums, and would give each row a piece of the other's picture.
    rows = [
        make_example([A, IMAGE, B], [NONE, NONE, B], 0.1, record_id="too few"),
        make_example([IMAGE, IMAGE, IMAGE], [NONE, NONE, NONE], 0.2, record_id="too many"),
    ]
    with pytest.raises(ValueError, match=r"record 'too few' has 1 image tokens for 1 picture\(s\) of 2"):
        collator(rows)
    with pytest.raises(ValueError, match=r"record 'too many' has 3 image tokens for 1 picture\(s\) of 2"):
        collator(rows[::-1])


@pytest.mark.parametrize(
    "example, message",
    [
        (make_example([IMAGE, IMAGE, A], [NONE, NONE, A]), "has 2 image tokens for 0 picture"),
        (make_example([A, B], [NONE, B], 0.1), "has 0 image tokens for 1 picture"),
        (make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 0.1, 0.2), "has 2 image tokens for 2 picture"),
    ],
)
def test_image_tokens_without_their_picture_are_refused(collator, example, message):
    good = make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 0.1)
    with pytest.raises(ValueError, match=message):
        collator([good, example])
