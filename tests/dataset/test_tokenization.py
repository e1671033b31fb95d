"""Token ids of records, how many positions they take and how many of them they share."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meme_llava.dataset import conversation as tokenization
from meme_llava.dataset.conversation import (
    Conversation,
    ConversationEncoder,
    RecordLengths,
    Tokenization,
    TokenizedRecords,
    Turn,
    tokenize_records,
)
from meme_llava.dataset.sampling import count_common_prefix

LETTERS = "\nabcdefghijklmnopqrstuvwxyz"
P, Q = Path("/images/p.png"), Path("/images/q.png")


def make_encoder(letters: str = LETTERS, tokens_per_image: int = 3) -> ConversationEncoder:
    """Every letter is a token; ids follow the alphabet."""
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<image>"], special_tokens=True)
    return ConversationEncoder(tokenizer, tokens_per_image, source="test")


def make_conversation(question: str, answer: str, *image_paths: Path) -> Conversation:
    """31 positions beside question and answer.

    Start, "system", line break, "s", end, line break: 11. Start, "user", line break, end, line break: 8. Start,
    "assistant", line break, end: 12.
    """
    return Conversation((Turn("system", "s"), Turn("user", question), Turn("assistant", answer)), image_paths)


CONVERSATIONS = [
    make_conversation("<image>ab", "xy", P),
    make_conversation("<image>ab", "xz", P),
    make_conversation("<image>ab", "xy", Q),
    make_conversation("ab", "xy"),
    make_conversation("<image>ac", "w", P),
    make_conversation("<image><image>", "v", P, Q),
    make_conversation("<image><image>", "v", P, P),
    make_conversation("ab", "xy"),
]


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return make_encoder()


def to_plain(records: TokenizedRecords) -> list:
    sharing = records.sharing
    ids = [[array.tolist() for array in records.read(number)] for number in range(len(records.lengths))]
    return [records.lengths, sharing.groups.tolist(), sharing.order.tolist(), sharing.prefix_lengths.tolist(), ids]


# ---- What is counted ----


def test_lengths_and_sharing_written_out(encoder):
    measured = tokenize_records(CONVERSATIONS, Tokenization(encoder, None))
    assert [(found.positions, found.supervised) for found in measured.lengths] == [
        (31 + 5 + 2, 3),  # an image takes 3 positions; the end token carries loss as well
        (31 + 5 + 2, 3),
        (31 + 5 + 2, 3),
        (31 + 2 + 2, 3),
        (31 + 5 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 2 + 2, 3),
    ]
    assert {(found.cut_tokens, found.misfit) for found in measured.lengths} == {(0, None)}
    sharing = measured.sharing
    # Those with image p first are one group, in the order ab/xy, ab/xz, ac/w, p p, p q; the others are alone.
    assert sharing.groups.tolist() == [0, 0, 1, 2, 0, 0, 0, 3]
    assert sharing.order.tolist() == [0, 1, 5, 6, 2, 4, 3, 7]
    up_to_image = 11 + 6 + 3
    up_to_answer = up_to_image + 2 + 2 + 11
    assert sharing.prefix_lengths.tolist() == [0, up_to_answer + 1, 0, 0, up_to_image + 1, up_to_image, up_to_image, 0]


def test_what_any_two_records_share_is_the_least_in_between(encoder):
    words = ["a", "ab", "abc", "b", "ba"]
    conversations = [make_conversation("<image>" + q, a, P) for q in words for a in words]
    conversations += [make_conversation("<image><image>" + q, "a", P, image) for q in words for image in (P, Q)]
    sharing = tokenize_records(conversations, Tokenization(encoder, None)).sharing
    by_rank = sharing.prefix_lengths[np.argsort(sharing.order)]

    def spell(conversation: Conversation) -> list:
        """Its ids, and in the place of every image token the file that it shows."""
        shown = iter([path for path in conversation.image_paths for _ in range(3)])
        ids = encoder.encode_example(list(conversation.turns)).input_ids
        return [next(shown) if id == encoder.image_token_id else id for id in ids]

    spelt = [spell(conversation) for conversation in conversations]
    for first, second in itertools.combinations(np.argsort(sharing.order).tolist(), 2):
        pairs = zip(spelt[first], spelt[second], strict=False)
        alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        assert by_rank[sharing.order[first] + 1 : sharing.order[second] + 1].min() == alike


def test_sharing_among_some_of_the_records(encoder):
    sharing = tokenize_records(CONVERSATIONS, Tokenization(encoder, None)).sharing

    def select(*records):
        found = sharing.select(np.array(records, np.int64))
        return found.groups.tolist(), found.order.tolist(), found.prefix_lengths.tolist()

    # Without ab/xz in between, ac/w shares with ab/xy what it shared with ab/xz.
    assert select(0, 4, 5) == ([0, 0, 0], [0, 1, 2], [0, 21, 20])
    # In another order of the records; the first of a group left out.
    assert select(5, 1) == ([0, 0], [1, 0], [20, 0])
    # Of two groups.
    assert select(7, 4, 2) == ([3, 0, 1], [2, 0, 1], [0, 0, 0])
    assert select() == ([], [], [])


def test_what_is_too_long_is_cut_or_told_and_shares_nothing(encoder):
    conversations = [
        make_conversation("<image>ab", "xyz", P),
        make_conversation("<image>abcdef", "xyz", P),
        make_conversation("<image>ab", "x", P),
    ]
    cut, misfit, whole = tokenize_records(conversations, Tokenization(encoder, 37)).lengths
    assert cut == RecordLengths(positions=37, supervised=2, cut_tokens=2)
    needed = 11 + 8 + 3 + 6 + 11 + 2
    reason = f"needs {needed} positions to begin its first answer, model_max_length is 37"
    assert misfit == RecordLengths(0, 0, 0, reason)
    assert whole == RecordLengths(positions=37, supervised=2, cut_tokens=0)
    # Cut, the first one is the third.
    assert sorted(tokenize_records(conversations, Tokenization(encoder, 37)).sharing.prefix_lengths.tolist()) == [
        0,
        0,
        37,
    ]


def test_ids_and_labels_are_those_of_the_encoder(encoder):
    conversations = [*CONVERSATIONS, make_conversation("<image>ab", "xyz", P), make_conversation("ab<image>", "", P)]
    tokenized = tokenize_records(conversations, Tokenization(encoder, 38))

    def list_expected(number):
        example = encoder.encode_example(list(conversations[number].turns), 38)
        return example.input_ids, example.labels

    def list_read(records, number):
        ids, labels = records.read(number)
        assert ids.dtype == labels.dtype == np.int64
        return ids.tolist(), labels.tolist()

    assert tokenized.lengths[8].cut_tokens == 1
    for number in range(len(conversations)):
        assert list_read(tokenized, number) == list_expected(number)
        assert tokenized.lengths[number].positions == len(list_expected(number)[0])
    some = tokenized.select([6, 3, 8])
    assert [list_read(some, place) for place in range(3)] == [list_expected(number) for number in (6, 3, 8)]
    assert some.lengths == [tokenized.lengths[number] for number in (6, 3, 8)]


def test_no_records_are_tokenized_as_well(encoder):
    assert to_plain(tokenize_records([], Tokenization(encoder, 37))) == [[], [], [], [], []]


def test_many_processes_count_what_one_counts(encoder, monkeypatch):
    monkeypatch.setattr(tokenization, "RECORDS_PER_TASK", 2)
    conversations = [
        replace(CONVERSATIONS[n % 8], image_paths=()) if n % 3 else CONVERSATIONS[n % 8] for n in range(30)
    ]
    alone = to_plain(tokenize_records(conversations, Tokenization(encoder, 37), workers=1))
    assert to_plain(tokenize_records(conversations, Tokenization(encoder, 37), workers=3)) == alone


@pytest.mark.parametrize(
    ("first", "second", "common"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 2], [2, 2], 0)]
)
def test_common_prefix(first, second, common):
    assert count_common_prefix(np.array(first), np.array(second)) == common
