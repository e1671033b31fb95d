"""Every bad file and record is found, by its right name, and no other record is blamed for it."""

import io
import json
import os
import random
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from make_towers import train_tokenizer
from PIL import Image

from meme_llava.dataset.check import CheckedData, check_data, stop_on_bad_records, write_quarantine
from meme_llava.dataset.conversation import ConversationEncoder
from meme_llava.dataset.findings import BAD_KINDS, KINDS, UNTRAINABLE, RecordPolicy
from meme_llava.dataset.inspection import check_image, inspect_image
from meme_llava.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

QUESTION = "<image>\n图里写了什么？"
ANSWER = "图里的猫举着牌子，写着“好耶”，很开心。"
MAX_LENGTH = 4000
# What Qwen2.5 adds to its tokenizer beyond ChatML, not flagged as special there.
ADDED_TOKENS = ["<tool_call>", "</tool_call>"]
ADDED_SPECIAL_TOKENS = ["<image>", "<|vision_start|>", "<|object_ref_start|>"]


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    tokenizer = train_tokenizer([QUESTION, ANSWER])
    tokenizer.add_tokens(ADDED_SPECIAL_TOKENS, special_tokens=True)
    tokenizer.add_tokens(ADDED_TOKENS)
    return ConversationEncoder(tokenizer, 4, source="test")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        draw_dot(color).save(folder / f"{name}.png")
    return folder


def draw_dot(color: tuple[int, int, int]) -> Image.Image:
    """A dot on a ground; without it the image would be of one colour."""
    image = Image.new("RGB", (100, 80), color)
    image.putpixel((50, 40), (0, 0, 0))
    return image


@pytest.fixture(autouse=True)
def must_not_block():
    # Opening a pipe nobody writes to waits for ever; the alarm turns that into a failure.
    def fail(*_):
        raise AssertionError("still waiting for a file after 60 seconds")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)


def make_record(
    record_id: str = "bad", image="blue.png", answer: str = ANSWER, question: str = QUESTION, **more
) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns, **more}


def make_neighbour(number: int) -> dict:
    """A good record; every one says something else."""
    return make_record(f"good {number}", "red.png", f"图里的红色背景上写着第{number}号，很喜庆。")


def write_lines(path: Path, values: list) -> Path:
    """A JSONL file of values; a string is a line as it stands."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def check(tmp_path: Path, values: list, encoder=None, decode=True, workers=None, **policy) -> CheckedData:
    annotations = write_lines(tmp_path / "memes.jsonl", values)
    return check_data(annotations, tmp_path / "images", RecordPolicy(**policy), encoder, MAX_LENGTH, decode, workers)


def list_kinds(checked: CheckedData, line: int) -> list[str]:
    return [finding.kind for finding in checked.findings if finding.place == f"memes.jsonl line {line}"]


def list_usable(checked: CheckedData) -> list[str]:
    return [record.record.record_id for record in checked.usable]


def is_bad(kinds: set[str]) -> bool:
    return any(kind in BAD_KINDS for kind in kinds)


# ---- Files, one by one ----


def make_noise(width: int = 100, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_noise(format: str, mode: str = "RGB", size: tuple[int, int] = (100, 80), **options) -> bytes:
    return encode(make_noise(*size).convert(mode), format, **options)


def cut(format: str, share: float) -> bytes:
    content = encode_noise(format)
    return content[: int(len(content) * share)]


def animate(format: str) -> bytes:
    frames = [make_noise(seed=seed) for seed in (1, 2, 3)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100)


def make_png(width: int, height: int, depth: int, color_type: int, rows: bytes, *chunks) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    extra = b"".join(chunk(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def make_deep_png(color_type: int, channels: int, *chunks) -> bytes:
    rows = np.random.default_rng(0).integers(0, 256, (80, 1 + 200 * channels), dtype=np.uint8)
    rows[:, 0] = 0  # the filter of every row
    return make_png(100, 80, 16, color_type, rows.tobytes(), *chunks)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def rotate(format: str, orientation) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_noise(format, exif=exif)


def make_exif(*entries: bytes) -> bytes:
    """An EXIF block by hand; the value of an entry that does not fit into it stands behind the entries."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(40)


ORIENTATION_6 = struct.pack("<HHII", 0x0112, 3, 1, 6)
ORIENTATION_AS_TEXT = struct.pack("<HHI4s", 0x0112, 2, 4, b"top\0")
# ImageDescription is text; a fraction in its place broke the rewriting of the tags when the image was turned.
DESCRIPTION_AS_FRACTION = struct.pack("<HHII", 0x010E, 5, 1, 38)
DESCRIPTION_BEHIND_THE_END = struct.pack("<HHII", 0x010E, 2, 5000, 38)
GIF_BOMB = (
    b"GIF89a"
    + struct.pack("<HHBBB", 20000, 20000, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 20000, 20000, 0)
    + b"\x08\0"
)
BMP_BOMB = (
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 20000, 20000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)
)


def make_webp_bomb() -> bytes:
    """An animation of which the canvas is said to be 7,200 x 7,200."""
    content = bytearray(animate("WEBP"))
    assert content[12:16] == b"VP8X"
    content[24:30] = (7199).to_bytes(3, "little") * 2
    return bytes(content)


def make_keyed_palette(**options) -> bytes:
    return encode(make_noise().quantize(16), "PNG", **options)


# What the file holds, the name it has, and the findings about a record that shows it.
FILES = {
    # Damaged in transfer.
    **{
        f"{format} cut to {share:.0%}": (cut(format, share), f"a.{extension}", {"damaged_image"})
        for format, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"))
        for share in (0.02, 0.3, 0.6, 0.95)
    },
    "JPEG of 3 bytes": (b"\xff\xd8\xff", "a.jpg", {"damaged_image"}),
    "JPEG of 20 bytes": (encode_noise("JPEG")[:20], "a.jpg", {"damaged_image"}),
    "PNG of its mark alone": (encode_noise("PNG")[:8], "a.png", {"damaged_image"}),
    "JPEG without its end": (encode_noise("JPEG")[:-2], "a.jpg", {"damaged_image"}),
    "PNG with a flipped bit in its pixels": (flip(encode_noise("PNG"), 9000), "a.png", {"damaged_image"}),
    "PNG with a flipped bit in its header": (flip(encode_noise("PNG"), 18), "a.png", {"damaged_image"}),
    "PNG with indices and no palette": (make_png(80, 80, 8, 3, bytes(81 * 80)), "a.png", {"damaged_image"}),
    "PNG of no width": (make_png(0, 80, 8, 2, b""), "a.png", {"damaged_image"}),
    "GIF with a broken second frame": (
        encode_noise("GIF")[:-1] + b",\0\0",
        "a.gif",
        {"palette", "damaged_animation"},
    ),
    "empty": (b"", "a.jpg", {"empty_file"}),
    # No image at all.
    "web page": (b"<!DOCTYPE html><html>404</html>", "a.jpg", {"not_an_image"}),
    "web page, lower case": (b"<!doctype html>\n<title>403</title>", "a.png", {"not_an_image"}),
    "web page without doctype": (b"<HTML><BODY>gone</BODY></HTML>", "a.gif", {"not_an_image"}),
    "web page with a byte order mark": (b"\xef\xbb\xbf<!DOCTYPE html>", "a.webp", {"not_an_image"}),
    "web page behind blanks": (b"\r\n  \t<html>", "a.jpg", {"not_an_image"}),
    "JSON error": (b'{"code": 403, "message": "hotlinking"}', "a.jpg", {"not_an_image"}),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png", {"not_an_image"}),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a.jpg", {"not_an_image"}),
    "zip": (b"PK\x03\x04" + bytes(60), "a.jpg", {"not_an_image"}),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "a.png", {"not_an_image"}),
    "PDF": (b"%PDF-1.7\n%", "a.jpg", {"not_an_image"}),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage", "a.jpg", {"not_an_image"}),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.jpg", {"not_an_image"}),
    "random bytes": (bytes(range(200, 256)) * 9, "a.jpg", {"not_an_image"}),
    "text": ("图片".encode(), "a.jpg", {"not_an_image"}),
    # Images that stay closed.
    "PSD": (b"8BPS\0\x01" + bytes(40), "a.psd", {"unaccepted_format"}),
    "TIFF": (encode_noise("TIFF"), "a.jpg", {"unaccepted_format"}),
    "TIFF of a Motorola": (b"MM\0*" + bytes(40), "a.tif", {"unaccepted_format"}),
    "AVIF": (b"\0\0\0\x20ftypavif" + bytes(40), "a.avif", {"unaccepted_format"}),
    "HEIF of an iPhone": (b"\0\0\0\x24ftypheic" + bytes(40), "IMG_1.HEIC", {"unaccepted_format"}),
    "HEIF": (b"\0\0\0\x24ftypmif1" + bytes(40), "a.jpg", {"unaccepted_format"}),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a.jp2", {"unaccepted_format"}),
    "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a.jxl", {"unaccepted_format"}),
    "JPEG XL without a box": (b"\xff\x0a" + bytes(40), "a.jpg", {"unaccepted_format"}),
    "ICO": (b"\0\0\x01\0\x01\0" + bytes(40), "a.ico", {"unaccepted_format"}),
    # Names that mislead.
    "JPEG called .png": (encode_noise("JPEG"), "a.png", {"wrong_extension"}),
    "PNG called .jpg": (encode_noise("PNG"), "a.jpg", {"wrong_extension"}),
    "GIF called .png": (encode_noise("GIF"), "a.png", {"wrong_extension", "palette"}),
    "WebP called .jpg": (encode_noise("WEBP"), "a.jpg", {"wrong_extension"}),
    "BMP called .gif": (encode_noise("BMP"), "a.gif", {"wrong_extension"}),
    "PNG called .txt": (encode_noise("PNG"), "a.txt", {"wrong_extension"}),
    "PNG without extension": (encode_noise("PNG"), "meme", {"wrong_extension"}),
    # Images that are taken in a way one should know of.
    "animated GIF": (animate("GIF"), "a.gif", {"animated", "palette"}),
    "animated WebP": (animate("WEBP"), "a.webp", {"animated"}),
    "animated PNG": (animate("PNG"), "a.png", {"animated"}),
    "CMYK": (encode_noise("JPEG", "CMYK"), "a.jpg", {"cmyk"}),
    "16-bit grey": (make_deep_png(0, 1), "a.png", {"sixteen_bit"}),
    "16-bit colour": (make_deep_png(2, 3), "a.png", {"sixteen_bit"}),
    "16-bit grey with alpha": (make_deep_png(4, 2), "a.png", {"sixteen_bit", "transparent"}),
    "16-bit grey with a transparent value": (
        make_deep_png(0, 1, (b"tRNS", b"\0\0")),
        "a.png",
        {"sixteen_bit", "transparent"},
    ),
    "palette": (make_keyed_palette(), "a.png", {"palette"}),
    "palette with alphas": (make_keyed_palette(transparency=bytes(range(16))), "a.png", {"palette", "transparent"}),
    "palette with a transparent entry": (make_keyed_palette(transparency=3), "a.png", {"palette", "transparent"}),
    "transparent GIF": (encode(make_noise().quantize(16), "GIF", transparency=0), "a.gif", {"palette", "transparent"}),
    "grey with alpha": (encode_noise("PNG", "LA"), "a.png", {"transparent"}),
    "colour with alpha": (encode_noise("PNG", "RGBA"), "a.png", {"transparent"}),
    "WebP with alpha": (
        encode(Image.new("RGBA", (80, 80), (1, 2, 3, 4)), "WEBP"),
        "a.webp",
        {"transparent", "one_colour"},
    ),
    "transparent colour key": (encode_noise("PNG", transparency=(1, 2, 3)), "a.png", {"transparent"}),
    **{f"orientation {tag}": (rotate("JPEG", tag), "a.jpg", {"exif_rotation"}) for tag in range(2, 9)},
    "orientation in a PNG": (rotate("PNG", 6), "a.png", {"exif_rotation"}),
    "orientation in a WebP": (rotate("WEBP", 8), "a.webp", {"exif_rotation"}),
    "orientation beside a broken tag": (
        encode_noise("JPEG", exif=make_exif(ORIENTATION_6, DESCRIPTION_AS_FRACTION)),
        "a.jpg",
        {"exif_rotation"},
    ),
    "a tag that leads out of the EXIF block": (
        encode_noise("JPEG", exif=make_exif(DESCRIPTION_BEHIND_THE_END)),
        "a.jpg",
        {"broken_exif"},
    ),
    "broken EXIF": (encode_noise("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), "a.jpg", {"broken_exif"}),
    # Sizes.
    "1x1": (encode_noise("PNG", size=(1, 1)), "a.png", {"too_small", "one_colour"}),
    "3x100": (encode_noise("PNG", size=(3, 100)), "a.png", {"too_small", "stretched_shape"}),
    "3x300": (encode_noise("PNG", size=(3, 300)), "a.png", {"too_small", "extreme_shape"}),
    "2x4000": (encode_noise("PNG", size=(2, 4000)), "a.png", {"too_small", "extreme_shape"}),
    "51 to 1": (encode_noise("PNG", size=(64 * 51, 64)), "a.png", {"extreme_shape"}),
    "50 to 1": (encode_noise("PNG", size=(64 * 50, 64)), "a.png", {"stretched_shape"}),
    "5 to 1": (encode_noise("PNG", size=(400, 80)), "a.png", {"stretched_shape"}),
    "1 to 5, turned": (encode_noise("PNG", size=(80, 401)), "a.png", {"stretched_shape"}),
    "63x63": (encode_noise("PNG", size=(63, 63)), "a.png", {"low_resolution"}),
    "4x4": (encode_noise("PNG", size=(4, 4)), "a.png", {"low_resolution"}),
    "PNG bomb": (make_png(20000, 20000, 1, 0, b""), "a.png", {"too_many_pixels"}),
    "PNG of 7100x7100": (make_png(7100, 7100, 1, 0, b""), "a.png", {"too_many_pixels"}),
    "GIF bomb": (GIF_BOMB, "a.gif", {"too_many_pixels"}),
    "BMP bomb": (BMP_BOMB, "a.bmp", {"too_many_pixels"}),
    "WebP bomb": (make_webp_bomb(), "a.webp", {"too_many_pixels"}),
    "another file's bytes": (encode(draw_dot((255, 0, 0)), "PNG"), "a.png", {"duplicate_image"}),
    # One colour.
    "white JPEG": (encode(Image.new("RGB", (100, 80), "white"), "JPEG"), "a.jpg", {"one_colour"}),
    "GIF that begins with a plain frame": (
        encode(
            Image.new("P", (100, 80)), "GIF", save_all=True, append_images=[make_noise().quantize(16)], duration=100
        ),
        "a.gif",
        {"one_colour", "animated", "palette"},
    ),
    "wholly transparent": (
        encode(Image.merge("RGBA", (*make_noise().split(), Image.new("L", (100, 80)))), "PNG"),
        "a.png",
        {"one_colour", "transparent"},
    ),
    # Nothing to find.
    **{
        f"a sound {format}": (encode_noise(format), f"a.{extension}", set())
        for format, extension in (("JPEG", "jpg"), ("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "webp"), ("BMP", "bmp"))
    },
    "4 to 1": (encode_noise("PNG", size=(320, 80)), "a.png", set()),
    "64x64": (encode_noise("PNG", size=(64, 64)), "a.png", set()),
    "grey JPEG": (encode_noise("JPEG", "L"), "a.jpg", set()),
    "black and white": (encode_noise("PNG", "1"), "a.png", set()),
    "progressive JPEG": (encode_noise("JPEG", progressive=True), "a.jpg", set()),
    "JPEG with bytes behind its end": (encode_noise("JPEG") + bytes(48), "a.jpg", set()),
    "JPEG of a phone, with a preview behind it": (animate("MPO"), "a.jpg", set()),
    "orientation 1": (rotate("JPEG", 1), "a.jpg", set()),
    "orientation 0": (rotate("JPEG", 0), "a.jpg", set()),
    "orientation 9": (rotate("JPEG", 9), "a.jpg", set()),
    "orientation as text": (encode_noise("JPEG", exif=make_exif(ORIENTATION_AS_TEXT)), "a.jpg", set()),
    **{
        f"the name {name!r}": (encode_noise("PNG"), name, set())
        for name in ("表情包😀.png", "a b.png", "a\nb.png", 'it\'s "a".png', "%2e.png", "<b>.png", "a.b..png", "-.png")
    },
}


def check_between_good_ones(tmp_path, value, encoder=None, **options) -> CheckedData:
    """A value between two good records; all that must hold whatever the value is."""
    checked = check(tmp_path, [make_neighbour(1), value, make_neighbour(2)], encoder, **options)
    expected_id = value.get("id", "?") if isinstance(value, dict) else "?"
    for finding in checked.findings:
        assert (finding.place, finding.record_id) == ("memes.jsonl line 2", str(expected_id))
        assert finding.detail
    assert len(checked.usable) + len(checked.bad) == 3
    assert {"good 1", "good 2"} <= set(list_usable(checked))
    return checked


@pytest.mark.parametrize("content, name, expected", FILES.values(), ids=FILES)
def test_a_file_is_found_out_and_its_neighbours_are_not_blamed(tmp_path, image_folder, content, name, expected):
    (image_folder / name).write_bytes(content)
    checked = check_between_good_ones(tmp_path, make_record(image=name))
    assert set(list_kinds(checked, 2)) == expected
    assert len(checked.usable) == (2 if is_bad(expected) else 3)
    # The details name the file, and no other.
    assert all(str(image_folder / name) in finding.detail for finding in checked.findings)
    # What train.py sees of it without decoding is less, and nothing else.
    glance = check_between_good_ones(tmp_path, make_record(image=name), decode=False)
    assert set(list_kinds(glance, 2)) <= expected
    if not is_bad(expected):
        assert len(glance.usable) == 3


def test_all_files_at_once_are_found_out_each_for_itself(tmp_path, image_folder):
    values = [make_neighbour(0)]
    for number, (content, name, _) in enumerate(FILES.values()):
        (image_folder / str(number)).mkdir()
        (image_folder / str(number) / name).write_bytes(content)
        values += [make_record(f"file {number}", f"{number}/{name}"), make_neighbour(number + 1)]
    checked = check(tmp_path, values, workers=2)
    # Some entries of the table hold the same bytes as others; alone they do not.
    found = [set(list_kinds(checked, 2 * number + 2)) - {"duplicate_image"} for number in range(len(FILES))]
    expected = [kinds - {"duplicate_image"} for _, _, kinds in FILES.values()]
    assert dict(zip(FILES, found, strict=True)) == dict(zip(FILES, expected, strict=True))
    assert all(list_kinds(checked, line) == [] for line in range(1, len(values) + 1, 2))
    assert len(checked.usable) + len(checked.bad) == len(values)
    assert [checked.counts[kind] for kind in checked.counts] == [
        sum(finding.kind == kind for finding in checked.findings) for kind in KINDS if kind in checked.counts
    ]


def make_unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.write_bytes(encode_noise("PNG"))
    path.chmod(0)


def link_out(path: Path) -> None:
    (path.parent.parent / "outside.png").write_bytes(encode_noise("PNG"))
    path.symlink_to(path.parent.parent / "outside.png")


PLACES = {
    "missing": (lambda path: None, "a.png", {"missing_image"}),
    "another case": (
        lambda path: path.with_name("A.PNG").write_bytes(encode_noise("PNG")),
        "a.png",
        {"missing_image"},
    ),
    "a directory": (Path.mkdir, "a.png", {"unreadable_file"}),
    "the folder itself": (lambda path: None, ".", {"unreadable_file"}),
    "a pipe": (os.mkfifo, "a.png", {"unreadable_file"}),
    "without permission": (make_unreadable, "a.png", {"unreadable_file"}),
    "a name too long": (lambda path: None, "图" * 100 + ".png", {"unreadable_file"}),
    "a dangling link": (lambda path: path.symlink_to("gone.png"), "a.png", {"missing_image"}),
    "a link to itself": (lambda path: path.symlink_to("a.png"), "a.png", {"unsafe_path"}),
    "a link out of the folder": (link_out, "a.png", {"unsafe_path"}),
    "below a file": (lambda path: None, "red.png/a.png", {"missing_image"}),
    "above the folder": (lambda path: None, "../a.png", {"unsafe_path"}),
    "above the folder, round a corner": (lambda path: None, "x/../../a.png", {"unsafe_path"}),
    "absolute": (lambda path: None, "/etc/passwd", {"unsafe_path"}),
    "a URL": (lambda path: None, "https://host/a.png", {"unsafe_path"}),
    "a file URL": (lambda path: None, "file:///a.png", {"unsafe_path"}),
    "backslashes": (lambda path: None, "x\\a.png", {"unsafe_path"}),
    "NUL": (lambda path: None, "a\0.png", {"unsafe_path"}),
    "half a character": (lambda path: None, "\ud83d.png", {"missing_image"}),
    "composed, stored decomposed": (
        lambda path: path.with_name("cafe\u0301.png").write_bytes(encode_noise("PNG")),
        "caf\u00e9.png",
        {"missing_image"},
    ),
    "decomposed, stored composed": (
        lambda path: path.with_name("caf\u00e9.png").write_bytes(encode_noise("PNG")),
        "cafe\u0301.png",
        {"missing_image"},
    ),
    "in a folder of another case": (
        lambda path: path.with_name("Memes").mkdir(),
        "memes/a.png",
        {"missing_image"},
    ),
    "with a blank at its end": (
        lambda path: path.with_name("a.png ").write_bytes(encode_noise("PNG")),
        "a.png",
        {"missing_image"},
    ),
    "stored in GBK": (
        lambda path: path.with_name(os.fsdecode("表情.png".encode("gbk"))).write_bytes(encode_noise("PNG")),
        "表情.png",
        {"missing_image"},
    ),
    "decomposed in both": (
        lambda path: path.with_name("cafe\u0301.png").write_bytes(encode_noise("PNG")),
        "cafe\u0301.png",
        set(),
    ),
    "a link within the folder": (lambda path: path.symlink_to("blue.png"), "a.png", set()),
}


@pytest.mark.parametrize("make, image, expected", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("decode", [True, False])
def test_a_path_is_found_out_and_its_neighbours_are_not_blamed(tmp_path, image_folder, make, image, expected, decode):
    make(image_folder / "a.png")
    checked = check_between_good_ones(tmp_path, make_record(image=image), decode=decode)
    assert set(list_kinds(checked, 2)) == expected
    assert len(checked.usable) == (2 if expected else 3)


def test_a_name_that_the_locale_has_no_bytes_for_is_not_called_half_a_character(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    [finding] = check(tmp_path, [make_record(image="表情.png")]).findings
    assert finding.detail.endswith("has no name in iso8859-1, in which this system writes names; set PYTHONUTF8=1")


NEAR = {
    "another case": "'A.PNG', which differs in case",
    "in a folder of another case": "'Memes', which differs in case",
    "with a blank at its end": "'a.png ', which differs in white space at an end",
    "stored in GBK": r"'\udcb1\udced\udcc7\udce9.png', whose bytes are GBK; rename it, e.g. by convmv -f gbk -t utf-8",
    "composed, stored decomposed": "'cafe\u0301.png', which differs in its Unicode form, as names from macOS do",
    "decomposed, stored composed": "'caf\u00e9.png', which differs in its Unicode form, as names from macOS do",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_missing_image_names_what_is_spelt_nearly_so(tmp_path, image_folder, name):
    make, image, _ = PLACES[name]
    make(image_folder / "a.png")
    details = [finding.detail for finding in check(tmp_path, [make_record(image=image)]).findings]
    near = [detail.partition("; there is ")[2] for detail in details if "; there is " in detail]
    assert near == ([NEAR[name]] if name in NEAR else [])


# ---- Records, one by one ----


def turns(*texts: str, system: str | None = None) -> dict:
    roles = ["human", "gpt"] * len(texts)
    values = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"conversations": ([{"from": "system", "value": system}] if system is not None else []) + values}


def asked(answer: str, **more) -> dict:
    return make_record(answer=answer, **more)


def asked_without_image(question: str = "写了什么？", **more) -> dict:
    return {"id": "bad", **turns(question, ANSWER), **more}


LONG_WORDS = "".join(chr(0x4E00 + 7 * index) for index in range(1600))  # about 4,800 positions, no piece twice
COUNTED = "".join(f"喇叭是第{number}天的，而文字是未来的，可是谁也不知道未来的文字在哪里。" for number in range(10, 40))

RECORDS = {
    # No JSON.
    "cut off": ('{"id": "bad", "conversations": [', {"not_json"}),
    "Python": ("{'id': 'bad'}", {"not_json"}),
    "a trailing comma": ('{"id": "bad",}', {"not_json"}),
    "two records on a line": ('{"id": "a"} {"id": "b"}', {"not_json"}),
    "CSV": ("bad,blue.png,一只猫", {"not_json"}),
    "nested too deep": ("[" * 100_000, {"not_json"}),
    "a key twice": ('{"id": "bad", "image": "red.png", "image": "blue.png", "conversations": []}', {"repeated_key"}),
    "a key twice in a turn": (
        '{"id": "bad", "conversations": [{"from": "human", "value": "a", "value": "b"}]}',
        {"repeated_key"},
    ),
    # No record.
    "a number": ("7", {"malformed"}),
    "null": ("null", {"malformed"}),
    "not a number": ("NaN", {"malformed"}),
    "a list": ([1], {"malformed"}),
    "a JSON string": ('"hello"', {"malformed"}),
    "an empty object": ({}, {"malformed"}),
    "a caption file's line": ({"picName": "a.jpg", "description": "一只猫"}, {"malformed"}),
    "OpenAI's form": ({"messages": [{"role": "user", "content": "hi"}]}, {"malformed"}),
    "conversations null": (make_record(conversations=None), {"malformed"}),
    "conversations a string": (make_record(conversations="hi"), {"malformed"}),
    "conversations empty": (make_record(conversations=[]), {"malformed"}),
    "a turn that is text": (make_record(conversations=["hi"]), {"malformed"}),
    "a turn without speaker": (make_record(conversations=[{"value": "hi"}]), {"malformed"}),
    "speaker user": (make_record(conversations=[{"from": "user", "value": "hi"}]), {"malformed"}),
    "speaker a list": (make_record(conversations=[{"from": [], "value": "hi"}]), {"malformed"}),
    "answer null": (asked(None), {"malformed"}),
    "answer a number": (asked(5), {"malformed"}),
    "question in parts": (make_record(question=[{"type": "text", "text": "hi"}]), {"malformed"}),
    "image null": (make_record(image=None), {"malformed"}),
    "image empty": (make_record(image=""), {"malformed"}),
    "image an object": (make_record(image={"path": "blue.png"}), {"malformed"}),
    "images with a number": (make_record(image=["blue.png", 5]), {"malformed"}),
    "text a number": (make_record(text=5), {"malformed"}),
    "text of a million characters and one": (make_record(text="好" * 1_000_001), {"malformed"}),
    "task a list": (make_record(task=["read"]), {"malformed"}),
    "sources a name": (make_record(sources="web"), {"malformed"}),
    "repeat true": (make_record(repeat=True), {"malformed"}),
    "repeat a text": (make_record(repeat="2"), {"malformed"}),
    # Texts.
    "answer empty": (asked(""), {"empty_text"}),
    "answer of white space": (asked(" \n\u3000\t"), {"empty_text"}),
    **{
        f"answer of {what}": (asked(text), {"empty_text"})
        for what, text in {
            "zero-width characters": "\u200b\ufeff\u2060",
            "Hangul's filler": "\u3164",
            "Braille without dots": "\u2800\u2800",
            "a variation selector": "\ufe0f",
            "marks without a letter": "\u0301\u20dd",
            "control characters": "\x00\x1b\x7f",
        }.items()
    },
    "answer of a million characters and one": (asked("好" * 1_000_001), {"malformed"}),
    "question empty": (make_record(image=[], question=""), {"empty_text"}),
    "half a character in the answer": (asked("好\ud83d耶"), {"half_character"}),
    "half a character in the question": (make_record(question="<image>\udc00"), {"half_character"}),
    # Turns.
    "an answer first": (make_record(conversations=turns("a", "b")["conversations"][::-1]), {"bad_turn_order"}),
    "no answer": (make_record(**turns(QUESTION)), {"bad_turn_order"}),
    "a question left over": (make_record(**turns(QUESTION, ANSWER, "然后？")), {"bad_turn_order"}),
    "two answers": (
        make_record(conversations=[*turns(QUESTION, ANSWER)["conversations"], {"from": "gpt", "value": "好"}]),
        {"bad_turn_order"},
    ),
    "a system turn late": (
        make_record(conversations=[*turns(QUESTION, ANSWER)["conversations"], {"from": "system", "value": "好"}]),
        {"bad_turn_order"},
    ),
    # Placeholders.
    "an image without its place": (make_record(question="图里写了什么？"), {"placeholder_mismatch"}),
    "two places, one image": (make_record(question="<image><image>"), {"placeholder_mismatch"}),
    "one place, two images": (make_record(image=["red.png", "blue.png"]), {"placeholder_mismatch"}),
    "a place without an image": (make_record(image=[]), {"placeholder_mismatch"}),
    "the place in the answer": (make_record(question="？", answer="<image>" + ANSWER), {"placeholder_mismatch"}),
    "the place in the system turn": (make_record(**turns("？", ANSWER, system="<image>")), {"placeholder_mismatch"}),
    "one image too many in the answer": (asked("<image>" + ANSWER), {"control_text"}),
    # Images under another key, or marked in another way.
    **{
        f"an image under {where}": (asked_without_image(**more), {"image_elsewhere"})
        for where, more in {
            "ms-swift's images": {"images": ["blue.png"]},
            "images, of LLaMA-Factory": {"images": "blue.png"},
            "img": {"img": "7"},
            "Image": {"Image": "blue.png"},
            "image_path": {"image_path": "/data/blue"},
            "bytes": {"picture": {"bytes": None, "path": None}},
            "a key nobody knows": {"photo_of_meme": "blue.JPG"},
            "a list under a key nobody knows": {"files": [{"name": "a.webp"}]},
            "a data URL": {"meme": "data:image/png;base64,iVBO"},
            "images, with an empty image": {"image": [], "images": ["blue.png"]},
        }.items()
    },
    **{
        f"{mark} in the question": (asked_without_image(mark + "\n写了什么？"), {"image_elsewhere"})
        for mark in (
            "<img>",
            "<IMAGE>",
            "<|image_1|>",
            "<ImageHere>",
            '<img src="a.jpg">',
            "Picture 1: <img>blue.png</img>",
            "![图](blue.png)",
            "[图片]",
        )
    },
    "Qwen's image token": (asked_without_image("<|vision_start|><|image_pad|>"), {"image_elsewhere", "control_text"}),
    "an image in a turn": (
        {
            "id": "bad",
            "conversations": [
                {"from": "human", "value": "写了什么？", "image": "blue.png"},
                {"from": "gpt", "value": ANSWER},
            ],
        },
        {"image_elsewhere"},
    ),
    "an image under images, with its place": (
        asked_without_image(QUESTION, images=["a.png"]),
        {"placeholder_mismatch"},
    ),
    # Control tokens, which are trained on as text.
    "an end token in the answer": (asked("好耶，这是一只小猫。<|im_end|>"), {"control_text"}),
    "a turn in the question": (make_record(question="<image><|im_start|>system\n"), {"control_text"}),
    "an end of text in the system turn": (
        make_record(**turns(QUESTION, ANSWER, system="<|endoftext|>")),
        {"control_text"},
    ),
    "Qwen's vision token": (asked("好耶，这是一只小猫。<|vision_start|>"), {"control_text"}),
    "Qwen's tool token": (asked("<tool_call>好耶，这是一只小猫。"), {"control_text"}),
    # Refusals.
    "Gemini refuses": (asked("我无法为你提供图片中带有性暗示内容的深度解读。我的目的是提供安全的信息。"), {"refusal"}),
    "Gemini is sorry": (asked("很抱歉，我无法解读带有粗俗语言的图片。"), {"refusal"}),
    "Gemini understands but": (asked("我理解你想让我描述这张图片，但这可能冒犯他人。"), {"refusal"}),
    "Yi-Vision refuses": (
        asked("非常抱歉,我不能提供您需要的具体信息,如果您有其他的问题,我非常乐意帮助您。"),
        {"refusal"},
    ),
    "GPT-4o refuses": (asked("抱歉，我无法识别图片中的人物。"), {"refusal"}),
    "a model names itself": (asked("作为一个AI语言模型，我没有情感。"), {"refusal"}),
    "a model asks for the image": (asked("请提供图片，以便我进行分析。"), {"refusal"}),
    "a filter cuts in at the end": (
        asked("这个表情包展示了一只可爱的小猫。很抱歉，我暂时不能提供您所需的回答。如有其他需要，请随时提问。"),
        {"refusal"},
    ),
    "English": (asked("I'm sorry, but I can't assist with that request."), {"refusal"}),
    "English, typographic": (asked("I’m unable to describe people in images."), {"refusal"}),
    "in the second turn": (make_record(**turns(QUESTION, ANSWER, "是谁？", "抱歉，我无法回答这个问题。")), {"refusal"}),
    # Loops.
    "one character": (asked("好" + "群" * 80), {"loop"}),
    "a phrase": (asked("熊猫" + "会心一笑，然后" * 30), {"loop"}),
    "a loop that counts up": (asked(COUNTED), {"loop"}),
    "white space": (asked("一只猫" + " \t\n" * 60 + "。"), {"loop"}),
    "an unfinished laugh": (asked("哈" * 300), {"loop"}),
    # Doubles of the first record.
    "the same id": (make_record("good 1"), {"duplicate_id"}),
    "the same record": (make_neighbour(1), {"duplicate_id"}),
    "the same answer": (make_neighbour(1) | {"id": "bad"}, {"duplicate_caption"}),
    "the same answer in other blanks": (
        make_neighbour(1) | turns(QUESTION, "图里的红色背景上写着「第 1 号」;很喜庆") | {"id": "bad"},
        {"duplicate_caption"},
    ),
    "the same answer to another question": (
        make_neighbour(1) | turns("<image>\n这是什么？", "图里的红色背景上写着第1号，很喜庆。") | {"id": "bad"},
        {"duplicate_caption"},
    ),
    # What is known to stand in the image.
    "other words": (make_record(text="别催了马上到"), {"text_disagrees"}),
    "a third of the words": (make_record(text="好耶今天加油"), {"text_disagrees"}),
    # Lengths.
    "no room for an answer": (make_record(question=QUESTION + "问" * 4000), {"too_long"}),
    "an answer that is cut": (asked(LONG_WORDS), {"cut_answer"}),
    # Several at once.
    "a refusal that breaks off": (asked("抱歉，我无法回答。" + "无" * 80), {"refusal", "loop"}),
    "a missing image and a refusal": (
        make_record(image="gone.png", answer="抱歉，我无法查看图片。"),
        {"missing_image", "refusal"},
    ),
    # Nothing to find.
    "a meme that refuses": (asked("图里的猫举着牌子，写着“我无法回答，抱歉，我不能”，很无奈。"), set()),
    "a meme that cannot": (asked("猫咪一脸委屈，配文是「我不能接受」，表达拒绝。"), set()),
    "somebody in the image cannot": (asked("他看起来无法接受这个结果，让人忍俊不禁。"), set()),
    "a laugh": (asked("猫咪笑了：" + "哈" * 30), set()),
    "a line of dashes": (asked("猫咪\n" + "-" * 40 + "\n很开心，写着好耶。"), set()),
    "the words": (make_record(text="好耶"), set()),
    "the words in another width and case": (make_record(answer="图里写着ＯＫ，猫咪很开心。", text="o.k!"), set()),
    "half of the words": (make_record(text="好耶加油"), set()),
    "no words": (make_record(text=""), set()),
    "null where it is as good as nothing": (make_record(text=None, task=None, sources=None, repeat=None), set()),
    "the same answer about another image": (make_neighbour(1) | {"id": "bad", "image": "blue.png"}, set()),
    "a deliberate copy": (make_neighbour(1) | {"id": "good 1#2", "repeat": 2}, set()),
    "no id": ({**turns("你好", "喵")}, set()),
    "a number as id": (make_record(7), set()),
    "a system turn": (make_record(**turns(QUESTION, ANSWER, system="你是一只猫。")), set()),
    "two turns": (make_record(**turns(QUESTION, ANSWER, "为什么？", "因为它很开心。")), set()),
    "two images": (make_record(image=["red.png", "blue.png"], question="<image>和<image>有什么不同？"), set()),
    "no image": ({"id": "bad", **turns("你好", "喵")}, set()),
    "an emoji with a tone": (asked("👍🏽"), set()),
    "a zero-width space before a word": (asked("\u200b图里的猫很开心。"), set()),
    "a letter of a plane that is not assigned": (asked("\U0003fff0图里的猫很开心。"), set()),
    "keys of other tools": (make_record(weight=1, sources=[{"set": "x"}]), set()),
    "other keys of images beside ours": (make_record(images=["blue.png"], img="blue.png"), set()),
    **{
        f"text with {what}": ({"id": "bad", **turns("你好", "喵"), **more}, set())
        for what, more in {
            "no images": {"images": []},
            "an image's name as id": {"id": "a.jpg"},
            "an image's name in its sources": {"sources": [{"set": "x", "file": "a.jpg"}]},
            "a page": {"url": "https://host/a.html"},
            "markup in its answer": turns("你好", "写<img>就行。"),
            "less-than signs": turns("a<imagine and b>c 吗？", "是"),
        }.items()
    },
}


@pytest.mark.parametrize("value, expected", RECORDS.values(), ids=RECORDS)
def test_a_record_is_found_out_and_its_neighbours_are_not_blamed(tmp_path, image_folder, encoder, value, expected):
    if isinstance(value, dict) and "id" not in value:
        # Without an id the place stands in, or "?" where the record has no form at all.
        value = value | {"id": "bad"} if expected else value
    checked = check(tmp_path, [make_neighbour(1), value, make_neighbour(2)], encoder)
    assert sorted(list_kinds(checked, 2)) == sorted(expected)
    assert list_kinds(checked, 1) == list_kinds(checked, 3) == []
    record_id = str(value.get("id")) if isinstance(value, dict) else "?"
    assert all(finding.record_id == record_id for finding in checked.findings)
    usable = [record.record.place for record in checked.usable]
    assert usable == [f"memes.jsonl line {line}" for line in (1, 2, 3) if line != 2 or not is_bad(expected)]
    assert list(checked.bad) == (["memes.jsonl line 2"] if is_bad(expected) else [])


def test_all_records_at_once_are_found_out_each_for_itself(tmp_path, image_folder, encoder):
    values = [make_neighbour(1)]
    for number, (value, _) in enumerate(RECORDS.values()):
        values += [value, make_neighbour(number + 2)]
    # Many of them say the same; alone they do not.
    own = {"duplicate_id", "duplicate_caption"}
    checked = check(tmp_path, values, encoder)
    found = [set(list_kinds(checked, 2 * number + 2)) - own for number in range(len(RECORDS))]
    expected = [kinds - own for _, kinds in RECORDS.values()]
    assert dict(zip(RECORDS, found, strict=True)) == dict(zip(RECORDS, expected, strict=True))
    assert all(list_kinds(checked, line) == [] for line in range(1, len(values) + 1, 2))
    assert len(checked.usable) + len(checked.bad) == len(values)
    lines = [int(finding.place.split()[-1]) for finding in checked.findings]
    assert lines == sorted(lines)


def test_the_tables_hold_every_kind_of_finding_and_a_hundred_bad_inputs():
    tables = [expected for _, _, expected in (*FILES.values(), *PLACES.values())]
    tables += [expected for _, expected in RECORDS.values()]
    assert set().union(*tables) == set(KINDS)
    assert sum(is_bad(expected) for expected in tables) >= 100


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_to_an_image_is_more_than_a_finding(tmp_path, seed):
    """Pillow's parsers raise whatever they run into; here it must become a finding, of any kind."""
    generator = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    wholes = [encode_noise(format, size=(20, 16), exif=exif) for format in ("JPEG", "PNG", "WEBP")]
    wholes += [encode_noise(format, size=(20, 16)) for format in ("GIF", "BMP")] + [
        animate("GIF"),
        make_keyed_palette(),
    ]
    path = tmp_path / "a.png"
    for whole in wholes * 40:
        content = bytearray(whole)
        for _ in range(generator.choice([1, 2, 5])):
            content[generator.randrange(min(len(content), generator.choice([60, 300, 10**6])))] = generator.randrange(
                256
            )
        path.write_bytes(content[: generator.choice([len(content), generator.randrange(1, len(content))])])
        facts = inspect_image(path, 10_000_000)
        for kind, detail in check_image(path, facts, {}):
            assert kind in KINDS and str(path) in detail


def test_an_image_that_is_elsewhere_is_named_with_what_to_do(tmp_path, image_folder):
    advice = "name the file under 'image' and write one <image> into the question"
    values = [
        asked_without_image(images=["im/a.jpg"]),
        asked_without_image("<img>写了什么？"),
        asked_without_image(QUESTION, images=["im/a.jpg"]),
    ]
    assert [finding.detail for finding in check(tmp_path, values).findings] == [
        f"'images' holds ['im/a.jpg']: {advice}",
        f"a question holds '<img>': {advice}",
        "has 0 images but 1 <image> in its human turns; 'images' holds ['im/a.jpg']: name the file under 'image'",
    ]
    # Such texts may be nothing but texts.
    assert len(check(tmp_path, values[1:2], allow=["image_elsewhere"]).usable) == 1


def test_looking_for_marks_of_images_takes_no_time_in_a_long_question(tmp_path, image_folder):
    begun = time.process_time()
    check(tmp_path, [asked_without_image("![" * 50_000)])
    assert time.process_time() - begun < 5, "it took 20 seconds, and half an hour at the longest text"


# ---- Doubles ----


def test_a_record_that_is_left_out_is_no_original(tmp_path, image_folder):
    values = [
        make_record("a", answer="抱歉，我无法回答这个问题，请见谅。"),  # left out, so its id is free
        make_record("a"),
        make_record("b", image="gone.png", answer="一只很开心的猫咪在跳舞。"),
        make_record("c", answer="一只很开心的猫咪在跳舞。"),
    ]
    checked = check(tmp_path, values)
    assert [list_kinds(checked, line) for line in (1, 2, 3, 4)] == [["refusal"], [], ["missing_image"], []]
    assert list_usable(checked) == ["a", "c"]


def test_of_three_equal_records_the_first_stays(tmp_path, image_folder):
    checked = check(tmp_path, [make_record(name) for name in "abc"])
    assert list_usable(checked) == ["a"]
    assert [str(finding) for finding in checked.findings] == [
        "memes.jsonl line 2 (id 'b'): says the same as memes.jsonl line 1 [duplicate_caption]",
        "memes.jsonl line 3 (id 'c'): says the same as memes.jsonl line 1 [duplicate_caption]",
    ]


def test_short_answers_to_other_questions_are_no_doubles(tmp_path, image_folder):
    values = [make_record(name, answer="有。", question=f"<image>\n有{name}吗？") for name in ("猫", "狗")]
    values.append(make_record("再问", answer="有", question="<image>\n有猫吗？"))
    checked = check(tmp_path, values)
    assert [list_kinds(checked, line) for line in (1, 2, 3)] == [[], [], ["duplicate_caption"]]


def test_answers_of_emoji_alone_are_compared_as_they_are(tmp_path, image_folder):
    checked = check(
        tmp_path, [make_record("a", answer="😀"), make_record("b", answer="😭"), make_record("c", answer="😀")]
    )
    assert list_usable(checked) == ["a", "b"]


def test_the_deliberate_copies_of_mixing_train(tmp_path, image_folder):
    values = [make_record("a"), make_record("a#2", repeat=2), make_record("a#3", repeat=3), make_record("b")]
    checked = check(tmp_path, values)
    assert list_usable(checked) == ["a", "a#2", "a#3"]


def test_doubled_images_are_named_by_their_first_file(tmp_path, image_folder):
    for name in ("first.png", "second.png", "third.png"):
        (image_folder / name).write_bytes(encode_noise("PNG"))
    names = ["first.png", "second.png", "red.png", "third.png", "first.png"]
    checked = check(tmp_path, [make_record(str(n), name, f"图里写着第{n}句好听的话。") for n, name in enumerate(names)])
    assert [(finding.record_id, finding.kind) for finding in checked.findings] == [
        ("1", "duplicate_image"),
        ("3", "duplicate_image"),
    ]
    assert all(
        finding.detail.endswith(f"has the bytes of {image_folder / 'first.png'}") for finding in checked.findings
    )
    assert len(checked.usable) == 5


# ---- Which findings keep a record from training ----


def test_error_stops_and_lists_quarantine_leaves_out_and_keeps_the_records(tmp_path, image_folder):
    values = [make_neighbour(1), "{", make_record("sorry", answer="抱歉，我无法回答。"), make_record("fine")]
    values.append(make_record("gone", image="gone.png", answer="好" * 80))
    checked = check(tmp_path, values)
    with pytest.raises(UserError) as caught:
        stop_on_bad_records(checked)
    first, *listed, advice = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'memes.jsonl'}: 3 of 5 records cannot be trained on:"
    assert listed[0] == "  memes.jsonl line 2 (id '?'): ends in the middle [not_json]"
    assert listed[1] == "  memes.jsonl line 3 (id 'sorry'): turn 2 refuses: '抱歉，我无法' [refusal]"
    assert listed[2].startswith("  memes.jsonl line 5 (id 'gone'): ") and listed[2].count("[") == 2
    assert "--bad_records quarantine" in advice

    checked.policy.bad_records = "quarantine"
    stop_on_bad_records(checked)
    assert list_usable(checked) == ["good 1", "fine"]
    path = write_quarantine(tmp_path / "out", checked)
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["record"] for line in written] == values[1:3] + values[4:]
    assert [[reason["kind"] for reason in line["reasons"]] for line in written] == [
        ["not_json"],
        ["refusal"],
        ["missing_image", "loop"],
    ]


def test_an_old_quarantine_does_not_outlive_its_cause(tmp_path, image_folder):
    write_quarantine(tmp_path, check(tmp_path, [make_record(image="gone.png")]))
    assert (tmp_path / "quarantine.jsonl").is_file()
    assert write_quarantine(tmp_path, check(tmp_path, [make_record()])) is None
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_kinds_are_allowed_and_refused(tmp_path, image_folder):
    (image_folder / "a.jpg").write_bytes(encode_noise("PNG"))
    values = [make_record("sorry", answer="抱歉，我无法回答。"), make_record("named", "a.jpg"), make_record("named")]
    usual = check(tmp_path, values)
    assert list_usable(usual) == ["named"] and list(usual.bad) == ["memes.jsonl line 1", "memes.jsonl line 3"]
    changed = check(tmp_path, values, allow=["refusal", "duplicate_id"], refuse=["wrong_extension"])
    # Now the second is left out, so the third has no double.
    assert list_usable(changed) == ["sorry", "named"] and list(changed.bad) == ["memes.jsonl line 2"]
    assert changed.counts == {"refusal": 1, "wrong_extension": 1}


@pytest.mark.parametrize(
    "allowed, refused, message",
    [
        (
            ("duplicate_ids",),
            (),
            r"--allow duplicate_ids: no such kind of finding \(did you mean duplicate_id\?\); there",
        ),
        ((), ("xyz",), "--refuse xyz: no such kind of finding; there are not_json, repeated_key, malformed, "),
        (("refusal",), ("refusal", "loop"), "refusal: both in --allow and in --refuse; choose one"),
        (("text_disagrees",), (), "--allow text_disagrees: such records are trained on anyway; leave it out"),
        ((), ("refusal",), "--refuse refusal: such records are bad anyway; leave it out"),
        (("damaged_image",), (), "--allow damaged_image: such a record cannot be trained on; fix it, or leave it"),
    ],
)
def test_kinds_that_cannot_be_meant_are_refused(allowed, refused, message):
    with pytest.raises(UserError, match=message):
        RecordPolicy(allow=[*allowed], refuse=[*refused])


def test_only_what_can_be_trained_on_may_be_allowed():
    allowable = set(BAD_KINDS) - UNTRAINABLE
    assert allowable == {
        "image_elsewhere",
        "duplicate_id",
        "duplicate_caption",
        "refusal",
        "loop",
        "too_small",
        "extreme_shape",
    }


def test_other_limits_of_pixels_are_kept(tmp_path, image_folder):
    checked = check(tmp_path, [make_record()], max_pixels=7999)
    assert [finding.detail for finding in checked.findings] == [
        f"{image_folder / 'blue.png'}: 100x80 pixels, more than the limit of 7,999; scale it down"
    ]
    assert check(tmp_path, [make_record()], max_pixels=8000).findings == []


# ---- Real odd files ----

ODD_FILES = {
    "odd_00.gif": {"palette"},
    "odd_01.gif": {"palette"},
    "odd_02.gif": {"animated", "palette", "transparent"},
    "odd_03.gif": {"animated", "palette", "transparent"},
    "odd_04.gif": {"animated", "palette", "transparent"},
    "odd_05.gif": {"animated", "palette", "transparent"},
    "odd_06.gif": {"animated", "palette", "low_resolution", "stretched_shape"},
    "odd_07.gif": {"animated", "palette"},
    "odd_08.gif": {"animated", "palette", "transparent"},
    "odd_09.gif": {"animated", "palette", "transparent"},
    "odd_10.png": {"wrong_extension"},
    "odd_11.png": {"wrong_extension"},
    "odd_12.png": {"wrong_extension"},
    "odd_13.jpg": {"wrong_extension"},
    "odd_14.jpg": {"wrong_extension"},
    "odd_15.jpg": {"wrong_extension", "transparent"},
    "odd_16.jpg": {"wrong_extension", "animated", "palette"},
    "odd_17.jpg": {"wrong_extension", "animated", "palette"},
    "odd_18.jpg": {"wrong_extension", "palette"},
    "odd_19.gif": {"wrong_extension"},
    "odd_20.gif": {"wrong_extension"},
    "odd_21.webp": set(),
    "odd_22.webp": set(),
    "odd_23.webp": set(),
    "odd_24.png": {"palette", "transparent"},
    "odd_25.png": {"palette"},
    "odd_26.png": {"palette", "low_resolution"},
    "odd_27.png": set(),
    "odd_28.png": {"transparent"},
    "odd_29.png": {"transparent"},
    "odd_30.png": {"transparent"},
    "odd_31.jpg": set(),
    "odd_32.jpg": {"low_resolution"},
    "odd_33.jpg": {"low_resolution"},
    "odd_34.jpg": set(),
    "odd_35.jpg": set(),
    "odd_36.jpg": {"stretched_shape"},
    "odd_37.jpg": set(),
    "odd_38.jpg": {"broken_exif"},
    "odd_39.jpg": set(),
    "odd_40.jpg": set(),
    "odd_41.jpg": set(),
    "odd_42.jpg": set(),
    "odd_43.jpg": set(),
}


def test_every_real_odd_file_is_found_out(tmp_path):
    folder = SHARED_DATA / "odd_images"
    if not folder.is_dir():
        pytest.skip(f"needs the real odd files in {folder}")
    assert sorted(ODD_FILES) == sorted(entry["file"] for entry in json.loads((folder / "manifest.json").read_text()))
    values = [make_record(name, name, f"这个表情包的文件名是{name}。") for name in ODD_FILES]
    checked = check_data(write_lines(tmp_path / "memes.jsonl", values), folder, RecordPolicy())
    found = {name: set(list_kinds(checked, line)) for line, name in enumerate(ODD_FILES, start=1)}
    assert found == ODD_FILES
    assert len(checked.usable) == 44


def test_an_answer_about_the_mood_need_not_hold_the_text(tmp_path):
    """Where no answer has the text, or a caption has other words, something is amiss."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    said = [("a.png", "别催了马上到"), ("a.png", "着急"), ("a.png", ANSWER), ("b.png", "着急")]
    records = [make_record(f"r{place}", *one, text="别催了马上到") for place, one in enumerate(said)]
    (tmp_path / "memes.json").write_text(json.dumps(records))
    checked = check_data(tmp_path / "memes.json", tmp_path, RecordPolicy(), workers=1)
    found = [finding.record_id for finding in checked.findings if finding.kind == "text_disagrees"]
    assert found == ["r2", "r3"]
