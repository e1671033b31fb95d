"""How many positions records take and share, and that what was counted once is the same when it is read again."""

import itertools
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meme_llava.dataset import token_lengths
from meme_llava.dataset.conversation import ConversationEncoder, Turn
from meme_llava.dataset.token_lengths import (
    Conversation,
    RecordLengths,
    TokenLengths,
    find_default_folder,
    measure_tokens,
)

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


def to_plain(lengths: TokenLengths) -> list:
    sharing = lengths.sharing
    return [lengths.records, sharing.groups.tolist(), sharing.order.tolist(), sharing.prefix_lengths.tolist()]


# ---- What is counted ----


def test_lengths_and_sharing_written_out(encoder):
    measured = measure_tokens(CONVERSATIONS, encoder, None)
    assert [(found.positions, found.supervised) for found in measured.records] == [
        (31 + 5 + 2, 3),  # an image takes 3 positions; the end token carries loss as well
        (31 + 5 + 2, 3),
        (31 + 5 + 2, 3),
        (31 + 2 + 2, 3),
        (31 + 5 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 6 + 1, 2),
        (31 + 2 + 2, 3),
    ]
    assert {(found.cut_tokens, found.misfit) for found in measured.records} == {(0, None)}
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
    sharing = measure_tokens(conversations, encoder, None).sharing
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
    sharing = measure_tokens(CONVERSATIONS, encoder, None).sharing

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
    cut, misfit, whole = measure_tokens(conversations, encoder, 37).records
    assert cut == RecordLengths(positions=37, supervised=2, cut_tokens=2)
    needed = 11 + 8 + 3 + 6 + 11 + 2
    reason = f"needs {needed} positions to begin its first answer, model_max_length is 37"
    assert misfit == RecordLengths(0, 0, 0, reason)
    assert whole == RecordLengths(positions=37, supervised=2, cut_tokens=0)
    # Cut, the first one is the third.
    assert sorted(measure_tokens(conversations, encoder, 37).sharing.prefix_lengths.tolist()) == [0, 0, 37]


def test_many_processes_count_what_one_counts(encoder, monkeypatch):
    monkeypatch.setattr(token_lengths, "RECORDS_PER_TASK", 2)
    conversations = [
        replace(CONVERSATIONS[n % 8], image_paths=()) if n % 3 else CONVERSATIONS[n % 8] for n in range(30)
    ]
    alone = to_plain(measure_tokens(conversations, encoder, 37, workers=1))
    assert to_plain(measure_tokens(conversations, encoder, 37, workers=3)) == alone


# ---- What is kept ----


@pytest.fixture
def count_calls(monkeypatch):
    """How many records were tokenised."""
    calls = []
    encode = ConversationEncoder.encode_example
    monkeypatch.setattr(
        ConversationEncoder, "encode_example", lambda self, *rest: calls.append(1) or encode(self, *rest)
    )
    return calls


def test_a_second_start_reads_what_the_first_one_counted(encoder, tmp_path, count_calls):
    folder = tmp_path / "not yet" / "there"
    first = to_plain(measure_tokens(CONVERSATIONS, encoder, 37, folder))
    assert len(count_calls) == 8
    assert to_plain(measure_tokens(CONVERSATIONS, make_encoder(), 37, folder)) == first
    assert len(count_calls) == 8
    assert [path.suffix for path in folder.iterdir()] == [".npz"]


def test_no_records_are_counted_and_kept_as_well(encoder, tmp_path):
    for _ in range(2):
        assert to_plain(measure_tokens([], encoder, 37, tmp_path)) == [[], [], [], []]


BASE = make_conversation("<image>b", "xy", P)
CHANGES = {
    "an answer": lambda: ([make_conversation("<image>b", "xz", P)], make_encoder(), 37),
    "a role": lambda: ([Conversation(BASE.turns[1:], (P,))], make_encoder(), 37),
    "an image": lambda: ([make_conversation("<image>b", "xy", Q)], make_encoder(), 37),
    "another record": lambda: ([BASE, BASE], make_encoder(), 37),
    "the length limit": lambda: ([BASE], make_encoder(), 38),
    "no length limit": lambda: ([BASE], make_encoder(), None),
    "tokens of an image": lambda: ([BASE], make_encoder(tokens_per_image=4), 37),
    # x and z change places, which no word of the template has.
    "the tokenizer": lambda: ([BASE], make_encoder(LETTERS[:-3] + "zyx"), 37),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_counted_anew(encoder, tmp_path, count_calls, change):
    measure_tokens([BASE], encoder, 37, tmp_path)
    del count_calls[:]
    conversations, changed_encoder, max_length = CHANGES[change]()
    measure_tokens(conversations, changed_encoder, max_length, tmp_path)
    assert len(count_calls) == len(conversations)


def test_a_file_of_older_code_is_not_read(encoder, tmp_path, count_calls, monkeypatch):
    measure_tokens(CONVERSATIONS, encoder, 37, tmp_path)
    monkeypatch.setattr(token_lengths, "CACHE_VERSION", token_lengths.CACHE_VERSION + 1)
    measure_tokens(CONVERSATIONS, encoder, 37, tmp_path)
    assert len(count_calls) == 16


def write_array(**columns):
    return lambda path: np.savez(path.open("wb"), **columns)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:600]),
    "another format": lambda path: path.write_text("<!DOCTYPE html>"),
    "a pickle": write_array(key=np.array({"a": 1}, dtype=object)),
    "other columns": write_array(key=np.array("x")),
    "a single array": lambda path: np.save(path.open("wb"), np.arange(3)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_counted_anew_and_mended(encoder, tmp_path, count_calls, damage):
    first = to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path))
    (file,) = tmp_path.iterdir()
    DAMAGES[damage](file)
    assert to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path)) == first
    assert len(count_calls) == 16
    if damage != "a folder":
        assert to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path)) == first
        assert len(count_calls) == 16
    assert list(tmp_path.iterdir()) == [file]


def test_no_changed_byte_changes_what_is_read(encoder, tmp_path):
    first = to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for place in range(0, len(content), 23):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        assert to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path)) == first


def test_another_files_counts_under_this_name_are_not_taken(encoder, tmp_path):
    expected = to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path / "a"))
    measure_tokens(CONVERSATIONS[::-1], encoder, 37, tmp_path / "b")
    (ours,), (theirs,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    shutil.copy(theirs, ours)
    assert to_plain(measure_tokens(CONVERSATIONS, encoder, 37, tmp_path / "a")) == expected


def test_a_folder_that_cannot_be_written_keeps_nobody_from_training(encoder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    measured = measure_tokens(CONVERSATIONS, encoder, 37, tmp_path / "file" / "lengths")
    assert len(measured.records) == 8
    assert "counted lengths cannot be kept there (" in capsys.readouterr().err


def test_processes_that_start_together_do_not_disturb_each_other(encoder, tmp_path):
    conversations = CONVERSATIONS * 20
    expected = to_plain(measure_tokens(conversations, encoder, 37))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run():
        for _ in range(10):
            results.put(to_plain(measure_tokens(conversations, encoder, 37, tmp_path)) == expected)
            for path in tmp_path.glob("*.npz"):
                path.unlink(missing_ok=True)

    processes = [context.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get() for _ in range(40)] == [True] * 40
    for process in processes:
        process.join(timeout=10)
        assert process.exitcode == 0
    assert list(tmp_path.glob("*.part")) == []


def test_lengths_lie_beside_the_checked_images(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_default_folder() == tmp_path / "meme_llava" / "token_lengths"


@pytest.mark.parametrize(
    ("first", "second", "common"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 2], [2, 2], 0)]
)
def test_common_prefix(first, second, common):
    assert token_lengths.count_common_prefix(np.array(first), np.array(second)) == common
