"""How examples become one packed row, against rows written out by hand."""

from pathlib import Path

import pytest
import torch

from meme_llava.dataset.collator import PackingCollator

A, B, C, D, E, Q = 11, 12, 13, 14, 15, 16
IMAGE, NONE = 90, -100


@pytest.fixture
def collator() -> PackingCollator:
    return PackingCollator(image_token_id=IMAGE, tokens_per_image=2, image_size=3)


def make_example(input_ids: list[int], labels: list[int], *shades: int, record_id: str = "r") -> dict:
    """A dataset item whose images are of one shade each; the same shade is the same file."""
    return {
        "record_id": record_id,
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "image_paths": tuple(Path(f"{shade}.png") for shade in shades),
        "pixel_values": [torch.full((3, 3, 3), shade, dtype=torch.uint8) for shade in shades],
    }


def read_lists(batch: dict) -> dict:
    """The batch without its pixels, as lists."""
    return {
        name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in batch.items() if name != "pixel_values"
    }


def read_shades(batch: dict) -> list[int]:
    return batch["pixel_values"][:, 0, 0, 0].tolist()


def test_the_batch_of_the_docstring(collator):
    batch = collator(
        [
            make_example([IMAGE, IMAGE, Q, A, B], [NONE, NONE, NONE, A, B], 7),
            make_example([IMAGE, IMAGE, Q, C], [NONE, NONE, NONE, C], 7),
            make_example([D, E], [NONE, E]),
        ]
    )
    assert read_lists(batch) == {
        "input_ids": [[IMAGE, IMAGE, Q, A, B, C, D, E]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1]],
        "cu_seqlens_q": [0, 5, 6, 8],
        "kv_index": [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7],
        "cu_seqlens_k": [0, 5, 9, 11],
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
        "image_runs": [0],
        "image_positions": [0, 1],
        "loss_positions": [2, 3, 2, 6],
        "loss_targets": [A, B, C, E],
        "loss_weights": [1, 1, 1, 1],
    }
    assert torch.equal(batch["pixel_values"], torch.full((1, 3, 3, 3), 7, dtype=torch.uint8))
    integers = (
        "input_ids",
        "position_ids",
        "kv_index",
        "image_runs",
        "image_positions",
        "loss_positions",
        "loss_targets",
    )
    for name in integers:
        assert batch[name].dtype == torch.int64, name
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        assert batch[name].dtype == torch.int32, name
    assert batch["loss_weights"].dtype == torch.float32 and batch["pixel_values"].dtype == torch.uint8


def test_without_sharing_every_record_stands_alone_with_its_own_image():
    collator = PackingCollator(IMAGE, tokens_per_image=2, image_size=3, shared_images=False)
    batch = collator(
        [
            make_example([IMAGE, IMAGE, Q, A], [NONE, NONE, NONE, A], 7),
            make_example([IMAGE, IMAGE, Q, C], [NONE, NONE, NONE, C], 7),
        ]
    )
    assert batch["input_ids"].tolist() == [[IMAGE, IMAGE, Q, A, IMAGE, IMAGE, Q, C]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["kv_index"].tolist() == list(range(8))
    assert batch["image_runs"].tolist() == [0, 1] and read_shades(batch) == [7, 7]


def test_captions_share_the_beginning_of_their_answers_too(collator):
    """Three answers: the second goes on where the first one is at its second token, the third parts at the question."""
    batch = collator(
        [
            make_example([IMAGE, IMAGE, Q, A, C], [NONE, NONE, NONE, A, C], 7),
            make_example([IMAGE, IMAGE, Q, E], [NONE, NONE, NONE, E], 7),
            make_example([IMAGE, IMAGE, Q, A, B], [NONE, NONE, NONE, A, B], 7),
        ]
    )
    assert batch["input_ids"].tolist() == [[IMAGE, IMAGE, Q, A, B, C, E]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 3]]
    assert batch["cu_seqlens_q"].tolist() == [0, 5, 6, 7]
    assert batch["kv_index"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 6]
    # A, which two captions teach at the same position, counts twice.
    assert batch["loss_positions"].tolist() == [2, 3, 2, 3, 2]
    assert batch["loss_targets"].tolist() == [A, B, A, C, E]


def test_an_image_token_is_equal_only_if_it_shows_the_same_image(collator):
    first = make_example([IMAGE, IMAGE, Q, IMAGE, IMAGE, A], [NONE] * 5 + [A], 1, 2)
    second = make_example([IMAGE, IMAGE, Q, IMAGE, IMAGE, A], [NONE] * 5 + [A], 1, 3)
    other = make_example([IMAGE, IMAGE, Q, B], [NONE] * 3 + [B], 2)
    batch = collator([first, second, other])
    rows = [IMAGE, IMAGE, Q, IMAGE, IMAGE, A], [IMAGE, IMAGE, A], [IMAGE, IMAGE, Q, B]
    assert batch["input_ids"].tolist() == [sum(rows, [])]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2, 3]]
    # Every file once; the runs say which of them they show, in the order of the row.
    shades = read_shades(batch)
    assert sorted(shades) == [1, 2, 3]
    shown = [shades[image] for image in batch["image_runs"].tolist()]
    assert shown in ([1, 2, 3, 2], [1, 3, 2, 2])


def test_an_image_behind_different_questions_is_encoded_once_and_stands_twice(collator):
    batch = collator(
        [
            make_example([A, IMAGE, IMAGE, C], [NONE, NONE, NONE, C], 5),
            make_example([B, IMAGE, IMAGE, C], [NONE, NONE, NONE, C], 5),
        ]
    )
    assert batch["input_ids"].tolist() == [[A, IMAGE, IMAGE, C, B, IMAGE, IMAGE, C]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["image_runs"].tolist() == [0, 0] and read_shades(batch) == [5]
    assert batch["image_positions"].tolist() == [1, 2, 5, 6]


def test_the_same_record_twice_takes_no_second_place_and_counts_twice(collator):
    example = make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 5)
    batch = collator([example, example])
    assert batch["input_ids"].tolist() == [[IMAGE, IMAGE, A]]
    assert batch["cu_seqlens_q"].tolist() == [0, 3]
    assert batch["loss_positions"].tolist() == [1, 1] and batch["loss_targets"].tolist() == [A, A]


def test_texts_never_share(collator):
    batch = collator([make_example([A, B], [NONE, B]), make_example([A, B], [NONE, B])])
    assert batch["input_ids"].tolist() == [[A, B, A, B]] and batch["cu_seqlens_q"].tolist() == [0, 2, 4]


def test_a_batch_of_text_carries_a_blank_image_that_no_token_shows(collator):
    batch = collator([make_example([A, B], [NONE, B]), make_example([C, D, E], [NONE, D, E])])
    assert batch["input_ids"].tolist() == [[A, B, C, D, E]]
    for name in ("image_runs", "image_positions"):
        assert batch[name].tolist() == [] and batch[name].dtype == torch.int64
    assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, 3, 3, dtype=torch.uint8))


def test_every_caption_weighs_the_same_when_asked(collator):
    by_caption = PackingCollator(IMAGE, 2, 3, loss_average="caption")
    examples = [make_example([A, B, C, D], [NONE, B, C, D]), make_example([A, B], [NONE, B])]
    assert by_caption(examples)["loss_weights"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert collator(examples)["loss_weights"].tolist() == [1, 1, 1, 1]


def test_image_tokens_that_are_wrong_in_two_records_but_right_in_sum_are_refused(collator):
    # 1 + 3 tokens for 2 + 2: by the sums alone each record would get a piece of the other's image.
    records = [
        make_example([A, IMAGE, B], [NONE, NONE, B], 1, record_id="too few"),
        make_example([IMAGE, IMAGE, IMAGE], [NONE, NONE, NONE], 2, record_id="too many"),
    ]
    with pytest.raises(ValueError, match=r"record 'too few' has 1 image tokens for 1 image of 2"):
        collator(records)
    with pytest.raises(ValueError, match=r"record 'too many' has 3 image tokens for 1 image of 2"):
        collator(records[::-1])


@pytest.mark.parametrize(
    "example, message",
    [
        (make_example([IMAGE, IMAGE, A], [NONE, NONE, A]), "has 2 image tokens for 0 image"),
        (make_example([A, B], [NONE, B], 1), "has 0 image tokens for 1 image"),
        (make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 1, 2), "has 2 image tokens for 2 image"),
    ],
)
def test_image_tokens_without_their_image_are_refused(collator, example, message):
    good = make_example([IMAGE, IMAGE, A], [NONE, NONE, A], 1)
    with pytest.raises(ValueError, match=message):
        collator([good, example])
