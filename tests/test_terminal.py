"""What a person reads of a batch and of a table, to the letter."""

import io

import pytest
import torch
from make_towers import train_tokenizer
from rich.console import Console

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import ConversationEncoder
from meme_llava.dataset.images import ImagePolicy
from meme_llava.model.llava import Processing
from meme_llava.terminal import format_bytes, format_seconds, print_table, show_bytes, show_count
from meme_llava.train.look import print_batch


class Processor:
    """As much of a LlavaProcessor as showing a batch needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def make_processing() -> Processing:
    # Trained on nothing, every letter is a token of its own, so positions can be counted by eye.
    tokenizer = train_tokenizer([])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, tokens_per_image=3, source="test")
    return Processing(
        Processor(tokenizer), encoder, ImagePolicy(2, (0.0,) * 3, (1.0,) * 3), tokens_per_image=3, config=None
    )


def make_example(processing: Processing, *pieces: tuple[str, bool]) -> dict:
    """A dataset item from (text, whether it is supervised); IMAGE stands for a file, always the same, END for the end
    token.
    """
    special = {"IMAGE": [processing.encoder.image_token_id] * 3, "END": [processing.encoder.turn_end_id]}
    input_ids, labels = [], []
    for text, supervised in pieces:
        ids = special.get(text) or processing.tokenizer.convert_tokens_to_ids(list(text))
        input_ids += ids
        labels += ids if supervised else [-100] * len(ids)
    images = sum(text == "IMAGE" for text, _ in pieces)
    return {
        "record_id": "r",
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "image_paths": ("p.png",) * images,
        "pixel_values": [torch.zeros(3, 2, 2, dtype=torch.uint8)] * images,
    }


def show(*rows: list) -> str:
    processing = make_processing()
    collator = PackingCollator(processing.encoder.image_token_id, tokens_per_image=3, image_size=2)
    file = io.StringIO()
    batch = collator([make_example(processing, *row) for row in rows])
    print_batch(batch, processing, Console(file=file, width=200, highlight=False))
    return file.getvalue()


def test_a_batch_shows_images_as_one_word_and_what_is_learnt_in_brackets():
    first = [("ab", False), ("IMAGE", False), ("cd", False), ("ef", True), ("END", True)]
    # Two answers in one row; a square bracket in a text is not a command to the terminal.
    second = [("[b]", False), ("x", True), ("END", True), ("y", False), ("z", True)]
    assert show(first, second) == (
        "a device batch of 17 positions, 1 image, 6 supervised positions\n"
        "\n"
        "positions 0 to 9: 3 supervised\n"
        "ab<image: 3 tokens at 2>cd【ef<|im_end|>】\n"
        "\n"
        "positions 10 to 16: 3 supervised\n"
        "[b]【x<|im_end|>】y【z】\n"
    )


def test_a_batch_without_images_does_not_show_the_blank_one():
    assert show([("a", False), ("b", True)]) == (
        "a device batch of 2 positions, 0 images, 1 supervised position\n\npositions 0 to 1: 1 supervised\na【b】\n"
    )


def test_of_a_second_caption_only_what_it_adds_is_shown():
    """Both begin with the image, a question and an x, which the first teaches and the second too."""
    first = [("IMAGE", False), ("q", False), ("xa", True), ("END", True)]
    second = [("IMAGE", False), ("q", False), ("xbb", True), ("END", True)]
    assert show(first, second) == (
        "a device batch of 10 positions, 1 image, 7 supervised positions\n"
        "\n"
        "positions 0 to 6: 3 supervised\n"
        "<image: 3 tokens at 0>q【xa<|im_end|>】\n"
        "\n"
        "positions 7 to 9: 3 supervised, continues after position 4, sharing 5 positions\n"
        "【bb<|im_end|>】\n"
    )


def test_two_images_of_a_row_are_shown_where_they_stand():
    row = [("IMAGE", False), ("a", False), ("IMAGE", False), ("b", True)]
    assert show(row).splitlines()[-1] == "<image: 3 tokens at 0>a<image: 3 tokens at 4>【b】"


def test_a_batch_is_printed_to_the_terminal_without_breaking_its_lines(capsys):
    # A line broken by us would look like a line break in the prompt.
    processing = make_processing()
    collator = PackingCollator(processing.encoder.image_token_id, 3, 2)
    print_batch(collator([make_example(processing, ("a" * 300, False), ("b", True))]), processing)
    assert "a" * 300 + "【b】\n" in capsys.readouterr().out


def test_durations_have_the_digits_that_matter():
    shown = ["0.421 s", "12 s", "4 min 09 s", "1 h 05 min"]
    assert [format_seconds(seconds) for seconds in (0.4213, 12, 249, 3900)] == shown


def test_sizes_have_a_unit_in_which_they_are_not_zero():
    shown = ["0.0 KB", "4.2 KB", "512.0 MB", "3.2 GB", "1,200.0 GB"]
    assert [format_bytes(size) for size in (0, 4200, 512e6, 3.21e9, 1.2e12)] == shown


def test_a_table_shows_control_characters_in_place_of_obeying_them(capsys):
    print_table("Found", ("file", "detail"), [("a.jpg", "\x1b[2Jgone")])
    assert "\\x1b[2Jgone" in capsys.readouterr().out


def test_a_table_keeps_brackets_and_groups_digits(capsys):
    print_table("Found", ("file", "tokens"), [("a[red].jpg", 1234567), ("b.jpg", 5)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Found"
    assert lines[1].split() == ["file", "tokens"]
    assert lines[-2:] == ["  a[red].jpg   1,234,567", "  b.jpg                5"]


def test_figures_are_whole_under_heads_that_are_longer_than_they(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    heads = [f"/a/very/long/folder/of/experiments/number_{number}/scores" for number in (1, 2)]
    rows = [("character error rate of the text", "1080.4%\n1001.1–1163.1", "7.0%\n4.7–9.6", "180")]
    print_table("Answers", ("score", *heads, "answers"), rows)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert all(f" {figure} " in printed for figure in ("1080.4%", "1001.1–1163.1", "7.0%", "4.7–9.6", "180"))
    assert " number_1/" in printed and " number_2/" in printed


def test_words_above_figures_are_whole_and_so_are_short_names(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    heads = ("criterion", "first", "tie", "second", "order decided", "second preferred", "pairs")
    print_table("Verdicts", heads, [("含义 meaning understood", *["100.0%"] * 4, "50.0%\n40.1–59.9", "400")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    del lines[3]  # the rule
    assert lines == [
        "Verdicts",
        "                                                   order     second",
        "  criterion             first    tie      second   decided   preferred   pairs",
        "  含义 meaning          100.0%   100.0%   100.0%   100.0%    50.0%         400",
        "  understood                                                 40.1–59.9",
    ]


def test_many_columns_leave_the_words_of_the_first_one_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    heads = ("output/scores_rapidocr", "output/scores", "output_b/scores", "output_c/scores")
    rows = [("character error rate of the text", "1080.4%\n1001.1–1163.1", *["7.0%\n4.7–9.6"] * 3, "180")]
    print_table("Answers", ("score", *heads, "answers"), rows)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert all(f" {word} " in printed for word in ("character", "error", "rapidocr", "output_c/", "scores", "answers"))


def test_heads_stay_whole_where_there_is_room(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [("texts without an error", "0.0%\n0.0–0.0", "75.0%\n68.3–81.7", "180")]
    print_table("Answers", ("score", "output/scores_before", "output/scores", "answers"), rows)
    assert " output/scores_before   output/scores " in capsys.readouterr().out


def test_names_stay_whole_beside_longer_texts_in_two_columns_a_character(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    print_table(
        "Answers", ("image", "answer"), [("images/meme_000000.jpg", "图中一只熊猫，看起来很犯困，表达犯困的心情。")]
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[3:] == [
        "  images/meme_000000.jpg   图中一只熊猫，看起来很犯困，表",
        "                           达犯困的心情。",
    ]


@pytest.mark.parametrize(
    ("show", "line"), [(show_count, "images 700/700 "), (show_bytes, "images 700/700 bytes ")], ids=["count", "bytes"]
)
def test_progress_in_a_file_is_a_line_at_the_end(show, line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with show("images", 700) as advance:
        for _ in range(7):
            advance(100)
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line) and printed.endswith(" 0:00:00 left")


def test_progress_that_is_slow_has_a_speed_and_a_time_left(monkeypatch, capsys):
    """A batch of answers of a large model can take a minute."""
    monkeypatch.setenv("COLUMNS", "80")
    now = 0
    for clock in ("rich.console.monotonic", "meme_llava.terminal.time.monotonic"):
        monkeypatch.setattr(clock, lambda: now)
    with show_count("questions", 100) as advance:
        for _ in range(3):
            now += 40
            advance(16)
    assert capsys.readouterr().err.splitlines()[-1] == "questions  48/100 0.4/s 0:02:10 left"
