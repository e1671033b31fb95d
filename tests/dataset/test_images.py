"""Every image a meme collection may hold opens as a person sees it, or is refused with a reason naming the file."""

import io
import json
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, World
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import build_base_model
from meme_llava.dataset.collator import make_normalisation, normalise, read_pixels, to_pixel_values
from meme_llava.dataset.dataset import load_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.images import ImagePolicy, open_header, open_image, resolve_image_path
from meme_llava.errors import UserError
from meme_llava.inference.generation import load_answerer
from meme_llava.model.llava import load_processing

ODD_IMAGES = SHARED_DATA / "odd_images"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_rows(path: Path) -> list[list]:
    """The pixels of an opened image, row by row."""
    image = open_image(path)
    assert image.mode == "RGB"
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def make_image(mode: str, pixels: list, width: int | None = None) -> Image.Image:
    width = width or len(pixels)
    image = Image.new(mode, (width, len(pixels) // width))
    for index, pixel in enumerate(pixels):
        image.putpixel((index % width, index // width), pixel)
    return image


def make_noise(width: int, height: int) -> Image.Image:
    """An image whose pixels all differ, so that nothing compresses away."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_png(path: Path, width: int, height: int, depth: int, color_type: int, rows: bytes, *chunks) -> None:
    """A PNG written by hand, for what Pillow cannot write: wrong sizes, 16-bit colour, transparent 16-bit grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    extra = b"".join(chunk(kind, content) for kind, content in chunks)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + body)


@pytest.fixture(autouse=True)
def must_not_block():
    # Opening a pipe nobody writes to waits for ever; the alarm turns that into a failure.
    def fail(*_):
        raise AssertionError("still waiting for a file after 20 seconds")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)


# ---- What a person sees ----


def test_transparent_rgba_stands_on_white(tmp_path):
    # The first pixel keeps a colour under full transparency; dropping alpha would show it.
    pixels = [(94, 129, 193, 0), (94, 129, 193, 255), (0, 0, 0, 128), (255, 0, 0, 51)]
    make_image("RGBA", pixels).save(tmp_path / "a.png")
    assert read_rows(tmp_path / "a.png") == [[(255, 255, 255), (94, 129, 193), (127, 127, 127), (255, 204, 204)]]


def test_transparent_grey_stands_on_white(tmp_path):
    make_image("LA", [(10, 0), (10, 255), (0, 128)]).save(tmp_path / "a.png")
    assert read_rows(tmp_path / "a.png") == [[(255, 255, 255), (10, 10, 10), (127, 127, 127)]]


@pytest.mark.parametrize(
    "transparency, expected",
    [
        # One alpha per palette entry, as pngquant writes stickers.
        (bytes([0, 255, 128]), [(255, 255, 255), (200, 100, 0), (127, 127, 127)]),
        # A single transparent entry, as GIF has it.
        (1, [(10, 20, 30), (255, 255, 255), (0, 0, 0)]),
        (None, [(10, 20, 30), (200, 100, 0), (0, 0, 0)]),
    ],
)
def test_transparent_palette_entries_stand_on_white(tmp_path, transparency, expected):
    image = make_image("P", [0, 1, 2])
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 0])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert read_rows(tmp_path / "a.png") == [expected]


def test_a_transparent_colour_key_stands_on_white(tmp_path):
    make_image("RGB", [(1, 2, 3), (4, 5, 6)]).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    make_image("L", [7, 9]).save(tmp_path / "grey.png", transparency=7)
    assert read_rows(tmp_path / "rgb.png") == [[(255, 255, 255), (4, 5, 6)]]
    assert read_rows(tmp_path / "grey.png") == [[(255, 255, 255), (9, 9, 9)]]


def test_a_transparent_gif_stands_on_white(tmp_path):
    image = make_image("P", [0, 1])
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.save(tmp_path / "a.gif", transparency=0)
    assert read_rows(tmp_path / "a.gif") == [[(255, 255, 255), (200, 100, 0)]]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    # 0, 1/255, 128/255 and full brightness; Pillow's own conversion makes the last three white.
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_rows(tmp_path / "a.png") == [[(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]]


def test_16_bit_grey_with_a_transparent_value_stands_on_white(tmp_path):
    rows = b"\0" + struct.pack(">3H", 0, 32896, 65535)
    write_png(tmp_path / "a.png", 3, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 0)))
    assert read_rows(tmp_path / "a.png") == [[(255, 255, 255), (128, 128, 128), (255, 255, 255)]]


def test_16_bit_colour_is_scaled_and_its_transparency_stands_on_white(tmp_path):
    write_png(tmp_path / "rgb.png", 2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 514, 771))
    write_png(tmp_path / "la.png", 2, 1, 16, 4, b"\0" + struct.pack(">4H", 32896, 0, 32896, 65535))
    assert read_rows(tmp_path / "rgb.png") == [[(255, 128, 0), (1, 2, 3)]]
    assert read_rows(tmp_path / "la.png") == [[(255, 255, 255), (128, 128, 128)]]


def test_black_and_white_opens(tmp_path):
    make_image("1", [0, 1]).save(tmp_path / "a.png")
    assert read_rows(tmp_path / "a.png") == [[(0, 0, 0), (255, 255, 255)]]


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, ["abc", "def"]),
        (2, ["cba", "fed"]),
        (3, ["fed", "cba"]),
        (4, ["def", "abc"]),
        (5, ["ad", "be", "cf"]),
        (6, ["da", "eb", "fc"]),
        (7, ["fc", "eb", "da"]),
        (8, ["cf", "be", "ad"]),
        (0, ["abc", "def"]),  # no such orientation; real files carry it
        (9, ["abc", "def"]),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    make_image("L", [ord(letter) for letter in "abcdef"], width=3).save(tmp_path / "a.png", exif=exif)
    found = ["".join(chr(red) for red, _, _ in row) for row in read_rows(tmp_path / "a.png")]
    assert found == upright


def test_a_broken_tag_does_not_keep_an_image_from_being_turned(tmp_path):
    # Orientation 6, and a description that is a fraction in place of text: writing the tags anew would fail.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x010E, 5, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(12)
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (8, 12)


def test_a_phones_jpeg_with_a_preview_behind_it_is_its_first_image(tmp_path):
    preview = Image.new("RGB", (8, 8), "blue")
    Image.new("RGB", (16, 8), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview], quality=100
    )
    with open_header(tmp_path / "a.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (16, 8))
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg"), int) - (255, 0, 0)).max() <= 3


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",  # promises 65,535 entries and ends
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x05\0\0\0\x63",  # orientation as text, outside of the data
        b"Exif\0\0II*\0\xff\xff\xff\xff",  # directory far behind the end
        b"Exif\0\0",
    ],
)
def test_broken_exif_does_no_harm(tmp_path, exif):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (12, 8), (200, 30, 30)).save(path, exif=exif, quality=100)
    image = open_image(path)
    assert image.size == (12, 8)
    assert np.abs(np.asarray(image, int) - (200, 30, 30)).max() <= 3  # JPEG is not exact


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    # Full magenta and yellow are red; read as inverted ink it would be cyan.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg"), int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("format, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_an_animation_gives_its_first_frame(tmp_path, format, options):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    path = tmp_path / "a.bin"
    frames[0].save(path, format, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(path) as animation:
        assert animation.n_frames == 3
    assert read_rows(path) == [[(255, 0, 0)] * 6] * 4


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.txt", "a", "表情 包😀\n.JPEG"])
def test_the_content_counts_and_not_the_extension(tmp_path, name):
    (tmp_path / name).write_bytes(encode(make_image("RGB", [(1, 2, 3)]), "PNG"))
    open_header(tmp_path / name).close()
    assert read_rows(tmp_path / name) == [[(1, 2, 3)]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_every_accepted_format_opens(tmp_path, format):
    (tmp_path / "a").write_bytes(encode(Image.new("RGB", (9, 7), "white"), format))
    open_header(tmp_path / "a").close()
    assert read_rows(tmp_path / "a") == [[(255, 255, 255)] * 9] * 7


@pytest.mark.parametrize("size", [(1, 1), (2, 4000), (8000, 1)])
def test_extreme_shapes_open_and_become_the_square(tmp_path, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    assert image.size == size
    pixels = to_pixel_values(image, ImagePolicy(28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert pixels.shape == (3, 28, 28) and pixels.dtype == torch.float32
    # An image of one colour stays of one colour.
    assert torch.equal(pixels, (torch.tensor([10, 20, 30]) / 255).view(3, 1, 1).expand(3, 28, 28))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_all_real_odd_files_open_in_their_size():
    if not ODD_IMAGES.is_dir():
        pytest.skip(f"needs the real odd files in {ODD_IMAGES}")
    manifest = json.loads((ODD_IMAGES / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest) == 44
    for entry in manifest:
        open_header(ODD_IMAGES / entry["file"]).close()
        image = open_image(ODD_IMAGES / entry["file"])
        turned = (entry["exif_orientation"] or 1) >= 5
        size = (entry["height"], entry["width"]) if turned else (entry["width"], entry["height"])
        assert (entry["file"], image.mode, image.size) == (entry["file"], "RGB", size)


# ---- What is refused ----


def make_directory(path: Path) -> None:
    path.mkdir()


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.jpg")


def make_looping_link(path: Path) -> None:
    path.symlink_to(path)


def make_html(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")


def make_postscript(path: Path) -> None:
    # Pillow would hand this to Ghostscript, which runs it as a program.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def make_huge(width: int, height: int):
    # A few bytes that promise more pixels than memory should hold; decoding would find no data and say "damaged".
    return lambda path: write_png(path, width, height, 1, 0, b"")


REFUSED_BY_HEADER = {
    "missing": (lambda path: None, "No such file"),
    "directory": (make_directory, "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "dangling link": (make_dangling_link, "No such file"),
    "looping link": (make_looping_link, "symbolic links"),
    "zero bytes": (lambda path: path.write_bytes(b""), "the file is empty"),
    "HTML": (make_html, "not a JPEG/PNG/GIF/WEBP/BMP image but a web page: a failed download"),
    "PostScript": (make_postscript, "not a JPEG/PNG/GIF/WEBP/BMP image but PostScript"),
    "SVG": (lambda path: path.write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "image but SVG"),
    "ZIP": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "not a JPEG/PNG/GIF/WEBP/BMP image"),
    "TIFF": (lambda path: Image.new("L", (4, 4)).save(path, "TIFF"), "an image in TIFF format; convert it to one of"),
    "JPEG cut in its header": (
        lambda path: path.write_bytes(encode(make_noise(96, 64), "JPEG")[:200]),
        "cannot be read",
    ),
    "20000x20000": (make_huge(20000, 20000), "20000x20000 pixels, more than the limit of 50,000,000"),
    "7100x7100": (make_huge(7100, 7100), "7100x7100 pixels, more than the limit of 50,000,000"),
}


@pytest.mark.parametrize("make, reason", REFUSED_BY_HEADER.values(), ids=REFUSED_BY_HEADER)
@pytest.mark.parametrize("look", [open_image, open_header])
def test_what_is_no_image_is_refused_by_opening_and_by_the_check(tmp_path, look, make, reason):
    path = tmp_path / "meme.jpg"
    make(path)
    with pytest.raises(ValueError) as caught:
        look(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("look", [open_image, open_header])
def test_a_name_too_long_for_the_file_system_is_refused(tmp_path, look):
    path = tmp_path / ("图" * 100 + ".jpg")  # 304 bytes
    with pytest.raises(ValueError, match="File name too long") as caught:
        look(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_image_is_refused_and_not_half_grey(tmp_path, format, share):
    content = encode(make_noise(96, 64), format)
    path = tmp_path / "meme.jpg"
    path.write_bytes(content[: int(len(content) * share)])
    # WebP's decoder looks at the whole file before it says what it is.
    reason = "cannot be read" if format == "WEBP" else "the image is damaged"
    with pytest.raises(ValueError, match=reason) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_flipped_bit_in_a_png_is_refused(tmp_path):
    content = bytearray(encode(make_noise(96, 64), "PNG"))
    content[len(content) // 2] ^= 0x10
    (tmp_path / "meme.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"meme\.png: the image is damaged"):
        open_image(tmp_path / "meme.png")


def test_exactly_the_pixel_limit_is_not_too_large(tmp_path):
    # 10000 x 5000 is the limit itself: the header passes, and the missing pixels are the fault.
    write_png(tmp_path / "a.png", 10000, 5000, 1, 0, b"")
    with pytest.raises(ValueError, match="the image is damaged"):
        open_image(tmp_path / "a.png")


# ---- Where an image may lie ----


@pytest.mark.parametrize(
    "image",
    [
        "a.png",
        "sub/a.png",
        "sub/../a.png",
        "./a.png",
        "表情包/图 1😀.png",
        "link.png",
        "linked folder/a.png",
        "%2e.png",
    ],
)
def test_a_path_inside_the_folder_is_found(tmp_path, image):
    folder = tmp_path / "images"
    for name in ("a.png", "sub/a.png", "表情包/图 1😀.png", "%2e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "link.png").symlink_to("sub/a.png")
    (folder / "linked folder").symlink_to(folder / "sub")
    content = resolve_image_path(image, folder).read_bytes()
    expected = {
        "sub/../a.png": "a.png",
        "./a.png": "a.png",
        "link.png": "sub/a.png",
        "linked folder/a.png": "sub/a.png",
    }
    assert content == expected.get(image, image).encode()


def test_the_image_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    assert resolve_image_path("a.png", tmp_path / "folder") == (tmp_path / "real" / "a.png").resolve()


@pytest.mark.parametrize(
    "image",
    ["/etc/passwd", "//host/a.png", "file:///etc/passwd", "http://host/a.png", "s3://bucket/a", "..\\a.png", "a\0.png"],
)
def test_what_is_no_relative_path_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match="is not a path relative to the image folder") as caught:
        resolve_image_path(image, tmp_path)
    assert repr(image) in str(caught.value)


@pytest.mark.parametrize("image", ["../a.png", "sub/../../a.png", "..", "out.png", "out/a.png", "../images_2/a.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, image):
    folder = tmp_path / "images"
    for name in ("images/sub", "images_2"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.png", "images_2/a.png"):
        (tmp_path / name).write_bytes(b"")
    (folder / "out.png").symlink_to(tmp_path / "a.png")
    (folder / "out").symlink_to(tmp_path / "images_2")
    with pytest.raises(ValueError, match="leaves the image folder") as caught:
        resolve_image_path(image, folder)
    assert repr(image) in str(caught.value)


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=r"loop\.png"):
        open_image(resolve_image_path("loop.png", tmp_path))


# ---- Pixels for the vision tower ----


def make_processor(size: int, mean=CLIP_MEAN, std=CLIP_STD, resample: int = 3) -> CLIPImageProcessorPil:
    """The image processor that build_base_model.py stores."""
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=mean, image_std=std, resample=resample
    )


@pytest.mark.parametrize("shape", [(1, 1), (2, 4000), (300, 200), (337, 335), (28, 28), (27, 29), (640, 17)])
@pytest.mark.parametrize("size", [28, 112, 336])
def test_pixel_values_equal_the_image_processor_bit_for_bit(shape, size):
    # Programs that use the saved directory go through transformers; both must show the model the same numbers.
    image = make_noise(*shape)
    processor = make_processor(size)
    ours = to_pixel_values(image, ImagePolicy.from_image_processor(processor, "test"))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_pixel_values_follow_the_processors_own_mean_std_and_resampling(resample):
    processor = make_processor(28, mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 0.1], resample=resample)
    image = make_noise(45, 61)
    ours = to_pixel_values(image, ImagePolicy.from_image_processor(processor, "test"))
    assert torch.equal(ours, processor(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
def test_pixels_that_travel_as_bytes_become_the_same_floats_on_the_device(tmp_path, resize):
    policy = ImagePolicy(16, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), resize=resize)
    # All byte values in every channel, at the size of the square, so that none is lost in resizing.
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    image.save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png", policy)
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, (3, 16, 16), True)
    # The formula that models were trained with until pixels travelled as bytes, in NumPy on the CPU.
    values = np.asarray(image, dtype=np.float32) / 255.0
    floats = torch.from_numpy((values - np.float32(policy.mean)) / np.float32(policy.std)).permute(2, 0, 1)
    assert torch.equal(to_pixel_values(image, policy), floats)
    batch = normalise(torch.stack([pixels, pixels.flip(1)]), make_normalisation(policy))
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([floats, floats.flip(1)]))


def test_pixel_values_written_out():
    # Left half black, right half white, no resizing: (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25.
    image = make_image("RGB", [(0, 0, 0), (255, 255, 255)] * 2, width=2)
    pixels = to_pixel_values(image, ImagePolicy(2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    assert pixels.tolist() == [[[-2.0, 2.0], [-2.0, 2.0]]] * 3


def test_the_whole_of_a_wide_meme_reaches_the_tower():
    # Words at both ends of a wide image: a centre crop would lose the red and the blue end.
    image = Image.new("RGB", (400, 100), "white")
    image.paste((255, 0, 0), (0, 0, 40, 100))
    image.paste((0, 0, 255), (360, 0, 400, 100))
    pixels = to_pixel_values(image, ImagePolicy(20, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert pixels[:, 10, 0].tolist() == [1.0, 0.0, 0.0]
    assert pixels[:, 10, 19].tolist() == [0.0, 0.0, 1.0]


def test_an_image_processor_without_a_square_is_refused():
    for size in ({"shortest_edge": 224}, {"height": 28, "width": 56}):
        with pytest.raises(UserError, match="folder: the image processor resizes to .*expected a square"):
            ImagePolicy.from_image_processor(CLIPImageProcessorPil(size=size, do_center_crop=False), "folder")
    square = {"height": 28, "width": 28}
    for size, crop_size in ((square, square), ({"shortest_edge": 32}, square)):
        with pytest.raises(UserError, match="folder: the image processor resizes to .* and crops"):
            ImagePolicy.from_image_processor(CLIPImageProcessorPil(size=size, crop_size=crop_size), "folder")


# ---- Size policies ----

SHAPES = [(100, 60), (60, 100), (57, 56), (300, 31), (31, 300), (480, 59), (56, 56), (1, 1), (700, 701), (1713, 1901)]


def make_policy_processor(resize: str, size: int):
    """The image processor of transformers that does what our policy of this name does."""
    square = {"height": size, "width": size}
    if resize == "pad":
        return LlavaImageProcessorPil(size=square, crop_size=square, do_center_crop=False, do_pad=True)
    if resize == "crop":
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, do_center_crop=True)
    return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
def test_every_policy_equals_its_image_processor_bit_for_bit(resize, shape):
    image, processor = make_noise(*shape), make_policy_processor(resize, 56)
    policy = ImagePolicy.from_image_processor(processor, "test")
    assert (policy.resize, policy.size) == (resize, 56)
    theirs = torch.as_tensor(np.array(processor(image)["pixel_values"][0]))
    assert torch.equal(to_pixel_values(image, policy), theirs)


def make_policy(resize: str, size: int, mean: float = 0.0) -> ImagePolicy:
    return ImagePolicy(size, (mean,) * 3, (1.0,) * 3, Image.Resampling.NEAREST, resize)


@pytest.mark.parametrize(
    "resize, expected",
    [
        ("squash", [[1, 3], [5, 7]]),  # every second pixel
        ("pad", [[127, 127, 127, 127], [0, 1, 2, 3], [4, 5, 6, 7], [127, 127, 127, 127]]),
        ("crop", [[1, 2], [5, 6]]),
    ],
)
def test_policies_written_out(resize, expected):
    image = make_image("RGB", [(value,) * 3 for value in range(8)], width=4)
    policy = make_policy(resize, len(expected), mean=0.5 if resize == "pad" else 0.0)
    pixels = (to_pixel_values(image, policy) + policy.mean[0]) * 255
    assert pixels.round().int().tolist() == [expected] * 3


def test_padding_stands_on_both_sides_and_takes_the_mean_colour():
    policy = ImagePolicy(4, (0.5, 0.25, 0.999), (1.0, 1.0, 1.0), Image.Resampling.NEAREST, "pad")
    tall = to_pixel_values(Image.new("RGB", (2, 4), "white"), policy) + torch.tensor(policy.mean).view(3, 1, 1)
    assert (tall * 255).round().int()[:, 1].tolist() == [[127, 255, 255, 127], [63, 255, 255, 63], [254, 255, 255, 254]]


def test_a_processor_that_pads_and_crops_is_refused():
    processor = make_policy_processor("pad", 56)
    processor.do_center_crop = True
    with pytest.raises(UserError, match="folder: the image processor pads and crops, expected one of them"):
        ImagePolicy.from_image_processor(processor, "folder")


# ---- Fast decoding ----


def make_drawing(width: int, height: int) -> Image.Image:
    """An image with soft colours, shapes and lines as thin as letters."""
    red = np.linspace(0, 255, width, dtype=np.uint8)[None].repeat(height, 0)
    green = np.linspace(255, 0, height, dtype=np.uint8)[:, None].repeat(width, 1)
    image = Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=2))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill="white", outline="black")
    for step in range(12):
        draw.line((step * width // 12, height, (step + 1) * width // 12, height * 3 // 4), fill="black", width=5)
    return image


@pytest.mark.parametrize(
    "resize, size, decoded",
    [
        ("squash", (1000, 900), (125, 113)),  # 1/8
        ("squash", (500, 480), (125, 120)),  # 1/4
        ("squash", (300, 230), (150, 115)),  # 1/2
        ("squash", (224, 400), (112, 200)),  # exactly four times too large
        ("squash", (223, 400), (223, 400)),
        ("crop", (400, 224), (200, 112)),
        # Its short side, the one that counts, is just what is needed; on a padded square the long one counts.
        ("squash", (4000, 120), (4000, 120)),
        ("crop", (4000, 120), (4000, 120)),
        ("pad", (4000, 120), (500, 15)),
        ("pad", (223, 100), (223, 100)),
    ],
)
def test_a_large_jpeg_is_decoded_small_but_never_below_twice_what_is_needed(tmp_path, resize, size, decoded):
    path = tmp_path / "a.jpg"
    make_drawing(*size).save(path)
    policy = make_policy(resize, 56)
    image = open_image(path, policy)
    assert image.size == decoded
    assert policy.measure_reduction(*decoded) >= min(2, policy.measure_reduction(*size))
    assert open_image(path).size == size
    make_drawing(*size).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", policy).size == size


@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(1000, 900), (500, 480), (300, 230), (700, 1600)])
def test_fast_decoding_shows_the_same_image(tmp_path, resize, size):
    make_drawing(*size).save(tmp_path / "a.jpg", quality=90)
    policy = ImagePolicy(56, (0.0,) * 3, (1.0,) * 3, resize=resize)
    fast = to_pixel_values(open_image(tmp_path / "a.jpg", policy), policy)
    whole = to_pixel_values(open_image(tmp_path / "a.jpg"), policy)
    difference = (fast - whole).abs() * 255
    assert float(difference.mean()) < 4  # of 255
    assert not torch.equal(fast, whole)


def test_a_large_jpeg_on_its_side_is_decoded_small_and_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (800, 400), "white")
    image.paste((255, 0, 0), (0, 0, 100, 100))  # its left upper corner comes to the right upper one
    image.save(tmp_path / "a.jpg", exif=exif)
    turned = open_image(tmp_path / "a.jpg", make_policy("squash", 50))
    assert turned.size == (100, 200)
    assert turned.getpixel((95, 5))[1] < 30 < 230 < turned.getpixel((5, 5))[1]


# ---- From the file to the model, in training and in use ----


@pytest.fixture(scope="module", params=["squash", "pad", "crop"])
def base_with_policy(request, world, tmp_path_factory) -> tuple[str, Path]:
    base = tmp_path_factory.mktemp(request.param) / "base"
    build_base_model.main(
        [
            *("--language_model", str(world.language_model), "--vision_model", str(world.vision_tower)),
            *("--output_dir", str(base), "--image_policy", request.param, "--no_verify"),
        ]
    )
    return request.param, base


def test_the_policy_is_stored_with_the_model_and_transformers_follows_it(base_with_policy):
    resize, base = base_with_policy
    processing = load_processing(base)
    assert (processing.image_policy.resize, processing.image_policy.size) == (resize, 28)
    for shape in ((100, 60), (31, 300), (28, 28)):
        image = make_noise(*shape)
        theirs = processing.processor(text="<image>", images=image, return_tensors="pt")
        assert torch.equal(theirs["pixel_values"][0], to_pixel_values(image, processing.image_policy))
        assert int((theirs["input_ids"] == processing.encoder.image_token_id).sum()) == 4


def save_real_life_images(folder: Path) -> list[str]:
    """Images that are not taken as they lie in their files."""
    exif = Image.Exif()
    exif[0x0112] = 6
    make_drawing(900, 700).save(folder / "large.jpg")
    make_drawing(900, 500).save(folder / "large on its side.jpg", exif=exif)
    make_drawing(60, 40).save(folder / "small.jpg", exif=exif)
    make_drawing(640, 100).convert("CMYK").save(folder / "printed.jpg")
    drawing = make_drawing(120, 300).convert("RGBA")
    drawing.putalpha(Image.linear_gradient("L").resize(drawing.size))
    drawing.save(folder / "sticker.png")
    frames = [make_drawing(200, 150).quantize(32), Image.new("P", (200, 150))]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return sorted(path.name for path in folder.iterdir())


def test_tokens_and_pixels_are_the_same_in_training_and_in_use(world: World, base_with_policy, tmp_path):
    (tmp_path / "images").mkdir()
    names = save_real_life_images(tmp_path / "images")
    records = [
        {
            "id": name,
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\n图里写了什么？"},
                {"from": "gpt", "value": f"第{number}张图里写着“好耶”。"},
            ],
        }
        for number, name in enumerate(names)
    ]
    (tmp_path / "memes.json").write_text(json.dumps(records), encoding="utf-8")
    processing = load_processing(base_with_policy[1])
    files = tmp_path / "memes.json", tmp_path / "images"
    dataset = load_records(*files, RecordPolicy(), processing.encoder, 200, processing.image_policy).dataset
    answerer = load_answerer(base_with_policy[1], device="cpu", dtype="float32")
    for index, name in enumerate(names):
        item = dataset[index]
        # As infer.py does.
        image = open_image(tmp_path / "images" / name, answerer.processing.image_policy)
        inputs = answerer.build_inputs(image, "图里写了什么？")
        prompt = inputs["input_ids"][0]
        assert torch.equal(item["input_ids"][: len(prompt)], prompt), name
        assert item["labels"][: len(prompt)].eq(-100).all() and item["labels"][len(prompt)] != -100
        pixel_values = normalise(torch.stack(item["pixel_values"]), make_normalisation(processing.image_policy))
        assert torch.equal(pixel_values, inputs["pixel_values"]), name
