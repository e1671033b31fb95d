"""Files and names as users bring them: other encodings, archives, names that are spelt in another way."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from meme_llava.errors import UserError, count, is_utf8

_CONVERT = "iconv -f {encoding} -t UTF-8 {name} > converted"
# What a file is by its first bytes, and how it becomes UTF-8 text.
_NO_TEXT = (
    (b"\xff\xfe\0\0", "UTF-32", _CONVERT.replace("{encoding}", "UTF-32")),
    (b"\xff\xfe", "UTF-16", _CONVERT.replace("{encoding}", "UTF-16")),
    (b"\xfe\xff", "UTF-16", _CONVERT.replace("{encoding}", "UTF-16")),
    (b"\x1f\x8b", "compressed by gzip", "gunzip {name}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd {name}"),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or save the table as CSV in UTF-8"),
    (b"PAR1", "a parquet file", "python data/prepare.py parquet --dataset {name} …"),
)


def read_text(path: Path) -> str:
    """What stands in a UTF-8 file of a user.

    Raises:
        UserError: it is missing or not UTF-8.
    """
    try:
        # Excel and Notepad put a byte order mark in front; utf-8-sig takes the file either way.
        text = path.read_text(encoding="utf-8-sig")
        # UTF-16 without a mark is UTF-8, too, where all is ASCII; a few NULs are what a crash leaves of a line.
        if text.count("\0") * 4 <= len(text):
            return text
        reason = "every other byte is 0"
    except OSError as error:
        near = describe_near_name(path, {}) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path}: {error.strerror or error}{near}. Is the path right?") from error
    except UnicodeDecodeError as error:
        reason = str(error)
    raise UserError(f"{path}: not UTF-8 ({reason}){_explain_contents(path)}")


def _explain_contents(path: Path) -> str:
    """What a file is that is not UTF-8, and how it becomes that, as the end of a message."""
    content = path.read_bytes()
    for mark, what, advice in _NO_TEXT:
        if content.startswith(mark):
            return f". It is {what}: {advice.format(name=path.name)}"
    if b"\0" in content:
        # The zero bytes of ASCII characters are the second ones if the first byte is the lower half.
        encoding = "UTF-16LE" if content[1::2].count(0) > content[::2].count(0) else "UTF-16BE"
    else:
        encoding = "GB18030"
    with contextlib.suppress(UnicodeDecodeError):
        content.decode(encoding)
        return f". Convert it, e.g. {_CONVERT.format(encoding=encoding, name=path.name)}"
    return ". Save it as UTF-8"


def describe_near_name(path: Path, listings: dict[Path, dict[str, str]]) -> str:
    """Where a path leads nowhere for a name that is spelt in another way: that name, and what differs; else nothing.

    Args:
        listings: the names in every folder that was asked about, by what they have in common; grows.
    """
    while not path.parent.exists():
        path = path.parent
    if path.parent not in listings:
        names = []
        with contextlib.suppress(OSError):
            names = os.listdir(path.parent)
        listings[path.parent] = {_reduce_name(name): name for name in names}
    near = listings[path.parent].get(_reduce_name(path.name))
    if near in (None, path.name):  # a link that leads nowhere has the very name
        return ""
    if not is_utf8(near):
        difference = "whose bytes are GBK; rename it, e.g. by convmv -f gbk -t utf-8"
    elif normalize("NFC", near) == normalize("NFC", path.name):
        difference = "which differs in its Unicode form, as names from macOS do"
    elif near.strip() == path.name.strip():
        difference = "which differs in white space at an end"
    else:
        difference = "which differs in case"
    return f"; there is {near!r}, {difference}"


def _reduce_name(name: str) -> str:
    """What is left of a name without case, outer white space and Unicode form; bytes that are no UTF-8 read as GBK."""
    return normalize("NFC", _read_name(name)).casefold().strip()


def _read_name(name: str) -> str:
    return name if is_utf8(name) else os.fsencode(name).decode("gb18030", "replace")


def check_file_names(flag: str, folder: Path, images: Sequence[Path]) -> None:
    """Raise UserError where names of a folder cannot stand in a file of ours."""
    names = (str(path.relative_to(folder)) for path in images)
    if broken := [name for name in names if not is_utf8(name)]:
        raise UserError(
            f"{flag} {folder}: {count(len(broken), 'file name is', 'file names are')} not UTF-8, the first is "
            f"{broken[0]!r} ({_read_name(broken[0])} in GBK); rename them (for names from a Chinese Windows: "
            "convmv -f gbk -t utf-8)"
        )
