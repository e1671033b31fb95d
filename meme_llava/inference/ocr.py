"""RapidOCR, a text recogniser that is not a language model, reading the words in an image."""

import importlib.util
from importlib.metadata import version

import numpy as np
from PIL import Image

from meme_llava.errors import UserError

# What is said of an image in which nothing is found, as the sample memes have it.
NOTHING_FOUND = "图片里没有文字。"
REQUIREMENTS = "configs/requirements/other_models.txt"


class TextReader:
    """RapidOCR with the models that come with it, on the CPU."""

    def __init__(self):
        check_text_reader()
        from rapidocr import RapidOCR

        self._engine = RapidOCR(params={"Global.log_level": "error"})

    def read(self, image: Image.Image) -> str:
        """The lines of an RGB image from top to bottom, or NOTHING_FOUND."""
        blue_first = np.asarray(image)[:, :, ::-1]  # (height, width, 3), as OpenCV has colours
        lines = self._engine(blue_first).txts
        return "\n".join(lines) if lines else NOTHING_FOUND


def check_text_reader() -> str:
    """The version of RapidOCR. Raises UserError if it is not installed."""
    if missing := [name for name in ("rapidocr", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--answer_with rapidocr needs {' and '.join(missing)}: pip install -r {REQUIREMENTS}")
    return version("rapidocr")
