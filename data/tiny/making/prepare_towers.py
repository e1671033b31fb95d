"""Prepares towers in training: the tokenizer, and the token ids of all questions and answers.

    python data/tiny/making/prepare_towers.py --output_dir output/towers/start

writes the tokenizer of the language model, characters.txt and tables.json, which train_towers.py reads.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from choose_characters import COUNT, list_needed  # noqa: E402
from draw_lessons import FIELD_QUESTION  # noqa: E402
from draw_memes import DESCRIPTIONS, MOOD_QUESTIONS, NO_TEXT, TEXT_QUESTIONS  # noqa: E402
from glyphs import read_characters  # noqa: E402
from lessons import list_names, write_questions  # noqa: E402
from make_towers import train_tokenizer  # noqa: E402
from meme_pages import BLANK, MOOD_MARKS  # noqa: E402

from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, ConversationEncoder, Turn  # noqa: E402

ALPHABET_WEIGHT = 50  # times that the tokenizer learns from each character
PIECES = 6  # of a description: literals, each with a variable behind it


def split_template(template: str, encode) -> list[tuple[list[int], str]]:
    """A description's wording as PIECES literals in token ids, each with the variable behind it."""
    parts = re.split(r"{(\w+)}", template)
    pieces = list(zip(parts[::2], [*parts[1::2], ""], strict=True))
    pieces += [("", "")] * (PIECES - len(pieces))
    return [(encode(literal), name) for literal, name in pieces]


def make_tables(tokenizer, characters: list[str]) -> dict:
    """The token ids of everything that lessons are made of."""
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, 1, "the tokenizer")
    encode = encoder.encode_text
    spelled = [encode(character) for character in characters]
    assert all(len(ids) == 1 for ids in spelled), "a character is more than one token"

    def split_prompt(question: str) -> tuple[list[int], list[int]]:
        prompt = encoder.encode_prompt([Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}")])
        place = prompt.index(encoder.image_token_id)
        return prompt[:place], prompt[place + 1 :]

    own = {
        "text": TEXT_QUESTIONS,
        "mood": MOOD_QUESTIONS,
        "description": [question for question, _, _ in DESCRIPTIONS],
        "field": [FIELD_QUESTION],
    }
    number = dict(zip(characters, (ids[0] for ids in spelled), strict=True))
    return {
        "vocabulary": -(-(len(tokenizer) + 8) // 64) * 64,
        "end": encoder.turn_end_id,
        "blank": number[BLANK],
        "marks": [number[mark] for mark in MOOD_MARKS.values()],
        "prefix": split_prompt("")[0],
        "characters": [ids[0] for ids in spelled],
        "own_questions": {task: [split_prompt(text)[1] for text in texts] for task, texts in own.items()},
        "other_questions": {
            task: [split_prompt(text)[1] for text in texts] for task, texts in write_questions().items()
        },
        "no_text": encode(f"{NO_TEXT}。"),
        "templates": [[split_template(wording[kind], encode) for wording in DESCRIPTIONS] for kind in (1, 2)],
        **{name: [encode(text) for text in texts] for name, texts in list_names().items()},
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare towers in training.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=COUNT, help="so many of the most frequent Chinese ones")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(argv)
    folder, needed = settings.output_dir, set(list_needed())
    characters = [
        character
        for place, character in enumerate(read_characters())
        if place < settings.characters or character in needed or character.isascii()
    ]
    # Alone and often, so that no word becomes a token; a Chinese character takes at most two merges of bytes.
    tokenizer = train_tokenizer(characters * ALPHABET_WEIGHT, 512 + 2 * len(characters))
    tokenizer.save_pretrained(folder)
    (folder / "characters.txt").write_text("".join(characters) + "\n", encoding="utf-8")
    tables = make_tables(tokenizer, characters)
    (folder / "tables.json").write_text(json.dumps(tables, ensure_ascii=False), encoding="utf-8")
    print(f"{len(characters)} characters, {tables['vocabulary']} rows of an embedding: {folder}")


if __name__ == "__main__":
    main()
