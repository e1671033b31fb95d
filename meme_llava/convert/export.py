"""Merged models written for serving engines, and the proof that they still see the same.

vLLM, SGLang and LMDeploy take CLIP, SigLIP and Pixtral towers in a LLaVA and refuse `chinese_clip_vision_model`.
Chinese-CLIP's vision tower is CLIP's in all but name: the same settings, layers and tensor names.
"""

import json
from pathlib import Path

import torch
from transformers import AutoImageProcessor, ChineseCLIPVisionModel, CLIPVisionModel, LlavaConfig

from meme_llava import DATA
from meme_llava.convert.offloading import offload_weights
from meme_llava.dataset.collator import to_pixel_values
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.model.llava import load_processing, make_empty_model, quiet_transformers, to_disk_name
from meme_llava.storage.files import write_json
from meme_llava.storage.tensor_reader import open_model_tensors

CHINESE_CLIP, CLIP = "chinese_clip_vision_model", "clip_vision_model"
SAMPLE_IMAGES = DATA / "images"
COMPARED_IMAGES = 4


def check_exportable(base_folder: Path) -> None:
    """Raise UserError unless `--export clip` has something to do for this base."""
    model_type = _read_config(base_folder)["vision_config"]["model_type"]
    if model_type != CHINESE_CLIP:
        raise UserError(
            f"--export clip: the vision tower of {base_folder} is a {model_type!r}, expected {CHINESE_CLIP!r}. Serving "
            "engines take CLIP and SigLIP towers as they are; leave --export out."
        )


def export_clip_tower(folder: Path) -> None:
    """Name the Chinese-CLIP tower of a merged model as the CLIP tower it is. Tensors and processor stay as they are."""
    config = _read_config(folder)
    config["vision_config"]["model_type"] = CLIP
    write_json(folder / "config.json", config)


@torch.inference_mode()
def verify_exported(base_folder: Path, folder: Path) -> list[tuple[str, str]]:
    """Compare what the exported directory sees with what the model was trained to see, on sample memes.

    Pixels: the exported image processor, as transformers loads it, against training's own. Features: CLIP's tower
    against Chinese-CLIP's, both with the exported weights, after every layer.

    Returns:
        (check, finding) rows.

    Raises:
        UserError: a pixel or a feature differs in a single bit.
    """
    policy = load_processing(base_folder).image_policy
    with quiet_transformers():
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    images = [open_image(path) for path in sorted(SAMPLE_IMAGES.iterdir())[:COMPARED_IMAGES]]
    trained_pixels = torch.stack([to_pixel_values(image, policy) for image in images])  # (images, 3, size, size)
    exported_pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    if not torch.equal(trained_pixels, exported_pixels):
        raise UserError(f"{folder}: its image processor gives other pixels than training; report this as a bug")
    trained = _list_hidden_states(ChineseCLIPVisionModel, base_folder, folder, trained_pixels)
    exported = _list_hidden_states(CLIPVisionModel, folder, folder, exported_pixels)
    if len(trained) != len(exported) or not all(map(torch.equal, trained, exported)):
        raise UserError(f"{folder}: CLIP's tower gives other features than Chinese-CLIP's; report this as a bug")
    return [
        ("export: pixel values", f"same bits on {len(images)} sample memes"),
        ("export: vision features", f"same bits after each of {len(exported) - 1} layers"),
    ]


def _list_hidden_states(
    model_class: type, config_folder: Path, weights_folder: Path, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    config = LlavaConfig.from_pretrained(config_folder, local_files_only=True).vision_config
    with open_model_tensors(weights_folder) as tensors:

        def read(name: str) -> torch.Tensor:
            return tensors.read(to_disk_name(f"model.vision_tower.{name}"))

        tower = offload_weights(make_empty_model(model_class, config), read)
        return tower(pixel_values, output_hidden_states=True).hidden_states  # layers + 1 of (images, positions, hidden)


def _read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
