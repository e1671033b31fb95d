"""A merged model for serving engines that know CLIP's tower and not Chinese-CLIP's: the same one by another name."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, ChineseCLIPVisionModel, CLIPVisionModel, LlavaConfig
from transformers.utils import is_torchvision_available

from meme_llava import DATA
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.model.llava import load_processing, make_empty_model, open_llava_tensors, to_disk_name
from meme_llava.model.loading import LOCALLY, quiet_transformers
from meme_llava.model.offloading import offload_weights
from meme_llava.storage.files import write_json
from meme_llava.storage.json_files import check_fields, read_json

# vLLM takes CLIP and SigLIP towers in a LLaVA and refuses Chinese-CLIP's, which is CLIP's in all but name: the same
# settings, layers and tensor names.
CHINESE_CLIP, CLIP = "chinese_clip_vision_model", "clip_vision_model"
SAMPLE_IMAGES = DATA / "images"
COMPARED_IMAGES = 4
# transformers hands out an image processor that resizes by torchvision where that is installed, and one by Pillow
# elsewhere. torchvision rounds in other places: values that it resized differ by up to 2 of 255.
PILLOW, TORCHVISION = "pil", "torchvision"
MAX_TORCHVISION_DIFFERENCE = 2


def check_base(base_folder: Path) -> None:
    """Raise UserError unless `--export clip` has something to do for this base."""
    if (model_type := _read_tower_type(base_folder)) != CHINESE_CLIP:
        raise UserError(
            f"--export clip: the vision tower of {base_folder} is a {model_type!r}, expected {CHINESE_CLIP!r}. Serving "
            "engines take CLIP and SigLIP towers as they are; leave --export out."
        )


def is_needed(base_folder: Path) -> bool:
    """Whether vLLM would refuse the base's vision tower by its name."""
    return _read_tower_type(base_folder) == CHINESE_CLIP


def write(folder: Path) -> None:
    """Name the Chinese-CLIP tower of a merged model as the CLIP tower it is. Tensors and processor stay as they are."""
    config = read_json(folder / "config.json")
    config["vision_config"]["model_type"] = CLIP
    write_json(folder / "config.json", config)


@torch.inference_mode()
def verify(base_folder: Path, folder: Path) -> list[tuple[str, str]]:
    """Compare what the exported directory sees with what the model was trained to see, on sample memes.

    Pixels: the exported image processor, as transformers loads it, against training's own. Features: CLIP's tower
    against Chinese-CLIP's, both with the exported weights, after every layer.

    Returns (check, finding) rows. Raises UserError where a pixel or a feature differs in a single bit, or a pixel that
    torchvision resized by more than 2 of 255.
    """
    policy = load_processing(base_folder).image_policy
    images = [open_image(path) for path in sorted(SAMPLE_IMAGES.iterdir())[:COMPARED_IMAGES]]
    trained_pixels = torch.stack([to_pixel_values(image, policy) for image in images])  # (images, 3, size, size)
    exported_pixels = _process(PILLOW, folder, images)
    if not torch.equal(trained_pixels, exported_pixels):
        raise UserError(f"{folder}: its image processor gives other pixels than training; report this as a bug")
    rows = [("export: pixel values", f"same bits on {len(images)} sample memes")]
    if is_torchvision_available():
        std = torch.tensor(policy.std).view(3, 1, 1)
        resized = (_process(TORCHVISION, folder, images) - trained_pixels).mul(std * 255).abs().max().item()
        if not round(resized) <= MAX_TORCHVISION_DIFFERENCE:
            raise UserError(
                f"{folder}: resized by torchvision, pixels differ from training's by {resized:.3g} of 255, expected up "
                f"to {MAX_TORCHVISION_DIFFERENCE}. Servers would take these; report this as a bug"
            )
        rows.append(("export: pixel values by torchvision", f"differ by up to {resized:.2g} of 255"))
    trained = _list_hidden_states(ChineseCLIPVisionModel, base_folder, folder, trained_pixels)
    exported = _list_hidden_states(CLIPVisionModel, folder, folder, exported_pixels)
    if len(trained) != len(exported) or not all(map(torch.equal, trained, exported)):
        raise UserError(f"{folder}: CLIP's tower gives other features than Chinese-CLIP's; report this as a bug")
    return [*rows, ("export: vision features", f"same bits after each of {len(exported) - 1} layers")]


def _read_tower_type(base_folder: Path) -> str:
    path = base_folder / "config.json"
    config = read_json(path)
    check_fields(path, config, {"vision_config.model_type": str})
    return config["vision_config"]["model_type"]


def _process(backend: str, folder: Path, images: list[Image.Image]) -> torch.Tensor:
    """Pixel values (images, 3, size, size) as one of transformers' two kinds of image processor gives them."""
    with quiet_transformers():
        image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **LOCALLY)
    return image_processor(images, return_tensors="pt")["pixel_values"]


def _list_hidden_states(
    model_class: type, config_folder: Path, weights_folder: Path, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    config = LlavaConfig.from_pretrained(config_folder, local_files_only=True).vision_config
    tensors = open_llava_tensors(weights_folder)
    tower = make_empty_model(model_class, config)
    tower = offload_weights(tower, lambda name: tensors[to_disk_name(f"model.vision_tower.{name}")].load())
    return tower(pixel_values, output_hidden_states=True).hidden_states  # layers + 1 of (images, positions, hidden)
