"""Makes device batches of chosen lengths, and predicts what the plan of train.py says of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from throughput_data import TOKENS_BEFORE_IMAGE, TOKENS_BEHIND_IMAGE
from throughput_models import Shapes, make_arguments

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.model.llava import count_image_tokens
from meme_llava.model.trainable import CheckpointedLayers
from meme_llava.train.planning.memory import StepEstimator
from meme_llava.train.settings import TrainArguments

# Tokens of eight captions as the published ones are, and the image that each is about.
CAPTION_LENGTHS = (110, 95, 130, 100, 120, 107, 90, 140)
CAPTION_IMAGES = (0, 0, 0, 1, 1, 2, 2, 3)
IMAGES = 4


def make_batch(
    shapes: Shapes, times: int = 1, shared_images: bool = True, seed: int = 0, has_images: bool = True
) -> dict:
    """Eight captions about four images, so many times over, as train.py packs them; or without their images."""
    generator = np.random.default_rng(seed)
    size, tokens = shapes.image_policy.size, count_image_tokens(shapes.config)
    last_id = min(shapes.image_token_id, shapes.config.text_config.vocab_size) - 1
    prompt = [1] * TOKENS_BEFORE_IMAGE + [shapes.image_token_id] * tokens * has_images + [2] * TOKENS_BEHIND_IMAGE
    shown = generator.integers(0, 256, (times * IMAGES, 3, size, size), dtype=np.uint8)
    examples = []
    for number in range(times):
        for length, image in zip(CAPTION_LENGTHS, CAPTION_IMAGES, strict=True):
            caption = generator.integers(6, last_id, length).tolist()
            image += number * IMAGES
            examples.append(
                {
                    "record_id": str(len(examples)),
                    "input_ids": torch.tensor(prompt + caption),
                    "labels": torch.tensor([IGNORED_LABEL] * len(prompt) + caption),
                    "image_paths": (Path(f"p{image}"),) * has_images,
                    "pixel_values": [torch.from_numpy(shown[image])] * has_images,
                }
            )
    return PackingCollator(shapes.image_token_id, tokens, size, shared_images=shared_images)(examples)


def to_device(batch: Mapping, device: torch.device) -> dict:
    """The batch's tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def make_estimator(shapes: Shapes, batch: Mapping, on_gpu: bool) -> StepEstimator:
    """What `train.py --plan` estimates memory with, for this batch on one device."""
    arguments: TrainArguments = make_arguments(shapes, seed=0)
    if not on_gpu:
        arguments.precision = "fp32"
    return StepEstimator(shapes.config, shapes.image_policy, arguments, batch, 1, on_gpu)


def plan_bytes(estimator: StepEstimator, recomputes: bool) -> int:
    """Bytes of a step by the plan, with no layer computed again or all of them."""
    return estimator.estimate(estimator.most if recomputes else CheckpointedLayers()).total
