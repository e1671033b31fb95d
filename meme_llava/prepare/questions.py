"""Wordings of the questions of prepared records, and which wording a record gets.

A model asked in one wording only stumbles over every other, so each record draws its own. The draw depends on seed and
record id alone: adding a file changes no other record.
"""

import hashlib
from collections.abc import Sequence

# For captions: what is seen, what is written, what is meant.
DESCRIBE = (
    "这张表情包写了什么，是什么意思？",
    "请描述一下这张表情包。",
    "这张表情包想表达什么？",
    "请解读这张表情包的内容和含义。",
    "图里画了什么，写了什么字，想表达什么意思？",
    "这张图的笑点在哪里？请结合画面和文字说一说。",
    "看看这张表情包，说说它的画面和意思。",
    "这张图是什么意思？请详细讲讲。",
)
# For transcriptions: the words in the image, and nothing else.
READ = (
    "请读出图中的文字。",
    "图里写了什么字？",
    "这张图上的文字是什么？",
    "把图片里的文字抄写下来。",
    "图中有哪些文字？只回答文字。",
    "请识别图片中的文字。",
)


def draw_question(templates: Sequence[str], seed: int, record_id: str) -> str:
    """One of the templates; always the same for the same seed and id."""
    digest = hashlib.sha256(f"{seed} {record_id}".encode("utf-8", "surrogatepass")).digest()
    return templates[int.from_bytes(digest[:8], "big") % len(templates)]
