"""The fonts that draw Chinese here. All of those named may be redistributed; none is part of this repository."""

import functools
from pathlib import Path

from PIL import ImageFont

FontFace = tuple[Path, int]  # a font file, and the face inside it that holds the forms used in mainland China

# Debian: apt install fonts-noto-cjk fonts-noto-cjk-extra fonts-wqy-zenhei fonts-wqy-microhei fonts-arphic-ukai
# fonts-arphic-uming fonts-lxgw-wenkai fonts-smiley-sans
FONT_FOLDER = Path("/usr/share/fonts")
KNOWN_FONTS = (
    ("opentype/noto/NotoSansCJK-Black.ttc", 2),
    ("opentype/noto/NotoSansCJK-Bold.ttc", 2),
    ("opentype/noto/NotoSansCJK-Medium.ttc", 2),
    ("opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("opentype/noto/NotoSerifCJK-Black.ttc", 2),
    ("opentype/noto/NotoSerifCJK-Bold.ttc", 2),
    ("truetype/wqy/wqy-microhei.ttc", 0),
    ("truetype/wqy/wqy-zenhei.ttc", 0),
    ("truetype/arphic/ukai.ttc", 0),
    ("truetype/arphic/uming.ttc", 0),
    ("truetype/lxgw-wenkai/LXGWWenKai-Bold.ttf", 0),
    ("truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf", 0),
    ("truetype/smiley-sans/SmileySans-Oblique.ttf", 0),
)


@functools.lru_cache(maxsize=200)  # 2.6 MB and 1 ms to load each; long draws meet a thousand
def load_font(face: FontFace, size: int) -> ImageFont.FreeTypeFont:
    """A face at `size` pixels."""
    # The basic engine is in every Pillow; the other one, where installed, would place letters differently.
    return ImageFont.truetype(face[0], size, face[1], layout_engine=ImageFont.Layout.BASIC)


def list_missing(face: FontFace, characters: list[str]) -> list[str]:
    """The characters of which the font has no shape of its own; all of them if it is not a font."""
    try:
        font = load_font(face, 24)
    except OSError:
        return characters
    missing = bytes(font.getmask("\U0010ffff"))
    shapes = ((character, bytes(font.getmask(character))) for character in characters)
    return [character for character, shape in shapes if not any(shape) or shape == missing]


def measure_weight(face: FontFace) -> int:
    """How much ink the face takes; heavier is more."""
    return sum(bytes(load_font(face, 48).getmask("永国")))


def find_fonts(own_fonts: list[Path], characters: list[str]) -> list[FontFace]:
    """The faces that have all of the characters, heaviest first.

    Args:
        own_fonts: the user's font files, used instead of the known ones.

    Raises:
        ValueError: one of the user's fonts is missing or lacks a character, or there is no font.
    """
    for path in own_fonts:
        if not path.is_file():
            raise ValueError(f"--font {path}: no such file")
        if lacking := list_missing((path, 0), characters):
            raise ValueError(
                f"{path} is not a font with all the Chinese characters needed: {len(lacking)} of {len(characters)} "
                f"have no shape in it, e.g. {lacking[0]}"
            )
    candidates = [(path, 0) for path in own_fonts] or [(FONT_FOLDER / name, index) for name, index in KNOWN_FONTS]
    faces = [face for face in candidates if not list_missing(face, characters)]
    if not faces:
        raise ValueError("No font with Chinese characters was found; install one with: apt install fonts-noto-cjk")
    return sorted(faces, key=measure_weight, reverse=True)
