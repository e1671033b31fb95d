"""Draws the sample memes: small sticker pictures of our own characters with a short Chinese line each.

This file knows the lines for each mood, how a line and a figure stand in a picture, and which questions and answers
go with it; `meme_characters.py`, next to it, knows how the figures look. The same seed, fonts and Pillow version give
the same files.
"""

import argparse
import itertools
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from meme_characters import CHARACTERS, INK, MOODS, draw_figure
from PIL import Image, ImageColor, ImageDraw, ImageFont

OVERSIZE = 3  # a picture is composed this many times too large
TEXTLESS_SHARE = 20  # one picture in so many carries no words
PUNCTUATION = "，！？"
DARK_COLORS = ("#b3261e", "#1f4e9c", "#6b2f9c", "#14663c")
PASTELS = ("#ffe1e6", "#fff1c9", "#dff3ff", "#e4f5dc", "#efe4ff", "#f3f6ee")
STRONG_COLORS = ("#f08a5d", "#4a90b8", "#6a9c5b", "#b0699c", "#d8a530", "#5f6f9c", "#cf5d63")
FORMATS = ("jpeg",) * 14 + ("png",) * 3 + ("palette",) * 2 + ("transparent",)

# Font file and the face inside it that holds the forms used in mainland China.
FONT_FOLDER = Path("/usr/share/fonts")
KNOWN_FONTS = (
    ("opentype/noto/NotoSansCJK-Bold.ttc", 2),
    ("opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("opentype/noto/NotoSerifCJK-Bold.ttc", 2),
    ("truetype/wqy/wqy-microhei.ttc", 0),
    ("truetype/wqy/wqy-zenhei.ttc", 0),
    ("truetype/arphic/ukai.ttc", 0),
    ("truetype/arphic/uming.ttc", 0),
)

# A bar marks where a long line breaks in two, if neither its punctuation nor its middle is the place.
LINES = {
    "开心": """今天也要加油鸭 开心到转圈圈 奶茶|到了！ 周五啦，冲鸭 快乐就完事了 发工资啦 笑出|八块腹肌
        好耶！ 今天的我|超甜 嘿嘿嘿嘿 干饭|时间到 放假|倒计时 心情|美滋滋 下班咯，拜拜""",
    "难过": """我太难了 宝宝|心里苦 钱包|又空了 说好的周末呢 我的外卖|凉了 为什么受伤的总是我 抱抱我好吗
        眼泪|不值钱 减肥|又失败了 没有人理我 周一怎么又来了 呜呜呜呜 最后一块饼没了 头发又|掉了一把""",
    "生气": """哼，不理你了 我要|生气了 还我|小饼干 谁动了|我的奶茶 你再说一遍 气成河豚 不许笑！
        三秒内来哄我 小本本记下了 别吵，我在生气 又要|加班？ 我超凶的 我的耐心用完了 今天谁都别惹我""",
    "惊讶": """还有这种操作？ 什么|情况？ 我没|看错吧 瞳孔地震 吓到炸毛 天呐，这么贵 今天要考试？
        我的瓜呢 原来|是你！ 信息量有点大 居然|猜中了 等等，我没听懂 惊掉下巴 作业是|今天交？""",
    "无语": """不知该说点啥 你开心就好 就这？ 随便吧 我不想说话 已读，不回 尴尬而|不失礼貌
        你说得都对 大可不必 这天|没法聊了 收到，马上摸鱼 让我静静 脚趾抠出三室一厅 一时语塞""",
    "得意": """不愧是我 低调，低调 这题我会 计划通 叫我|大聪明 基本操作，别夸 颜值担当就是我
        求人|不如求我 拿捏住了 轻松拿下 我就是|这么优秀 快来|夸我呀 掌声|在哪里 第一名预定""",
    "犯困": """困成一团 再睡|五分钟 看见书就困 昨晚又熬夜了 晚安，好梦 床在|召唤我 眼睛|睁不开了
        咖啡|救救我 开会|好催眠 我先睡为敬 午饭后必困 适合冬眠 电量只剩|一格 闹钟|你别响""",
    "心动": """爱了爱了 给你|小心心 你好|可爱呀 想和你贴贴 送你一朵小红花 好喜欢你呀 心都要化了
        被你|甜到了 这是|心动的感觉 比个心，收下吧 见到你就脸红 请你|吃糖呀 偷偷|想你了 全世界你最好""",
}

# The wording of the answer follows from the wording of the question: question, answer, answer without words.
WORDINGS = (
    (
        "这张表情包写了什么，是什么意思？",
        "一{unit}{mood}的{name}，配文“{text}”，表达{mood}。",
        "一{unit}{mood}的{name}，图片里没有文字。",
    ),
    (
        "请描述一下这张表情包。",
        "图中是一{unit}{mood}的{name}，写着“{text}”。",
        "图中是一{unit}{mood}的{name}，没有写字。",
    ),
    (
        "图里有什么文字？画的是谁？",
        "文字是“{text}”，画的是一{unit}{mood}的{name}。",
        "图里没有文字，画的是一{unit}{mood}的{name}。",
    ),
    ("这张图想表达什么心情？", "{name}很{mood}，它说“{text}”。", "{name}很{mood}，它没有说话。"),
)

FontFace = tuple[Path, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Meme:
    """What one picture shows and says, and in which format it is kept."""

    identifier: str
    character: str
    mood: str
    line: str  # the words, with a bar if they have a preferred break
    wording: int
    format: str

    @property
    def text(self) -> str:
        return self.line.replace("|", "")

    @property
    def file_name(self) -> str:
        return f"{self.identifier}.{'jpg' if self.format == 'jpeg' else 'png'}"


@dataclass(frozen=True)
class Layout:
    """Where the words and the figure stand, as shares of the picture's sides."""

    kind: str
    text_box: Box
    figure_box: Box
    lean: float = 0.5  # where the figure stands in the room left over: 0 at its top, 1 at its bottom


# ---- Planning ----


def plan_memes(count: int, rng: random.Random) -> list[Meme]:
    """Deals out lines, moods and characters evenly, then shuffles them."""
    pools = []
    for mood, lines in LINES.items():
        pools.append([(mood, line) for line in lines.split()])
        rng.shuffle(pools[-1])
    rows = itertools.zip_longest(*pools)
    lines = [pair for row in rows for pair in row if pair]
    names, textless = list(CHARACTERS), count // TEXTLESS_SHARE
    choices = []
    for index, (mood, line) in enumerate(lines[: count - textless]):
        # The row is added, so that a mood does not keep meeting the same characters.
        choices.append((names[(index + index // len(MOODS)) % len(names)], mood, line))
    combinations = list(itertools.product(names, MOODS))
    choices += [(name, mood, "") for name, mood in rng.sample(combinations, textless)]
    rng.shuffle(choices)
    formats = list(itertools.islice(itertools.cycle(FORMATS), count))
    rng.shuffle(formats)
    return [
        Meme(f"meme_{index:03d}", name, mood, line, rng.randrange(len(WORDINGS)), formats[index])
        for index, (name, mood, line) in enumerate(choices)
    ]


def choose_layout(rng: random.Random, meme: Meme) -> tuple[Layout, tuple[int, int]]:
    """A layout and the picture's size in pixels that suits it."""
    square = rng.randrange(210, 290, 10)
    sizes = {"square": (square, square - rng.choice((0, 0, 10, 20))), "wide": (290, 200), "tall": (200, 270)}
    if not meme.text:
        return Layout("plain", (0, 0, 0, 0), (0.05, 0.05, 0.95, 0.95)), sizes["square"]
    kinds = {"below": 34, "above": 18, "overlay": 20, "bubble": 14, "beside": 8, "column": 10}
    if meme.format == "transparent":
        kinds = {"below": 1, "above": 1}
    if len(meme.text) > 5 or set(PUNCTUATION) & set(meme.text):
        kinds.pop("column", None)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    shape = rng.choices(list(sizes), (6, 1, 2))[0]
    if kind == "beside" or (kind == "bubble" and shape == "wide"):
        boxes = (0.47, 0.1, 0.97, 0.9 if kind == "beside" else 0.55), (0.03, 0.08, 0.47, 0.97)
        return Layout(kind, *boxes), sizes["wide"]
    if kind == "column":
        boxes = ((0.74, 0.06, 0.96, 0.94), (0.03, 0.06, 0.72, 0.95))
        if rng.random() < 0.5:
            boxes = ((0.04, 0.06, 0.26, 0.94), (0.28, 0.06, 0.97, 0.95))
        return Layout(kind, *boxes), sizes["square" if shape == "wide" else shape]
    boxes = {
        "below": ((0.04, 0.74, 0.96, 0.97), (0.06, 0.04, 0.94, 0.73)),
        "above": ((0.04, 0.03, 0.96, 0.26), (0.06, 0.28, 0.94, 0.97)),
        "overlay": ((0.04, 0.72, 0.96, 0.97), (0.04, 0.04, 0.96, 1.0)),
        "bubble": ((0.09, 0.06, 0.91, 0.31), (0.08, 0.42, 0.92, 0.97)),
    }
    # The figure stays close to the words, but clear of words that are written over it.
    leans = {"below": 0.75, "above": 0.25, "overlay": 0.1, "bubble": 0.1}
    return Layout(kind, *boxes[kind], leans[kind]), sizes[shape]


# ---- Drawing ----


def draw_background(rng: random.Random, size: tuple[int, int], kind: str) -> Image.Image:
    """White or pale behind dark words; strong colours, rays, dots or a gradient behind outlined ones."""
    if kind == "white":
        return Image.new("RGBA", size, rng.choice(("white", "white", "white", "#fbfbf8", "#f4faf4")))
    first = rng.choice(PASTELS if kind == "pale" else STRONG_COLORS)
    picture = Image.new("RGBA", size, first)
    canvas = ImageDraw.Draw(picture)
    second = tuple(channel + (255 - channel) // (2 if kind == "pale" else 4) for channel in ImageColor.getrgb(first))
    width, height = size
    pattern = rng.choice(("flat", "gradient", "rays", "dots"))
    if pattern == "gradient":
        shade = Image.linear_gradient("L").resize(size)
        picture.paste(Image.new("RGBA", size, (*second, 255)), (0, 0), shade)
    elif pattern == "rays":
        reach = width + height
        for start in range(0, 360, 30):
            box = (width / 2 - reach, height / 2 - reach, width / 2 + reach, height / 2 + reach)
            canvas.pieslice(box, start, start + 15, fill=second)
    elif pattern == "dots":
        step = 24 * OVERSIZE
        for row, y in enumerate(range(0, height + step, step // 2)):
            for x in range(row % 2 * step // 2, width + step, step):
                canvas.ellipse((x - step / 6, y - step / 6, x + step / 6, y + step / 6), fill=second)
    return picture


def place_figure(rng: random.Random, picture: Image.Image, meme: Meme, box: Box, lean: float) -> None:
    figure = CHARACTERS[meme.character]
    has_glasses = meme.mood == "得意" and rng.random() < 0.4
    drawing = draw_figure(figure, MOODS[meme.mood], rng.choice(figure.skins), has_glasses)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        drawing = drawing.rotate(rng.choice((-12, -8, 8, 12)), Image.Resampling.BICUBIC, expand=True)
        drawing = drawing.crop(drawing.getbbox())
    left, top, right, bottom = box
    scale = min((right - left) / drawing.width, (bottom - top) / drawing.height) * rng.choice((1, 1, 0.95, 0.88))
    drawing = drawing.resize((round(drawing.width * scale), round(drawing.height * scale)), Image.Resampling.LANCZOS)
    x = left + (right - left - drawing.width) * rng.uniform(0.3, 0.7)
    y = top + (bottom - top - drawing.height) * (lean + rng.uniform(-0.1, 0.1))
    picture.alpha_composite(drawing, (round(x), round(y)))


def list_arrangements(line: str, is_column: bool) -> list[str]:
    """The ways to break a line of words: as it is, or in two."""
    text = line.replace("|", "")
    if is_column:
        return ["\n".join(text)]
    if len(text) < 5:
        return [text]
    if "|" in line:
        return [text, line.replace("|", "\n")]
    cut = next((place + 1 for place, char in enumerate(text[:-1]) if char in PUNCTUATION), (len(text) + 1) // 2)
    return [text, f"{text[:cut]}\n{text[cut:]}"]


def draw_words(
    line: str, face: FontFace, room: tuple[float, float], largest: float, style: dict, is_column: bool, angle: float
) -> Image.Image:
    """The words as large as the room allows, on a transparent ground."""

    def describe(size: float) -> dict:
        spacing, stroke_width = size * 0.12, round(size * style["weight"])
        return {"font": load_font(face, size), "align": "center", "spacing": spacing, "stroke_width": stroke_width}

    def measure(words: str, size: float) -> Box:
        return ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), words, **describe(size))

    fits = []
    for words in list_arrangements(line, is_column):
        left, top, right, bottom = measure(words, 100)
        fits.append((min(largest, 97 * room[0] / (right - left), 97 * room[1] / (bottom - top)), words))
    # One line reads more naturally than two, unless two are clearly larger.
    size, words = fits[-1] if fits[-1][0] > 1.25 * fits[0][0] else fits[0]
    left, top, right, bottom = measure(words, size)
    layer = Image.new("RGBA", (round(right - left) + 4, round(bottom - top) + 4))
    ImageDraw.Draw(layer).multiline_text(
        (2 - left, 2 - top), words, style["fill"], stroke_fill=style["stroke"], **describe(size)
    )
    layer = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    layer.thumbnail((round(room[0]), round(room[1])), Image.Resampling.LANCZOS)
    return layer


def draw_bubble(picture: Image.Image, box: Box, tip: tuple[float, float]) -> None:
    """A speech bubble around the box whose tail ends at `tip`."""
    canvas, rim = ImageDraw.Draw(picture), 2 * OVERSIZE
    left, top, right, bottom = box
    base = min(max(tip[0], left + 20 * OVERSIZE), right - 20 * OVERSIZE)
    tail = [(base - 9 * OVERSIZE, bottom - rim), (base + 9 * OVERSIZE, bottom - rim), tip]
    # All the ink comes before all the white, so that no line runs between bubble and tail.
    canvas.rounded_rectangle((left - rim, top - rim, right + rim, bottom + rim), 16 * OVERSIZE, INK)
    canvas.line([*tail, tail[0]], INK, 2 * rim, joint="curve")
    canvas.rounded_rectangle(box, 14 * OVERSIZE, "white")
    canvas.polygon(tail, "white")


def choose_style(rng: random.Random, ground: str, faces: list[FontFace]) -> tuple[FontFace, dict]:
    """The font, and colour, outline and weight (outline width as a share of the letter size) of the words."""
    # An outline eats into thin letters, so outlined words take one of the heavier fonts.
    heavy = faces[: (len(faces) + 1) // 2]
    if ground == "strong":
        return rng.choice(heavy), {"fill": rng.choice(("white", "white", "#fff27a")), "stroke": INK, "weight": 0.08}
    face = rng.choice(faces)
    color = rng.choice(DARK_COLORS) if rng.random() < 0.25 else "black"
    weight = 0 if face in heavy else rng.choice((0, 0.012, 0.025))
    return face, {"fill": color, "stroke": color, "weight": weight}


def place_words(
    rng: random.Random, picture: Image.Image, line: str, layout: Layout, box: Box, ground: str, faces: list[FontFace]
) -> None:
    left, top, right, bottom = box
    largest = rng.uniform(30, 46) * OVERSIZE
    # A bubble brings its own white ground.
    face, style = choose_style(rng, "white" if layout.kind == "bubble" else ground, faces)
    angle = rng.choice((-7, -5, 5, 7)) if layout.kind not in ("bubble", "column") and rng.random() < 0.25 else 0
    words = draw_words(line, face, (right - left, bottom - top), largest, style, layout.kind == "column", angle)
    x = left + (right - left - words.width) * (rng.uniform(0.2, 0.8) if layout.kind == "above" else 0.5)
    y = top + (bottom - top - words.height) * 0.5
    if layout.kind == "bubble":
        pad_x, pad_y = 10 * OVERSIZE, 7 * OVERSIZE
        # Beside a wide figure the tail points to it at the left, over a figure it points down.
        tip_x = layout.figure_box[2] * picture.width if layout.text_box[0] > 0.4 else picture.width * 0.5
        around = (x - pad_x, y - pad_y, x + words.width + pad_x, y + words.height + pad_y)
        draw_bubble(picture, around, (tip_x, around[3] + 16 * OVERSIZE))
    picture.alpha_composite(words, (round(x), round(y)))


def draw_picture(rng: random.Random, meme: Meme, faces: list[FontFace]) -> Image.Image:
    layout, (width, height) = choose_layout(rng, meme)
    size = (width * OVERSIZE, height * OVERSIZE)
    ground = "strong" if layout.kind == "overlay" else rng.choices(("white", "pale", "strong"), (6, 3, 1))[0]
    if meme.format == "transparent":
        picture, ground = Image.new("RGBA", size), "white"
    else:
        picture = draw_background(rng, size, ground)

    def scale(box: Box) -> Box:
        return tuple(share * size[side % 2] for side, share in enumerate(box))

    place_figure(rng, picture, meme, scale(layout.figure_box), layout.lean)
    if meme.text:
        place_words(rng, picture, meme.line, layout, scale(layout.text_box), ground, faces)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def save_picture(rng: random.Random, picture: Image.Image, meme: Meme, path: Path) -> None:
    if meme.format == "jpeg":
        picture.convert("RGB").save(path, quality=rng.choice((75, 85, 85, 90)))
    elif meme.format == "palette":
        picture.convert("RGB").quantize(64, Image.Quantize.MEDIANCUT).save(path, optimize=True)
    else:
        kept = picture if meme.format == "transparent" else picture.convert("RGB")
        kept.save(path, optimize=True)


# ---- Fonts ----


def load_font(face: FontFace, size: float) -> ImageFont.FreeTypeFont:
    # The basic engine is in every Pillow; the other one, where installed, would place letters differently.
    return ImageFont.truetype(face[0], size, face[1], layout_engine=ImageFont.Layout.BASIC)


def has_all_glyphs(face: FontFace) -> bool:
    """Whether the font has a shape of its own for every character of the lines."""
    try:
        font = load_font(face, 24)
    except OSError:
        return False
    missing = bytes(font.getmask("\U0010ffff"))
    shapes = (bytes(font.getmask(character)) for character in sorted(set("".join(LINES.values())) - set("| \n")))
    return all(any(shape) and shape != missing for shape in shapes)


def measure_weight(face: FontFace) -> int:
    return sum(bytes(load_font(face, 48).getmask("永国")))


def find_fonts(own_fonts: list[Path]) -> list[FontFace]:
    """The usable fonts, heaviest first."""
    candidates = [(path, 0) for path in own_fonts] or [(FONT_FOLDER / name, index) for name, index in KNOWN_FONTS]
    for path in own_fonts:
        if not has_all_glyphs((path, 0)):
            raise ValueError(f"{path} is not a font with all the Chinese characters needed.")
    faces = [face for face in candidates if has_all_glyphs(face)]
    if not faces:
        raise ValueError("No font with Chinese characters was found; install one with: apt install fonts-noto-cjk")
    return sorted(faces, key=measure_weight, reverse=True)


# ---- Command line ----


def write_record(meme: Meme) -> dict:
    question, with_text, without_text = WORDINGS[meme.wording]
    answer = (with_text if meme.text else without_text).format(
        unit=CHARACTERS[meme.character].unit, name=meme.character, mood=meme.mood, text=meme.text
    )
    return {
        "id": meme.identifier,
        "image": f"images/{meme.file_name}",
        "text": meme.text,
        "character": meme.character,
        "mood": meme.mood,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    line_count = sum(len(lines.split()) for lines in LINES.values())
    largest = max(count for count in range(2 * line_count) if count - count // TEXTLESS_SHARE <= line_count)
    parser = argparse.ArgumentParser(description="Draw the sample memes and their annotations.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="gets images/ and annotations.json")
    parser.add_argument("--count", type=int, default=100, help=f"number of pictures, 1 to {largest}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--font",
        type=Path,
        action="append",
        default=[],
        help="a font file to use instead of the known ones; may be given several times",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the memes that are already there")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.count <= largest:
        parser.error(f"--count must be 1 to {largest}: every picture gets a line of its own")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    images = arguments.output_dir / "images"
    if images.is_dir() and any(images.iterdir()) and not arguments.overwrite:
        print(f"{images} is not empty; give --overwrite to replace the memes in it.", file=sys.stderr)
        return 2
    try:
        faces = find_fonts(arguments.font)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    images.mkdir(parents=True, exist_ok=True)
    for path in images.iterdir():
        # A meme of an earlier run may have another ending now, and would stay as a stray.
        if re.fullmatch(r"meme_\d{3}\.(jpg|png)", path.name):
            path.unlink()
    memes = plan_memes(arguments.count, random.Random(arguments.seed))
    for meme in memes:
        rng = random.Random(f"{arguments.seed} {meme.identifier}")
        save_picture(rng, draw_picture(rng, meme, faces), meme, images / meme.file_name)
    records = json.dumps([write_record(meme) for meme in memes], ensure_ascii=False, indent=1)
    (arguments.output_dir / "annotations.json").write_text(records + "\n", encoding="utf-8")
    print(f"Drew {len(memes)} memes into {images}; fonts found: {len(faces)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
