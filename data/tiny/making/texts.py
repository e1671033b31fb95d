"""Text bank: rows of words, of our own lines, of characters by chance, as numbers.

A character's number is its place in characters.txt plus 1, then come the strangers, then a gap without ink. 0 is no
letter.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from glyphs import STRANGER, list_strangers
from meme_lines import LINES, PATTERNS, WORDS, fill_pattern, is_unseen
from meme_pages import BLANK, MOOD_MARKS

ROW = 20  # letters a row holds at most
GAP = "\u3000"
NEVER_DRAWN = {BLANK, *MOOD_MARKS.values()}  # answers use them as marks
ENDS = "！？，。…～!?~"
KINDS = {"words": 44, "line": 30, "chance": 8, "latin": 7, "digits": 4, "few": 7}
OWN_WEIGHT = 20_000  # of our own words, where jieba counts the most frequent one 880,000 times


class Alphabet:
    """Numbers of all characters that can be drawn."""

    def __init__(self, known: list[str]):
        self.known = known
        self.drawn = [*known, *list_strangers(known), GAP]
        self.numbers = {character: number for number, character in enumerate(self.drawn, 1)}
        self.stranger, self.gap = self.numbers[STRANGER], self.numbers[GAP]
        self.strangers = self.drawn[len(self.known) : -1]

    def label(self, number: int) -> int:
        """What is to be answered for a drawn character: its own number, that of STRANGER, or 0 for a gap."""
        if number == self.gap:
            return 0
        return number if number <= len(self.known) else self.stranger


@dataclass
class TextBank:
    """Rows (rows, ROW) of numbers, 0 behind their end; from `first_long` on they are as long as can be."""

    rows: torch.Tensor
    first_long: int


def read_words(path: Path | None, alphabet: Alphabet) -> list[tuple[str, float]]:
    """Words and weights: those of a list with a word and its count a line, and our own."""
    words = {word: float(OWN_WEIGHT) for kind in WORDS.values() for word in kind.split()}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        word, count = line.split()[:2]
        if len(word) <= 12 and all(character in alphabet.numbers for character in word):
            words[word] = max(words.get(word, 0), float(count))
    return list(words.items())


class RowWriter:
    """Rows of text without end."""

    def __init__(self, alphabet: Alphabet, words: list[tuple[str, float]], seed: int):
        self.rng, self.alphabet = random.Random(seed), alphabet
        self.chinese = [entry for entry in words if not entry[0].isascii()]
        self.latin = [word for word, _ in words if word.isascii() and word.isalpha()] or ["ok"]
        self.weights = list(accumulate(weight for _, weight in self.chinese))
        self.lines = [line.replace("|", "") for lines in LINES.values() for line in lines.split()]
        self.lines = [line for line in self.lines if not is_unseen(line)]
        self.patterns = PATTERNS.split()
        self.own_words = {kind: words.split() for kind, words in WORDS.items()}
        self.usual = [character for character in self.alphabet.known if character not in NEVER_DRAWN]

    def write(self, kind: str, length: int) -> str:
        """A row of about `length` letters."""
        row = getattr(self, f"write_{kind}")(length)
        if kind != "chance" and self.rng.random() < 0.15:
            row += self.rng.choice(ENDS) * self.rng.choice((1, 1, 1, 2, 3))
        if len(row) > 4 and self.rng.random() < 0.1:
            cut = self.rng.randrange(1, len(row))
            row = row[:cut] + self.rng.choice((" ", "，", "，", GAP, GAP * 2, GAP * 3, "、", "：")) + row[cut:]
        if self.rng.random() < 0.06:
            place = self.rng.randrange(len(row))
            row = row[:place] + self.rng.choice(self.alphabet.strangers) + row[place + 1 :]
        return row[:ROW]

    def write_words(self, length: int) -> str:
        row = ""
        while len(row) < length:
            row += self.rng.choices(self.chinese, cum_weights=self.weights)[0][0]
        return row[: max(length, 1)]

    def write_line(self, length: int) -> str:
        if self.rng.random() < 0.1:
            return self.rng.choice(self.lines)
        while True:
            line = fill_pattern(self.rng, self.rng.choice(self.patterns), self.own_words)
            if not is_unseen(line):
                return line

    def write_chance(self, length: int) -> str:
        return "".join(self.rng.choices(self.usual, k=length))

    def write_latin(self, length: int) -> str:
        row, shape = "", self.rng.choice((str.lower, str.lower, str.upper, str.title))
        while len(row) < length:
            row += shape(self.rng.choice(self.latin)) + self.rng.choice(("", " "))
        if self.rng.random() < 0.5:
            row = row[: self.rng.randrange(2, 8)] + self.write_words(self.rng.randrange(1, 6))
        return row.strip()

    def write_digits(self, length: int) -> str:
        number = str(self.rng.randrange(10 ** self.rng.randrange(1, 6)))
        return self.rng.choice((number, number + self.write_words(length), self.write_words(length) + number))

    def write_few(self, length: int) -> str:
        few = self.rng.choices(
            self.rng.choice((self.usual[:600], "哈啊呜嘿呵嗯6好不了")), k=self.rng.choice((1, 1, 2, 3))
        )
        return "".join(self.rng.choices(few, k=length))


def write_rows(writer: RowWriter, count: int, is_long: bool, seed: int) -> np.ndarray:
    """Rows (count, ROW) of numbers."""
    writer.rng.seed(seed)
    rows = np.zeros((count, ROW), np.int16)
    for number in range(count):
        kind = writer.rng.choices(list(KINDS), list(KINDS.values()))[0]
        length = ROW if is_long else min(writer.rng.choice((1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12, 14)), ROW)
        text = writer.write(kind, length).replace(" ", GAP)
        while is_long and len(text) < ROW:
            text = (text + writer.write_words(6))[:ROW]
        numbers = [writer.alphabet.numbers.get(character, 0) for character in text]
        numbers = [figure for figure in numbers if figure]
        rows[number, : len(numbers)] = numbers
    return rows


def make_text_bank(writer: RowWriter, count: int, seed: int, processes: int = 1) -> TextBank:
    """About `count` rows, a fifth of them long."""
    parts = 16
    long_count = count // 5 // parts
    jobs = [(count // parts - long_count, False, seed * 1000 + part) for part in range(parts)]
    jobs += [(long_count, True, seed * 1000 + parts + part) for part in range(parts)]
    with ProcessPoolExecutor(processes) as pool:
        rows = list(pool.map(partial(write_rows, writer), *zip(*jobs, strict=True)))
    return TextBank(torch.from_numpy(np.concatenate(rows)), len(rows[0]) * parts)
