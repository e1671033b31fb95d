"""Lessons: questions about pages and their true answers as token ids, many at once."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from layout import PATCHES, Dice
from scenery import FIGURE_NAMES, MOOD_NAMES, PROP_NAMES

TASKS = ("text", "mood", "description", "field")
LONGEST_TEXT = 60  # letters an answer gives; of longer texts it gives the first
OWN_SHARE = 0.65  # of the questions, those that the sample memes ask
VARIABLES = ("", "who", "name", "wears", "mood", "text")


def write_questions(seed: int = 0) -> dict[str, list[str]]:
    """Other ways to ask for text and mood than those of the sample memes."""
    rng = random.Random(seed)
    where = (
        "图中",
        "图里",
        "图片中",
        "图片里",
        "图上",
        "图片上",
        "这张图里",
        "这张图片上",
        "表情包里",
        "表情包上",
        "画面里",
    )
    ask = ("", "请", "请你", "帮我", "麻烦")
    read = ("读出", "识别", "认出", "写出", "提取", "说出", "告诉我", "看看")
    words = (
        "写了什么？",
        "写着什么？",
        "写的是什么？",
        "有什么字？",
        "有哪些文字？",
        "的文字是什么？",
        "的字是什么？",
        "写了啥？",
    )
    feel = ("是什么心情？", "的心情怎么样？", "是什么情绪？", "的表情是什么？", "看起来心情如何？", "是什么感受？")
    who = ("图里的角色", "图中的角色", "这个角色", "画里的它", "这张图", "这张图片", "表情包里的角色", "它")
    texts = [
        rng.choice(ask) + rng.choice(read) + rng.choice(where) + rng.choice(("的文字", "的字")) + "。"
        for _ in range(50)
    ]
    texts += [rng.choice(where) + rng.choice(words) for _ in range(40)]
    moods = [rng.choice(who) + rng.choice(feel) for _ in range(30)]
    return {"text": sorted(set(texts)), "mood": sorted(set(moods))}


@dataclass
class Lesson:
    """Token ids behind the patches: the question, then the answer.

    Args:
        ids: (B, T) int64, padded at the end.
        supervised: (B, T) bool, the answer and its end.
    """

    ids: torch.Tensor
    supervised: torch.Tensor


def pad(lists: list[list[int]], device: str) -> torch.Tensor:
    """(lists, longest) int64, -1 behind the end of each."""
    longest = max(map(len, lists))
    return torch.tensor([ids + [-1] * (longest - len(ids)) for ids in lists], device=device).view(len(lists), longest)


def compact(pieces: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces (B, any) joined without their -1: (B, T) ids, -1 at the end, and which piece each is from."""
    ids = torch.cat(pieces, dim=1)
    source = torch.cat([torch.full_like(piece, number) for number, piece in enumerate(pieces)], dim=1)
    place = torch.where(ids >= 0, (ids >= 0).cumsum(1) - 1, ids.shape[1])
    joined, sources = (torch.full((len(ids), ids.shape[1] + 1), -1, device=ids.device) for _ in range(2))
    joined.scatter_(1, place, ids)
    sources.scatter_(1, place, torch.where(ids >= 0, source, -1))
    longest = int((ids >= 0).sum(1).max())
    return joined[:, :longest], sources[:, :longest]


class Teacher:
    """Asks and answers; what it says is spelled in `tables` (see prepare_towers.py)."""

    def __init__(self, tables_path: Path, device: str):
        tables = json.loads(tables_path.read_text(encoding="utf-8"))
        self.device, self.end, self.blank = device, tables["end"], tables["blank"]
        self.vocabulary = tables["vocabulary"]
        self.prefix = torch.tensor(tables["prefix"], device=device)
        # Row 0 is no letter.
        self.tokens = torch.tensor([-1, *tables["characters"]], device=device)
        self.marks = torch.tensor(tables["marks"], device=device)
        self.own = {task: pad(tables["own_questions"][task], device) for task in TASKS}
        self.others = {task: pad(tables["other_questions"][task], device) for task in ("text", "mood")}
        self.no_text = torch.tensor(tables["no_text"], device=device)
        self.moods, self.names, self.who, self.wears = (
            pad(tables[name], device) for name in ("moods", "names", "who", "wears")
        )
        # (2, templates, pieces, any) literals with and without text, and the variable behind each.
        templates = tables["templates"]
        flat = [piece for kind in templates for template in kind for piece, _ in template]
        self.literals = pad(flat, device).view(2, len(templates[0]), len(templates[0][0]), -1)
        kinds = [[[VARIABLES.index(name) for _, name in template] for template in kind] for kind in templates]
        self.variables = torch.tensor(kinds, device=device)

    def ask(self, dice: Dice, task: str, count: int) -> torch.Tensor:
        """(B, any) questions."""
        own = self.own[task][dice.below(len(self.own[task]), count)]
        if task not in self.others:
            return own
        other = self.others[task][dice.below(len(self.others[task]), count)]
        width = max(own.shape[1], other.shape[1])
        own, other = (F.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in (own, other))
        return torch.where(dice.happens(OWN_SHARE, count, 1), own, other)

    def spell(self, text: torch.Tensor) -> torch.Tensor:
        """(B, LONGEST_TEXT) token ids of texts (B, any) of numbers, -1 behind their end; or that there is none."""
        text = F.pad(text, (0, max(0, LONGEST_TEXT - text.shape[1])))[:, :LONGEST_TEXT]
        nothing = F.pad(self.no_text, (0, LONGEST_TEXT - len(self.no_text)), value=-1)
        return torch.where((text[:, :1] > 0), self.tokens[text], nothing)

    def answer(self, dice: Dice, task: str, text: torch.Tensor, facts: torch.Tensor) -> list[torch.Tensor]:
        """Question and answer in pieces, of which the first is the question.

        Args:
            text: (B, any) numbers of the letters in reading order, 0 behind their end.
            facts: (B, 3) mood, figure and prop of pages that have a figure.
        """
        if task == "text":
            return [self.ask(dice, task, len(text)), self.spell(text)]
        if task == "mood":
            return [self.ask(dice, task, len(text)), self.moods[facts[:, 0]]]
        template = dice.below(len(self.own["description"]), len(text))
        silent = (text[:, 0] == 0).long()
        said = torch.where(silent[:, None] > 0, -1, self.spell(text))
        values = [
            self.who[facts[:, 1]],
            self.names[facts[:, 1]],
            self.wears[facts[:, 2]],
            self.moods[facts[:, 0]],
            said,
        ]
        values = [torch.full_like(said, -1)] + [
            F.pad(ids, (0, LONGEST_TEXT - ids.shape[1]), value=-1) for ids in values
        ]
        values = torch.stack(values)  # (variables, B, LONGEST_TEXT)
        rows = torch.arange(len(text), device=text.device)
        pieces = [self.own["description"][template]]
        for number in range(self.literals.shape[2]):
            pieces += [
                self.literals[silent, template, number],
                values[self.variables[silent, template, number], rows],
            ]
        return pieces

    def make_lesson(self, dice: Dice, tasks: torch.Tensor, text: torch.Tensor, facts: torch.Tensor) -> Lesson:
        """The lesson of each page; `tasks` (B,) are places in TASKS, none of them a field's."""
        parts, orders = [], []
        for number, task in enumerate(TASKS[:3]):
            chosen = (tasks == number).nonzero().flatten()
            if len(chosen):
                pieces = self.answer(dice, task, text[chosen], facts[chosen])
                end = torch.full((len(chosen), 1), self.end, device=text.device)
                parts.append(compact([*pieces, end]))
                orders.append(chosen)
        longest = max(ids.shape[1] for ids, _ in parts)
        ids, sources = (
            torch.cat([F.pad(part[kind], (0, longest - part[kind].shape[1]), value=-1) for part in parts])
            for kind in (0, 1)
        )
        order = torch.cat(orders).argsort()
        ids, sources = ids[order], sources[order]
        # Of a text that is cut, the end is not to be learned.
        cut = ((text > 0).sum(1) > LONGEST_TEXT)[:, None] & (ids == self.end) & (sources > 0)
        return Lesson(ids.clamp(min=0), (sources > 0) & ~cut)

    def make_field_lesson(self, dice: Dice, slots: torch.Tensor, facts: torch.Tensor) -> Lesson:
        """What stands at each patch: its first letter, the mark of a figure's mood, or the blank.

        Args:
            slots: (B, patches, SLOTS); facts: (B, patches, 3); see networks.PatchReader.
        """
        count = len(slots)
        said = torch.where(slots[..., 0] > 0, self.tokens[slots[..., 0]], self.blank)
        said = torch.where(facts[..., 0] >= 0, self.marks[facts[..., 0].clamp(min=0)], said)
        question = self.own["field"][torch.zeros(count, dtype=torch.long, device=slots.device)]
        end = torch.full((count, 1), self.end, device=slots.device)
        ids, sources = compact([question, said, end])
        return Lesson(ids, sources > 0)


def place_facts(facts: torch.Tensor, middles: torch.Tensor, side: int) -> torch.Tensor:
    """(B, patches, 3) facts (B, figures, 3) at the patches where the figures' middles (B, figures, 2) lie, else -1."""
    cell = (middles * PATCHES / side).long().clamp(0, PATCHES - 1)
    patch = cell[..., 1] * PATCHES + cell[..., 0]  # (B, figures)
    placed = torch.full((len(facts), PATCHES**2, 3), -1, device=facts.device)
    return placed.scatter_(1, patch[..., None].expand(-1, -1, 3), facts)


def list_names() -> dict[str, list[str]]:
    """What our figures are called, in the order of their numbers."""
    from meme_characters import CHARACTERS

    return {
        "moods": MOOD_NAMES,
        "names": FIGURE_NAMES,
        "who": [CHARACTERS[name].unit + name for name in FIGURE_NAMES],
        "wears": [f"，{prop}" if prop else "" for prop in PROP_NAMES],
    }
