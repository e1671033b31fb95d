"""Words of an image that stand in its file name, and names that say nothing.

Two customs: ChineseBQB's (`滑稽大佬00109-少来这套.jpg`) and names that are the text (`有点意思，说下去.jpg`).
"""

import re

from meme_llava.dataset.inspection import normalise_text

# ChineseBQB numbers in five digits (six or seven by mistake), in front of the figure's name or behind it. A dash
# stands before the text, mostly.
_BQB = re.compile(
    r"(?:\d{5}(?!\d)[^\d-][^-]*-|\D*[^\d-]\d{5,7}-|\D*[^\d-]\d{5}(?=[\u4e00-\u9fff]))(?P<text>.+)", re.DOTALL
)
_HEX_NAME = re.compile(r"\{?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\}?(_\d+)?|(v\d-)?[0-9a-f]{12,}(_\w+)?", re.I)
_CAMERA_NAME = re.compile(
    r"(QQ|微信|TIM|WeChat|WX)?(图片|截图|截屏|屏幕截图|屏幕快照|视频)[\s_-]*[\d\s_.:-]*(\(\d+\))?"
    r"|[A-Za-z]*(Screenshot|Screen Shot|screen)[\sA-Za-z_-]*[\d\s_.,:-]*"
    # A word and two digits or more: IMG_1234, mmexport1598326112, CuteGirl00191; dates and bare long numbers.
    r"|[A-Za-z]+[\s_-]?\d{2,}([\s_-][A-Za-z0-9]+)?|(?!(?P<digit>\d)(?P=digit)+$)\d{5,}|[\d\s_.-]*\d{4}[\d\s_.-]*[_.-][\d\s_.-]*",
    re.I,
)
# QQ saves under 22 random characters such as J42XKP6JDI[6U{S@99ULQ2R.
_RANDOM_NAME = re.compile(r"(?=[^\s]{16,}$)(?=.*\d)(?=.*[A-Z])[A-Z0-9\[\]{}()@$%&~`^!'+=_.,;-]+", re.I)
_COPY_NUMBER = re.compile(r"\s*[(（]\d+[)）]$")


def read_bqb_name(stem: str) -> str | None:
    """The text in a ChineseBQB name without its ending, or None if the name has none.

    Several parts (`减肥-真的很难`) are lines of the image and come with spaces between them. Some names describe in
    place of quoting (`汪蛋00024-磕头`): nothing in the name tells the two apart.
    """
    if _HEX_NAME.fullmatch(stem):
        return None
    match = _BQB.fullmatch(stem.strip())
    if not match:
        return None
    text = " ".join(part.strip() for part in match["text"].split("-") if part.strip())
    # An image that somebody saved from a chat and numbered.
    return text if normalise_text(text) and not is_machine_name(text) else None


def read_plain_name(stem: str) -> str | None:
    """The text that a name without its ending is, or None for names that cameras, chat programs and hashes make.

    Only a number in brackets after the name (`好的(1)`, `好的（2）`) is taken off, which file managers put there. A
    letter or digit that keeps names apart (`说人话B`) cannot be told from the text and stays.
    """
    if is_machine_name(stem.strip()):
        return None
    text = _COPY_NUMBER.sub("", stem.strip()).strip()
    return text if normalise_text(text) and not is_machine_name(text) else None


def is_machine_name(stem: str) -> bool:
    """Whether no person chose the name: a hash, a UUID, a date, a camera's or chat program's counter."""
    return any(pattern.fullmatch(stem) for pattern in (_HEX_NAME, _CAMERA_NAME, _RANDOM_NAME))
