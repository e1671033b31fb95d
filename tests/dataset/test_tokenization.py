"""Token ids of records, how many positions they take and how many of them they share."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import encode_example
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meme_llava.dataset import conversation
from meme_llava.dataset.conversation import ConversationEncoder, DoesNotFit, Tokens, Turn
from meme_llava.dataset.sampling import PrefixSharing, count_common_prefix, find_sharing

LETTERS = "\nabcdefghijklmnopqrstuvwxyz"
P, Q = Path("/images/p.png"), Path("/images/q.png")


def make_encoder(letters: str = LETTERS, tokens_per_image: int = 3) -> ConversationEncoder:
    """Every letter is a token; ids follow the alphabet."""
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<image>"], special_tokens=True)
    return ConversationEncoder(tokenizer, tokens_per_image, source="test")


class Conversation(NamedTuple):
    turns: tuple[Turn, ...]
    image_paths: tuple[Path, ...]


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


def tokenize(encoder, conversations: list[Conversation], max_length: int | None = None) -> list[Tokens | DoesNotFit]:
    return list(encoder.encode_many([conversation.turns for conversation in conversations], max_length))


def share(encoder, conversations: list[Conversation], max_length: int | None = None) -> PrefixSharing:
    ids = [tokens.ids for tokens in tokenize(encoder, conversations, max_length)]
    paths = [conversation.image_paths for conversation in conversations]
    return find_sharing(ids, paths, encoder.image_token_id, encoder.tokens_per_image)


def to_lists(sharing: PrefixSharing) -> tuple:
    return sharing.groups.tolist(), sharing.order.tolist(), sharing.prefix_lengths.tolist()


# ---- What is counted ----


def test_lengths_and_sharing_written_out(encoder):
    measured = tokenize(encoder, CONVERSATIONS)
    assert [(found.positions, found.supervised.sum()) for found in measured] == [
        (31 + 5 + 2, 3),  # an image takes 3 positions; the end token carries loss as well
        (31 + 5 + 2, 3),
        (31 + 5 + 2, 3),
        (31 + 2 + 2, 3),
        (31 + 5 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 2 + 2, 3),
    ]
    assert {found.cut_tokens for found in measured} == {0}
    sharing = share(encoder, CONVERSATIONS)
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
    sharing = share(encoder, conversations)
    by_rank = sharing.prefix_lengths[np.argsort(sharing.order)]

    def spell(conversation: Conversation) -> list:
        """Its ids, and in the place of every image token the file that it shows."""
        shown = iter([path for path in conversation.image_paths for _ in range(3)])
        ids = encode_example(encoder, list(conversation.turns)).input_ids
        return [next(shown) if id == encoder.image_token_id else id for id in ids]

    spelt = [spell(conversation) for conversation in conversations]
    for first, second in itertools.combinations(np.argsort(sharing.order).tolist(), 2):
        pairs = zip(spelt[first], spelt[second], strict=False)
        alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        assert by_rank[sharing.order[first] + 1 : sharing.order[second] + 1].min() == alike


def test_sharing_among_some_of_the_records(encoder):
    def select(*records):
        return to_lists(share(encoder, [CONVERSATIONS[record] for record in records]))

    # Without ab/xz in between, ac/w shares with ab/xy what it shared with ab/xz.
    assert select(0, 4, 5) == ([0, 0, 0], [0, 1, 2], [0, 21, 20])
    # In another order of the records; the first of a group left out.
    assert select(5, 1) == ([0, 0], [1, 0], [20, 0])
    # Of three groups.
    assert select(7, 4, 2) == ([0, 1, 2], [0, 1, 2], [0, 0, 0])
    assert select() == ([], [], [])


def test_what_is_too_long_is_cut_or_told(encoder):
    conversations = [
        make_conversation("<image>ab", "xyz", P),
        make_conversation("<image>abcdef", "xyz", P),
        make_conversation("<image>ab", "x", P),
    ]
    cut, misfit, whole = tokenize(encoder, conversations, 37)
    assert (cut.positions, cut.supervised.sum(), cut.cut_tokens) == (37, 2, 2)
    needed = 11 + 8 + 3 + 6 + 11 + 2
    assert isinstance(misfit, DoesNotFit)
    assert str(misfit) == f"needs {needed} positions to begin its first answer, model_max_length is 37"
    assert (whole.positions, whole.supervised.sum(), whole.cut_tokens) == (37, 2, 0)
    # Cut, the first one is the third.
    assert sorted(share(encoder, conversations[::2], 37).prefix_lengths.tolist()) == [0, 37]


def test_many_conversations_become_what_each_becomes_alone(encoder, monkeypatch):
    monkeypatch.setattr(conversation, "CONVERSATIONS_AT_ONCE", 3)
    conversations = [*CONVERSATIONS, make_conversation("<image>ab", "xyz", P), make_conversation("ab<image>", "", P)]
    found = tokenize(encoder, conversations, 38)
    assert found[8].cut_tokens == 1
    for tokens, (turns, _) in zip(found, conversations, strict=True):
        expected = encode_example(encoder, turns, 38)
        ids, labels = tokens.spread(encoder.image_token_id, encoder.tokens_per_image)
        assert ids.dtype == labels.dtype == np.int64
        assert (ids.tolist(), labels.tolist()) == (expected.input_ids, expected.labels)
        assert tokens.cut_tokens == expected.cut_tokens
        assert tokens.positions == len(ids)
    assert tokenize(encoder, []) == []


@pytest.mark.parametrize(
    ("first", "second", "common"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 2], [2, 2], 0)]
)
def test_common_prefix(first, second, common):
    assert count_common_prefix(np.array(first), np.array(second)) == common
