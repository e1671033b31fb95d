"""The characters of the sample memes: how each is built and how a mood shows on it.

Everything is drawn in units (a figure is about 200 units high, 100 is its middle), larger than a meme needs it; who
shrinks the result gets smooth edges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

INK = "#2b2320"
BLUSH, TEAR, HEART = "#ff9d9d", "#7cc8f5", "#f2506e"
UNIT = 3  # pixels per unit
MARGIN = 45  # units around the 200 by 200 box, for ears, raised hands and marks

Point = tuple[float, float]


def list_oval_points(x: float, y: float, rx: float, ry: float, angle: float = 0) -> list[Point]:
    """The outline of an oval, turned by `angle` degrees."""
    turn = math.radians(angle)
    points = []
    for step in range(72):
        across, down = rx * math.cos(step * math.pi / 36), ry * math.sin(step * math.pi / 36)
        points.append(
            (x + across * math.cos(turn) - down * math.sin(turn), y + across * math.sin(turn) + down * math.cos(turn))
        )
    return points


def smooth(points: list[Point], closed: bool = False) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    ring = [points[-1], *points, points[0], points[1]] if closed else [points[0], *points, points[-1]]
    curve = []
    for a, b, c, d in zip(ring, ring[1:], ring[2:], ring[3:], strict=False):
        for step in range(12):
            t = step / 12
            curve.append(
                tuple(
                    0.5 * (2 * q + (r - p) * t + (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3)
                    for p, q, r, s in zip(a, b, c, d, strict=True)
                )
            )
    return curve if closed else [*curve, points[-1]]


def mirror(points: list[Point], side: int) -> list[Point]:
    """Points given as distances outward from the middle, put on the left (-1) or right (1) half."""
    return [(100 + side * x, y) for x, y in points]


class Pen:
    """Draws in units on an image, with round line ends and outlined shapes."""

    def __init__(self, image: Image.Image, scale: float, offset: float = 0):
        self.canvas, self.scale, self.offset = ImageDraw.Draw(image), scale, offset

    def place(self, points: list[Point]) -> list[Point]:
        return [((x + self.offset) * self.scale, (y + self.offset) * self.scale) for x, y in points]

    def stroke(self, points: list[Point], color: str = INK, width: float = 4) -> None:
        placed, radius = self.place(points), width * self.scale / 2
        self.canvas.line(placed, fill=color, width=round(2 * radius))
        # Pillow leaves hairline gaps between the pieces of a thick bent line; discs at the joints close them.
        # It also draws a disc a little wider than a line, which would show as beads.
        radius -= 1
        for x, y in placed:
            self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def shape(self, points: list[Point], fill: str, outline: str | None = INK, width: float = 4) -> None:
        self.canvas.polygon(self.place(points), fill=fill)
        if outline:
            self.stroke([*points, points[0]], outline, width)

    def blob(self, points: list[Point], fill: str, outline: str | None = INK, width: float = 4) -> None:
        self.shape(smooth(points, closed=True), fill, outline, width)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: str,
        outline: str | None = INK,
        angle: float = 0,
        width: float = 4,
    ) -> None:
        self.shape(list_oval_points(x, y, rx, ry, angle), fill, outline, width)

    def limb(self, points: list[Point], fill: str, thickness: float = 15) -> None:
        self.stroke(smooth(points), INK, thickness + 8)
        self.stroke(smooth(points), fill, thickness)

    def heart(self, x: float, y: float, size: float, outline: str | None = INK) -> None:
        turns = [step * math.pi / 30 for step in range(60)]
        points = [
            (
                x + size * math.sin(t) ** 3,
                y - size / 16 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in turns
        ]
        self.shape(points, HEART, outline, 3)

    def drop(self, x: float, y: float, size: float) -> None:
        self.blob([(x, y - 1.6 * size), (x + 0.8 * size, y), (x, y + 0.9 * size), (x - 0.8 * size, y)], TEAR, INK, 3)


# ---- Moods: eyes, mouths, and the marks around a face ----
# An eye is drawn by (pen, x, y, size, side, ink); `ink` is the colour that shows up on the skin around the eye.


def draw_open_eye(
    pen: Pen,
    x: float,
    y: float,
    size: float,
    pupil: float,
    look: float = 0,
    lid: Callable[[float], float] = lambda x: -1e9,
) -> None:
    """A white eye cut off above by the line `lid`; `pupil` and `look` are shares of the eye's size."""

    def cut(points: list[Point]) -> list[Point]:
        return [(px, max(py, lid(px))) for px, py in points]

    pen.shape(cut(list_oval_points(x, y, size, size * 1.1)), "white", INK, 4)
    middle = x + look * size
    pen.shape(cut(list_oval_points(middle, y + 1, size * pupil, size * pupil * 1.1)), INK, None)
    if pupil > 0.3:
        pen.oval(middle - size * 0.2, y - size * 0.15, size * 0.2, size * 0.2, "white", None)


def draw_happy_eye(pen, x, y, size, side, ink):
    pen.stroke(smooth([(x - size, y + size * 0.45), (x, y - size * 0.6), (x + size, y + size * 0.45)]), ink, 5.5)


def draw_sad_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size * 1.1, 0.85)
    pen.oval(x + size * 0.3, y + size * 0.4, size * 0.22, size * 0.2, "white", None)
    top, bottom, end = y + size, y + size + 30, x + 4 * side
    pen.blob([(x - 5, top), (x + 5, top), (end + 6, bottom), (end - 6, bottom)], TEAR, INK, 2.5)


def draw_angry_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size, 0.45, -0.2 * side, lambda px: y - 2 - (px - x) * side * 0.55)


def draw_amazed_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size * 1.25, 0.22)


def draw_dull_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size * 1.05, 0.42, 0.45, lambda px: y - 1)


def draw_smug_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size * 1.05, 0.5, -0.3, lambda px: y - 3 + (px - x) * side * 0.3)


def draw_sleepy_eye(pen, x, y, size, side, ink):
    pen.stroke(smooth([(x - size, y), (x, y + size * 0.55), (x + size, y)]), ink, 5.5)


def draw_loving_eye(pen, x, y, size, side, ink):
    pen.heart(x, y, size * 1.15)


def draw_scared_eye(pen, x, y, size, side, ink):
    pen.oval(x, y, size * 1.15, size * 1.2, "white")
    pen.stroke(
        smooth(
            [
                (x + size * (0.62 - step * 0.1) * math.cos(step), y + size * (0.62 - step * 0.1) * math.sin(step))
                for step in range(7)
            ]
        ),
        INK,
        3.5,
    )


def draw_puzzled_eye(pen, x, y, size, side, ink):
    draw_open_eye(pen, x, y, size * (1.25 if side > 0 else 0.8), 0.6, 0.25)


# A mouth is drawn by (pen, y, width), always around x = 100.


def draw_happy_mouth(pen, y, width):
    pen.blob(
        [
            (100 - width, y - 4),
            (100, y),
            (100 + width, y - 4),
            (100 + width * 0.6, y + 14),
            (100, y + 19),
            (100 - width * 0.6, y + 14),
        ],
        "#8c2f39",
    )
    pen.oval(100, y + 14, width * 0.45, 5, "#ff8a8a", None)


def draw_sad_mouth(pen, y, width):
    pen.stroke(
        smooth(
            [
                (100 - width, y + 11),
                (100 - width * 0.5, y + 3),
                (100, y + 6),
                (100 + width * 0.5, y + 3),
                (100 + width, y + 11),
            ]
        ),
        INK,
        4.5,
    )


def draw_angry_mouth(pen, y, width):
    pen.blob(
        [
            (100 - width, y + 1),
            (100, y - 3),
            (100 + width, y + 1),
            (100 + width, y + 11),
            (100, y + 8),
            (100 - width, y + 11),
        ],
        "white",
    )
    for share in (-0.55, 0, 0.55):
        pen.stroke([(100 + share * width, y - 2), (100 + share * width, y + 9)], INK, 3)
    pen.stroke([(100 - width, y + 5), (100 + width, y + 5)], INK, 3)


def draw_amazed_mouth(pen, y, width):
    pen.oval(100, y + 8, 4 + width * 0.4, 14, "#8c2f39")
    pen.oval(100, y + 16, width * 0.35, 4, "#ff8a8a", None)


def draw_dull_mouth(pen, y, width):
    pen.stroke([(100 - width * 0.8, y + 4), (100 + width * 0.8, y + 4)], INK, 5)


def draw_smug_mouth(pen, y, width):
    pen.stroke(
        smooth(
            [(100 - width, y + 3), (100 - width * 0.2, y + 9), (100 + width * 0.7, y + 3), (100 + width * 1.1, y - 8)]
        ),
        INK,
        5,
    )


def draw_sleepy_mouth(pen, y, width):
    pen.oval(100, y + 5, width * 0.35 + 1, 6, "#8c2f39")
    corner = 100 + width * 0.4
    pen.blob([(corner, y + 6), (corner + 6, y + 8), (corner + 3, y + 19)], TEAR, INK, 2)


def draw_loving_mouth(pen, y, width):
    pen.stroke(
        smooth(
            [(100 - width, y), (100 - width * 0.55, y + 8), (100, y), (100 + width * 0.55, y + 8), (100 + width, y)]
        ),
        INK,
        4.5,
    )


def draw_scared_mouth(pen, y, width):
    half = [(100 + (step - 3) / 3 * width, y + (4 if step % 2 else 11)) for step in range(7)]
    pen.blob([*half, (100 + width, y + 17), (100 - width, y + 17)], "white")


def draw_puzzled_mouth(pen, y, width):
    pen.stroke(smooth([(100 - width * 0.7, y + 8), (100, y + 3), (100 + width * 0.7, y + 6)]), INK, 5)


def draw_beak(pen: Pen, y: float, gape: float, curl: float) -> None:
    """The parrot's mouth: a lower half that hangs down by `gape`, under a hook whose corners move by `curl`."""
    pen.blob([(88, y), (112, y), (108, y + 12 + gape), (100, y + 17 + gape), (92, y + 12 + gape)], "#8c2f39")
    pen.blob([(91, y + 8 + gape), (109, y + 8 + gape), (100, y + 18 + gape)], "#e08a1e")
    pen.blob(
        [
            (100, y - 17),
            (118, y - 7),
            (121, y + 4 + curl),
            (108, y + 6),
            (100, y + 16),
            (92, y + 6),
            (79, y + 4 + curl),
            (82, y - 7),
        ],
        "#ffb833",
    )
    for x in (94, 106):
        pen.oval(x, y - 7, 2, 2, INK, None)


# A mark is drawn by (pen, mouth_y), most of them at the upper right of the head.

MARK_X, MARK_Y = 168, 34


def draw_sparkles(pen, mouth_y):
    for dx, dy, size in ((0, 0, 5), (14, -12, 3.5), (-152, -4, 4.5)):
        for angle in (0, 90):
            pen.shape(list_oval_points(MARK_X + dx, MARK_Y + dy, size * 1.7, size * 0.5, angle), "#ffb833", None)


def draw_vein(pen, mouth_y):
    for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        corner = [(MARK_X + dx * x, MARK_Y + dy * y) for x, y in ((3, 11), (4, 4), (11, 3))]
        pen.stroke(smooth(corner), "#e0303a", 5)


def draw_shock(pen, mouth_y):
    # Only beside the head, where no ear is.
    for side in (-1, 1):
        for angle in (2, 20, 38):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            pen.stroke(mirror([(80 * across, 74 - 74 * up), (97 * across, 74 - 90 * up)], side), INK, 4.5)


def draw_sweat(pen, mouth_y):
    pen.drop(MARK_X - 14, MARK_Y + 14, 10)


def draw_nose_bubble(pen, mouth_y):
    pen.oval(122, mouth_y, 14, 13, "#cdeeff", INK, 0, 3)
    pen.oval(117, mouth_y - 5, 4, 3, "white", None)


def draw_hearts(pen, mouth_y):
    for dx, dy, size in ((0, 0, 12), (15, 21, 8), (-156, 8, 10)):
        pen.heart(MARK_X + dx, MARK_Y + dy, size, "white")
    pen.heart(100, 150, 15)


def draw_chill(pen, mouth_y):
    for step in range(5):
        pen.stroke([(78 + 11 * step, 38), (78 + 11 * step, 56 - 3 * (step % 2))], "#5b6fb5", 4.5)
    for side in (-1, 1):
        for x in (78, 88):
            pen.stroke(smooth(mirror([(x, 120), (x + 5, 128), (x, 136), (x + 5, 144)], side)), INK, 3.5)


def draw_question_mark(pen, mouth_y):
    for dx, dy, size in ((4, -8, 1.0), (-148, -2, 0.7)):
        x, y = MARK_X + dx, MARK_Y + dy
        hook = [(-11, -10), (-6, -21), (6, -22), (12, -12), (5, -2), (0, 5), (0, 11)]
        pen.stroke(smooth([(x + size * px, y + size * py) for px, py in hook]), "#3b62c4", 7 * size)
        pen.oval(x, y + 22 * size, 4.5 * size, 4.5 * size, "#3b62c4", None)


def draw_no_mark(pen, mouth_y):
    pass


@dataclass(frozen=True)
class Mood:
    """How a mood shows on any character."""

    draw_eye: Callable
    draw_mouth: Callable
    draw_mark: Callable
    brows: tuple[Point, Point] | None  # for each eye the height of the inner and the outer end
    arms: tuple[tuple[Point, Point], tuple[Point, Point]]  # elbow and hand, counted outward from each shoulder
    ears: float  # how far the ears hang, 0 to 1
    beak: tuple[float, float]  # gape and curl, where the mouth is a beak


HIP, WAVE, CHEEK = ((24, 11), (5, 27)), ((26, 4), (46, -30)), ((24, 2), (21, -28))
MOODS = {
    "开心": Mood(draw_happy_eye, draw_happy_mouth, draw_sparkles, None, (WAVE, WAVE), 0, (13, -4)),
    "难过": Mood(draw_sad_eye, draw_sad_mouth, draw_no_mark, ((9, 0), (9, 0)), (((15, 14), (-13, 20)),) * 2, 1, (0, 6)),
    "生气": Mood(draw_angry_eye, draw_angry_mouth, draw_vein, ((-4, 8), (-4, 8)), (HIP, HIP), 0.6, (5, 5)),
    "惊讶": Mood(draw_amazed_eye, draw_amazed_mouth, draw_shock, ((9, 7), (9, 7)), (CHEEK, CHEEK), 0, (16, 2)),
    "无语": Mood(draw_dull_eye, draw_dull_mouth, draw_sweat, ((1, 1), (1, 1)), (((14, 14), (40, 6)),) * 2, 0.4, (0, 0)),
    "得意": Mood(draw_smug_eye, draw_smug_mouth, draw_no_mark, ((0, 1), (8, 9)), (HIP, WAVE), 0, (2, -5)),
    "犯困": Mood(draw_sleepy_eye, draw_sleepy_mouth, draw_nose_bubble, None, (((12, 14), (9, 30)),) * 2, 0.8, (2, 1)),
    "心动": Mood(draw_loving_eye, draw_loving_mouth, draw_hearts, None, (((18, 12), (-9, 10)),) * 2, 0, (6, -4)),
    "害怕": Mood(
        draw_scared_eye, draw_scared_mouth, draw_chill, ((11, 2), (11, 2)), (((22, 2), (4, -6)),) * 2, 0.9, (9, 7)
    ),
    "疑惑": Mood(
        draw_puzzled_eye, draw_puzzled_mouth, draw_question_mark, ((0, 3), (9, 13)), (CHEEK, HIP), 0.2, (3, 2)
    ),
}


# ---- Characters ----


def draw_torso(pen: Pen, skin: str, belly: str, feet: str) -> None:
    for side in (-1, 1):
        pen.oval(100 + side * 18, 188, 16, 9, feet)
    pen.blob([(74, 128), (126, 128), (136, 170), (118, 189), (82, 189), (64, 170)], skin)
    pen.oval(100, 162, 22, 21, belly, None)


def draw_head(pen: Pen, skin: str, wide: float = 62, high: float = 50) -> None:
    """A soft head, heavier at the cheeks."""
    half = [(wide * 0.72, 82 - high * 0.72), (wide, 90), (wide * 0.66, 82 + high * 0.88)]
    pen.blob([(100, 82 - high), *mirror(half, 1), (100, 82 + high), *mirror(half[::-1], -1)], skin)


def draw_cat(pen: Pen, skin: str, second: str, ears: float) -> None:
    pen.limb([(126, 178), (158, 176), (164, 150), (176, 142)], skin, 12)
    draw_torso(pen, skin, second, skin)
    for side in (-1, 1):
        tip = (58 + 12 * ears, 16 + 32 * ears)
        pen.shape(mirror([(14, 48), tip, (60, 78)], side), skin)
        pen.shape(mirror([(27, 50), (tip[0] - 5, tip[1] + 12), (54, 68)], side), "#ffb3b3", None)
    draw_head(pen, skin)
    pen.oval(100, 108, 26, 16, second, None)
    for x, length in ((88, 13), (100, 18), (112, 13)):
        pen.stroke([(x, 37), (x, 37 + length)], "#7d4a2d", 5)
    for side in (-1, 1):
        for dy in (0, 9):
            pen.stroke(mirror([(50, 100 + dy), (76, 97 + dy * 1.6)], side), INK, 2.5)
    pen.blob([(94, 96), (106, 96), (100, 102)], "#e8707a", INK, 2.5)


def draw_panda(pen: Pen, skin: str, second: str, ears: float) -> None:
    draw_torso(pen, skin, skin, second)
    for side in (-1, 1):
        pen.oval(100 + side * (45 + 6 * ears), 40 + 8 * ears, 18, 18, second)
    draw_head(pen, skin, 64)
    for side in (-1, 1):
        pen.oval(100 + side * 27, 84, 17, 22, second, None, side * 28)
    pen.oval(100, 99, 7, 5, second)


def draw_parrot(pen: Pen, skin: str, second: str, ears: float) -> None:
    for x, color in ((134, second), (146, "#4d8fe0")):
        pen.limb([(118, 176), (x, 190), (x + 16, 192)], color, 11)
    draw_torso(pen, skin, "#fff3c4", "#ffb833")
    for angle, x in ((-28, 88), (28, 112), (0, 100)):
        pen.oval(x, 30 + 6 * ears + abs(angle) / 7, 8, 20, second, INK, angle - 34 * ears)
    draw_head(pen, skin, 56)
    for side in (-1, 1):
        pen.oval(100 + side * 25, 80, 22, 24, "#fffbe8", None)


def draw_bun(pen: Pen, skin: str, second: str, ears: float) -> None:
    for side in (-1, 1):
        pen.oval(100 + side * 24, 160, 16, 9, second)
    half = [(16, 22), (52, 42), (82, 92), (74, 138), (40, 158)]
    pen.blob([*mirror(half, 1), *mirror(half[::-1], -1)], skin)
    for side in (-1, 1):
        for top, bottom in (((9, 27), (18, 52)), ((17, 31), (40, 54)), ((22, 34), (57, 68))):
            bend = ((top[0] + bottom[0]) / 2 + 5, (top[1] + bottom[1]) / 2 - 3)
            pen.stroke(smooth(mirror([top, bend, bottom], side)), "#b79a78", 3.5)
    pen.blob([(86, 27), (92, 14), (104, 8), (114, 20), (114, 28), (100, 33)], skin)
    pen.stroke(smooth([(94, 26), (98, 18), (106, 20), (104, 26)]), "#b79a78", 3)


def draw_frog(pen: Pen, skin: str, second: str, ears: float) -> None:
    draw_torso(pen, skin, second, skin)
    for side in (-1, 1):
        pen.oval(100 + side * 34, 46, 25, 24, skin)
    draw_head(pen, skin, 72, 42)
    for side in (-1, 1):
        # The same eye socket again, without its outline, melts the socket into the head.
        pen.oval(100 + side * 34, 48, 22, 22, skin, None)
        pen.oval(100 + side * 6, 86, 1.8, 1.8, INK, None)


def draw_rabbit(pen: Pen, skin: str, second: str, ears: float) -> None:
    pen.oval(140, 172, 12, 12, skin)
    draw_torso(pen, skin, "white", skin)
    for side in (-1, 1):
        # Hanging ears are drawn as a bent limb, because a turned oval would leave the head.
        ear = mirror([(22, 48), (27 + 9 * ears, 10 + 8 * ears), (32 + 44 * ears, -20 + 72 * ears)], side)
        pen.limb(ear, skin, 21)
        pen.stroke(smooth(ear), second, 9)
    draw_head(pen, skin, 60)
    pen.blob([(95, 96), (105, 96), (100, 101)], "#e8707a", INK, 2.5)


def draw_dog(pen: Pen, skin: str, second: str, ears: float) -> None:
    pen.limb([(126, 176), (150, 160), (156, 140)], skin, 13)
    draw_torso(pen, skin, second, skin)
    draw_head(pen, skin, 60)
    for side in (-1, 1):
        ear = mirror([(44, 50), (66, 56 + 8 * ears), (68, 84 + 20 * ears)], side)
        pen.limb(ear, INK, 24)
        pen.limb(ear, second, 18)
    pen.oval(100, 106, 27, 18, "#fff6e8", None)
    pen.oval(100, 97, 9, 6.5, INK, None)


def draw_duck(pen: Pen, skin: str, second: str, ears: float) -> None:
    draw_torso(pen, skin, "#fff8dc", second)
    for x, angle in ((94, -20), (108, 18)):
        pen.oval(x, 30 + 5 * ears, 5, 14, skin, INK, angle - 30 * ears)
    draw_head(pen, skin, 58, 48)


def draw_bear(pen: Pen, skin: str, second: str, ears: float) -> None:
    draw_torso(pen, skin, second, skin)
    for side in (-1, 1):
        x, y = 100 + side * (46 + 5 * ears), 44 + 8 * ears
        pen.oval(x, y, 17, 17, skin)
        pen.oval(x, y, 9, 9, second, None)
    draw_head(pen, skin, 62)
    pen.oval(100, 107, 24, 17, second, None)
    pen.oval(100, 98, 8, 5.5, INK, None)


def draw_penguin(pen: Pen, skin: str, second: str, ears: float) -> None:
    draw_torso(pen, skin, "white", second)
    draw_head(pen, skin, 60)
    for side in (-1, 1):
        pen.oval(100 + side * 23, 84, 27, 30, "white", None)
    pen.oval(100, 104, 40, 22, "white", None)


def draw_pig(pen: Pen, skin: str, second: str, ears: float) -> None:
    pen.stroke(smooth([(136, 172), (150, 166), (146, 156), (156, 152)]), second, 6)
    draw_torso(pen, skin, second, skin)
    for side in (-1, 1):
        pen.shape(mirror([(20, 44), (52 + 14 * ears, 26 + 30 * ears), (58, 70)], side), skin)
    draw_head(pen, skin, 66, 48)
    pen.oval(100, 98, 17, 10, second)
    for x in (94, 106):
        pen.oval(x, 98, 3, 4.5, INK, None)


def draw_potato(pen: Pen, skin: str, second: str, ears: float) -> None:
    for side in (-1, 1):
        pen.oval(100 + side * 22, 182, 15, 8, second)
    pen.blob([(104, 24), (150, 48), (160, 104), (148, 158), (100, 182), (52, 160), (38, 108), (54, 50)], skin)
    for x, y in ((66, 60), (134, 70), (60, 140), (138, 146), (112, 168), (86, 42)):
        pen.oval(x, y, 4, 2.5, second, None)
    pen.blob([(104, 26), (98 - 8 * ears, 8 + 6 * ears), (112, 12), (118, 4 + 8 * ears), (114, 24)], "#6bbf59", INK, 3)


@dataclass(frozen=True)
class Character:
    """A figure and where the parts of its face sit, in units."""

    unit: str  # the Chinese counting word
    draw: Callable
    skins: tuple[tuple[str, str], ...]  # skin and second colour
    eye: tuple[float, float, float]  # distance from the middle, height, size
    mouth: tuple[float, float]  # height, half width
    shoulder: tuple[float, float] = (29, 143)
    brow_gap: float = 9
    eye_ink: str = INK
    has_beak: bool = False
    arm: str | None = None  # colour, where it is not the skin's


CHARACTERS = {
    "小猫": Character(
        "只",
        draw_cat,
        (("#f9b45c", "#fff1d6"), ("#b9bcc6", "#f5f5f5"), ("#fff6e8", "#ffe3c2")),
        (27, 80, 13),
        (106, 15),
    ),
    "熊猫": Character(
        "只",
        draw_panda,
        (("#ffffff", "#2b2320"), ("#ffffff", "#4a4048")),
        (26, 82, 12),
        (108, 15),
        eye_ink="white",
        arm="#3a3133",
    ),
    "鹦鹉": Character(
        "只",
        draw_parrot,
        (("#62c370", "#f2605a"), ("#5ab9ea", "#f7d046"), ("#f2605a", "#f7d046")),
        (25, 78, 13),
        (103, 0),
        has_beak=True,
    ),
    "包子": Character(
        "个", draw_bun, (("#fff8ec", "#f3dfc1"), ("#ffeccf", "#e9c79b")), (29, 91, 15), (114, 17), (72, 122)
    ),
    "青蛙": Character(
        "只", draw_frog, (("#8ccf5a", "#f1f7c8"), ("#5fb88f", "#eef7d9")), (34, 47, 15), (97, 32), brow_gap=4
    ),
    "兔子": Character(
        "只",
        draw_rabbit,
        (("#ffffff", "#ffb9c4"), ("#ffd9e0", "#ff9fb0"), ("#d9c3b0", "#f5b5a8")),
        (25, 81, 12),
        (107, 13),
    ),
    "小狗": Character(
        "只",
        draw_dog,
        (("#f2d3a2", "#a8703f"), ("#ffffff", "#5b4a45"), ("#c99a6b", "#6e4527")),
        (25, 78, 12),
        (108, 13),
    ),
    "鸭子": Character(
        "只", draw_duck, (("#ffe05c", "#ff9f2e"), ("#fffdf2", "#ffb02e")), (25, 76, 12), (101, 0), has_beak=True
    ),
    "小熊": Character(
        "只",
        draw_bear,
        (("#b07a4b", "#ecd2ae"), ("#8a5a3c", "#d9b88f"), ("#e8e3dc", "#ffffff")),
        (26, 78, 11),
        (107, 12),
    ),
    "企鹅": Character(
        "只",
        draw_penguin,
        (("#3b4a63", "#ff9f2e"), ("#2f2f38", "#ffb02e"), ("#5b86c9", "#ff8f2e")),
        (24, 80, 12),
        (102, 0),
        has_beak=True,
    ),
    "小猪": Character("只", draw_pig, (("#ffc1cf", "#f593aa"), ("#ffd9d2", "#f2a08f")), (29, 78, 12), (113, 13)),
    "土豆": Character(
        "颗", draw_potato, (("#e3bd7a", "#b88a45"), ("#cfa062", "#94683a")), (27, 88, 14), (112, 16), (58, 124)
    ),
}


# ---- Props: what a figure wears or holds ----


def draw_cap(pen):
    pen.blob([(62, 44), (72, 20), (100, 10), (128, 20), (138, 44)], "#e2504c")
    pen.limb([(60, 45), (100, 40), (152, 48)], "#e2504c", 8)


def draw_bow(pen):
    for side in (-1, 1):
        pen.blob([(130, 36), (130 + side * 20, 22), (130 + side * 22, 50)], "#ff6fa5", INK, 3)
    pen.oval(130, 36, 6, 6, "#ff6fa5", INK, width=3)


def draw_scarf(pen):
    pen.limb([(62, 130), (100, 138), (138, 130)], "#3f7fd1", 13)
    pen.limb([(122, 136), (128, 164)], "#3f7fd1", 12)


def draw_flower(pen):
    for step in range(5):
        angle = step * 2 * math.pi / 5
        pen.oval(60 + 11 * math.cos(angle), 40 + 11 * math.sin(angle), 8, 8, "#e63946", INK, width=2.5)
    pen.oval(60, 40, 6, 6, "#ffd23f", None)


def draw_milk_tea(pen):
    pen.stroke([(28, 122), (36, 96)], "#7b4fb0", 6)
    pen.shape([(12, 124), (50, 124), (44, 174), (18, 174)], "#e8c39a")
    pen.shape([(8, 116), (54, 116), (54, 126), (8, 126)], "white")
    for x, y in ((24, 164), (34, 166), (29, 154), (38, 156)):
        pen.oval(x, y, 4, 4, INK, None)


def draw_balloon(pen):
    pen.stroke(smooth([(20, 60), (26, 100), (40, 140)]), INK, 3)
    pen.oval(18, 32, 24, 29, "#4dabf7")
    pen.oval(10, 22, 5, 8, "white", None, 20)


PROPS = {
    "戴着帽子": draw_cap,
    "戴着蝴蝶结": draw_bow,
    "围着围巾": draw_scarf,
    "戴着小红花": draw_flower,
    "拿着奶茶": draw_milk_tea,
    "拿着气球": draw_balloon,
}


def draw_glasses(pen: Pen, eye: tuple[float, float, float]) -> None:
    gap, y, size = eye
    pen.stroke([(100 - gap - size - 12, y - 7), (100 + gap + size + 12, y - 7)], INK, 5)
    for side in (-1, 1):
        wide = size + 6
        pen.blob(
            mirror(
                [
                    (gap - wide, y - 9),
                    (gap + wide, y - 9),
                    (gap + wide - 3, y + 8),
                    (gap, y + 13),
                    (gap - wide + 3, y + 8),
                ],
                side,
            ),
            "#1d1a24",
        )
        pen.stroke([(100 + side * gap - 7, y + 4), (100 + side * gap + 2, y - 5)], "#8f8aa8", 4)


def draw_face(pen: Pen, figure: Character, mood: Mood, has_glasses: bool) -> None:
    gap, eye_y, size = figure.eye
    mouth_y, mouth_wide = figure.mouth
    for side in (-1, 1):
        pen.oval(100 + side * (gap + 15), mouth_y - 3, 9, 6, BLUSH, None)
        if not has_glasses:
            mood.draw_eye(pen, 100 + side * gap, eye_y, size, side, figure.eye_ink)
        if mood.brows:
            inner, outer = mood.brows[side > 0]
            base = eye_y - size - figure.brow_gap
            pen.stroke(mirror([(gap - 10, base - inner), (gap + 10, base - outer)], side), INK, 6)
    if has_glasses:
        draw_glasses(pen, figure.eye)
    if figure.has_beak:
        draw_beak(pen, mouth_y, *mood.beak)
    else:
        mood.draw_mouth(pen, mouth_y, mouth_wide)


def draw_figure(
    figure: Character, mood: Mood, skin: tuple[str, str], has_glasses: bool = False, prop: str | None = None
) -> Image.Image:
    """The whole character on a transparent ground, cut to its edges; `prop` is a key of PROPS."""
    side_length = (200 + 2 * MARGIN) * UNIT
    layer = Image.new("RGBA", (side_length, side_length))
    pen = Pen(layer, UNIT, MARGIN)
    figure.draw(pen, *skin, mood.ears)
    draw_face(pen, figure, mood, has_glasses)
    x, y = figure.shoulder
    for side, (elbow, hand) in zip((-1, 1), mood.arms, strict=True):
        points = mirror([(x, y), (x + elbow[0], y + elbow[1]), (x + hand[0], y + hand[1])], side)
        pen.limb(points, figure.arm or skin[0])
    mood.draw_mark(pen, figure.mouth[0])
    if prop is not None:
        PROPS[prop](pen)
    return layer.crop(layer.getbbox())
