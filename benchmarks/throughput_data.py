"""Makes the data of throughput.py: token lengths, captions per image and image files as the published run had them.

The lengths are counted with the real tokenizer where captions are at hand, else drawn from a histogram of them. Token
ids are random: no model here has learned anything, and time depends on lengths alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from meme_llava.dataset.collator import to_pixels
from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.dataset.images import ImagePolicy, open_image

# Positions of a record's image, and of the prompt before and after it.
IMAGE_TOKENS = 576
TOKENS_BEFORE_IMAGE = 14
TOKENS_BEHIND_IMAGE = 15
# The published way pads text to model_max_length, where the image is one token, and then puts the image in.
PUBLISHED_TEXT_LENGTH = 2048
# (captions, tokens a caption) of 19,138 published captions, counted with Qwen's tokenizer: mean 106, two above 2,000.
CAPTION_LENGTHS = (
    *((478, 27), (478, 36), (479, 41), (478, 45), (479, 49), (478, 52), (479, 55), (478, 58), (479, 62), (478, 65)),
    *((478, 69), (479, 73), (478, 77), (479, 81), (478, 84), (479, 87), (478, 91), (479, 94), (478, 97), (479, 100)),
    *((478, 104), (478, 107), (479, 110), (478, 112), (479, 115), (478, 118), (479, 121), (478, 125), (479, 128)),
    *((478, 132), (478, 135), (479, 140), (478, 144), (479, 150), (478, 157), (479, 165), (478, 174), (479, 184)),
    *((478, 200), (191, 217), (192, 237), (77, 295), (17, 1317), (2, 2377)),
)
# Positions of a record beside its image: prompt, caption and its end.
MEAN_TEXT_LENGTH = TOKENS_BEFORE_IMAGE + TOKENS_BEHIND_IMAGE + 106.25 + 1
# (captions of an image, images). Of 24,332 captions on 10,835 images 19,138 are counted; the others belong to one
# file about a collection whose images have one caption each otherwise.
IMAGE_CAPTIONS = ((1, 1_595), (2, 4_983), (3, 4_257))
# Pixels a side of common memes, and how many JPEG files there are for one PNG.
IMAGE_SIDES = (300, 800)
JPEGS_FOR_A_PNG = 7


@dataclass(frozen=True)
class LengthScale:
    """How lengths shrink with the model, so that images, prompt, captions and padding keep their proportions."""

    tokens_per_image: int

    @property
    def factor(self) -> float:
        return self.tokens_per_image / IMAGE_TOKENS

    @property
    def padded_length(self) -> int:
        """Positions of every record in the published way: 2,623 at full size."""
        return round(self.factor * (PUBLISHED_TEXT_LENGTH + IMAGE_TOKENS - 1))

    @property
    def tokens_before_image(self) -> int:
        return max(1, round(self.factor * TOKENS_BEFORE_IMAGE))

    @property
    def tokens_behind_image(self) -> int:
        return max(1, round(self.factor * TOKENS_BEHIND_IMAGE))

    def shrink(self, lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Lengths of this scale, at least 1, whose mean is the scaled mean: rounded up or down by chance."""
        return np.maximum(1, np.floor(lengths * self.factor + generator.random(len(lengths)))).astype(np.int64)


@dataclass(frozen=True)
class BenchmarkRecord:
    """One caption with its prompt and image; labels are -100 but for the caption and its end."""

    input_ids: torch.Tensor  # int64 (length,)
    labels: torch.Tensor  # int64 (length,)
    image: Path

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


def read_caption_lengths(captions: Path, tokenizer: Path) -> np.ndarray:
    """Tokens of every caption in a folder of JSONL files with a `description`, those of refusals left out."""
    texts = [
        json.loads(line)["description"]
        for path in sorted(captions.glob("*.jsonl"))
        if "invalid" not in path.name
        for line in path.open(encoding="utf-8")
    ]
    encodings = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode_batch(texts, add_special_tokens=False)
    return np.array([len(encoding.ids) for encoding in encodings])


def draw_evenly(values: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of the values in random order, at even distances of their order: a small draw keeps mean and tail."""
    places = (np.arange(count) + 0.5) / count * len(values)
    return generator.permutation(np.sort(values)[places.astype(np.int64)])


def draw_caption_lengths(
    count: int, scale: LengthScale, generator: np.random.Generator, real: np.ndarray | None = None
) -> np.ndarray:
    """Supervised tokens in a number of records: a caption's and the end token after it. int64 (count,).

    Args:
        real: tokens of real captions; the histogram of them when None.
    """
    if real is None:
        real = np.repeat([tokens for _, tokens in CAPTION_LENGTHS], [captions for captions, _ in CAPTION_LENGTHS])
    lengths = scale.shrink(draw_evenly(real, count, generator) + 1, generator)
    prompt = scale.tokens_before_image + scale.tokens_per_image + scale.tokens_behind_image
    return np.minimum(lengths, scale.padded_length - prompt)


def assign_images(count: int, generator: np.random.Generator) -> np.ndarray:
    """Which image each of `count` records is about, int64 (count,); records about one image are neighbours."""
    sizes = np.repeat([captions for captions, _ in IMAGE_CAPTIONS], [images for _, images in IMAGE_CAPTIONS])
    drawn = draw_evenly(sizes, round(count / sizes.mean()) + 1, generator)
    return np.repeat(np.arange(len(drawn)), drawn)[:count]


def make_records(
    count: int,
    scale: LengthScale,
    vocabulary: range,
    image_token_id: int,
    folder: Path,
    seed: int,
    caption_lengths: np.ndarray | None = None,
) -> list[BenchmarkRecord]:
    """Records whose captions share images as the published ones do; their images are written to `folder`.

    Args:
        vocabulary: ids that text may have.
        caption_lengths: tokens of real captions; the histogram of them when None.
    """
    generator = np.random.default_rng(seed)
    lengths = draw_caption_lengths(count, scale, generator, caption_lengths)
    prompt = [
        *generator.integers(vocabulary.start, vocabulary.stop, scale.tokens_before_image),
        *[image_token_id] * scale.tokens_per_image,
        *generator.integers(vocabulary.start, vocabulary.stop, scale.tokens_behind_image),
    ]
    images = assign_images(count, generator)
    paths = [_draw_image(folder, number, generator) for number in range(images[-1] + 1)]
    records = []
    for length, image in zip(lengths, images, strict=True):
        caption = generator.integers(vocabulary.start, vocabulary.stop, length)
        labels = [IGNORED_LABEL] * len(prompt) + list(caption)
        records.append(BenchmarkRecord(torch.tensor([*prompt, *caption]), torch.tensor(labels), paths[image]))
    return records


def _draw_image(folder: Path, number: int, generator: np.random.Generator) -> Path:
    """Write an image with grain, a face and a line of text, as photos with words have them."""
    width, height = (int(side) for side in generator.integers(*IMAGE_SIDES, 2))
    grain = generator.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill="white", outline="black", width=5)
    draw.text((width // 8, height - 60), "no padding, no cry", fill="black", font_size=40)
    path = folder / f"{number:05d}.{'jpg' if number % (JPEGS_FOR_A_PNG + 1) else 'png'}"
    image.save(path)
    return path


class BenchmarkRecords(Dataset):
    """Items as `MemeDataset` returns them.

    Args:
        reads_slowly: images take the published path and are float32, normalised; else uint8, as ours.
        shares_images: an image that several records of a batch show is read once.
    """

    def __init__(
        self, records: list[BenchmarkRecord], image_policy: ImagePolicy, reads_slowly: bool, shares_images: bool
    ):
        self._records = records
        self._image_policy = image_policy
        self._read = read_image_slowly if reads_slowly else read_image
        self._shares_images = shares_images

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        images: dict[Path, torch.Tensor] = {}
        items = []
        for index in indices:
            record = self._records[index]
            if record.image not in images or not self._shares_images:
                images[record.image] = self._read(record.image, self._image_policy)
            items.append(
                {
                    "record_id": str(index),
                    "input_ids": record.input_ids,
                    "labels": record.labels,
                    "image_paths": (record.image,),
                    "pixel_values": [images[record.image]],
                }
            )
        return items


def read_image(path: Path, policy: ImagePolicy) -> torch.Tensor:
    """Our path to uint8 (3, size, size).

    Without the shortcut for JPEGs of four times the model's square: few memes are that large, but all are for a scaled
    model, and every way must see the same pixels.
    """
    return to_pixels(open_image(path), policy)


def read_image_slowly(path: Path, policy: ImagePolicy) -> torch.Tensor:
    """The published path to float32 (3, size, size): the whole image as an array, then back, resized, as floats."""
    with Image.open(path) as file:
        whole = np.array(file.convert("RGB"))  # (height, width, 3)
    resized = Image.fromarray(whole).resize((policy.size, policy.size), policy.resample)
    pixels = np.array(resized).astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.array(policy.mean, np.float32)) / np.array(policy.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
