"""Chooses the characters that the towers learn, by how frequent they are in Chinese at large.

    pip install jieba wordfreq
    python data/tiny/making/choose_characters.py

writes characters.txt beside this file: simplified characters (those of GB 2312) ordered by the counts of jieba's
dictionary and of wordfreq's list, then what our own lines, questions and figures need, then letters, digits and signs.
"""

import collections
import string
from pathlib import Path

HERE = Path(__file__).parent

COUNT = 3200  # of the most frequent
SIGNS = "，。！？、：；“”‘’（）《》【】…—～·￥％＋＝／"
SYMBOLS = "□〇①②③④⑤⑥⑦⑧⑨⑩★☆♥♪→←↑↓√×"
# Sounds and words of chats, which dictionaries count too low.
CHAT = (
    "啊哦嗯呃噢喔哟呦嘞咧嘿哼啧哇喵汪呱嘎咕噜噗嗷嗨咦咩咯哒嘤嘻嚎囧怼尬怂萌兮囍喽嗖嘚瑟嘛呐咳咚啪嘭嘘呸啥咋咱俺娃妞"
    "爹爷奶舅婶姨姑嫂侄甥婿媳撩撸怂懵逗憨萌蠢菜狗鸭鹅猪猫兔熊虎鸡鸽鱼虾蟹龟蛙蛇鼠牛羊马猴茶咖啡糖饼粥粽饺汤锅碗筷"
    "瓜葱蒜姜椒桃梨枣橙橘柠檬芒莓葡萄西红柿薯哭笑怒愁惊吓羞怕困累饿饱渴晕吐抖颤滚爬跑跳蹲趴躺瘫踢踹扇捶揍掐拍抱搂亲吻"
    "膜拜跪磕鞠躬撒娇卖萌装怂包锤砖键盘鼠标屏幕代码程序猿媛肝秃头发际线加班摸鱼划水躺平内卷吃瓜围观打卡充值氪金"
)


def is_simplified(character: str) -> bool:
    """Whether it is a Chinese character of GB 2312."""
    return "\u4e00" <= character <= "\u9fff" and character.encode("gb2312", "ignore") != b""


def count_characters() -> collections.Counter:
    """Each character's share of all text, the mean of both lists."""
    import jieba
    import wordfreq

    dictionary = Path(jieba.__file__).parent / "dict.txt"
    entries = [line.split() for line in dictionary.read_text(encoding="utf-8").splitlines()]
    lists = ({entry[0]: float(entry[1]) for entry in entries}, wordfreq.get_frequency_dict("zh", wordlist="large"))
    shares: collections.Counter = collections.Counter()
    for words in lists:
        counts: collections.Counter = collections.Counter()
        for word, count in words.items():
            for character in filter(is_simplified, word):
                counts[character] += count
        total = sum(counts.values())
        for character, count in counts.items():
            shares[character] += count / total / len(lists)
    return shares


def list_needed() -> list[str]:
    """Characters beyond ASCII of our own lines, questions, answers and chats."""
    from draw_lessons import list_lesson_alphabet
    from meme_lines import LINES, PATTERNS, WORDS

    own = "".join([*LINES.values(), PATTERNS, *WORDS.values(), list_lesson_alphabet(), CHAT, SIGNS, SYMBOLS])
    return sorted(character for character in set(own) if ord(character) > 0x7F)


def main() -> None:
    frequent = [character for character, _ in count_characters().most_common(COUNT)]
    printable = [character for character in string.printable if not character.isspace()]
    characters = list(dict.fromkeys([*frequent, *list_needed(), *printable]))
    rows = ["".join(characters[start : start + 60]) for start in range(0, len(characters), 60)]
    (HERE / "characters.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(characters)} characters")


if __name__ == "__main__":
    main()
