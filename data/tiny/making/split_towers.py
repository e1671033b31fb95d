"""A trained LLaVA taken apart: its language model and vision tower become folders as a hub has them.

    python data/tiny/making/split_towers.py --model output/merged --towers output/towers --output_dir data/tiny

The towers that the LLaVA was built from give configuration and tokenizer; only their weights are replaced. The
multi_modal_projector is left behind: who builds a model from the two gets a fresh one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, ChineseCLIPModel, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments, setting, to_plain  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.llava import load_llava  # noqa: E402
from meme_llava.model.loading import LOCALLY, load_strictly, quiet_transformers  # noqa: E402
from meme_llava.storage.folders import write_directory  # noqa: E402
from meme_llava.storage.run_record import write_run_record  # noqa: E402
from meme_llava.storage.tensor_writer import Rounding  # noqa: E402


@dataclass
class SplitArguments:
    model: Path = setting("a merged LLaVA whose towers Qwen2 and Chinese-CLIP are")
    towers: Path = setting("folder with language_model and vision_tower that it was built from")
    output_dir: Path = setting("gets the folders language_model and vision_tower")
    dtype: Literal["float16", "bfloat16", "float32"] = setting("how they are stored", "float16")
    feature_scale: float = setting(
        "factor on the vision tower's features, which changes nothing else; a fresh multi_modal_projector learns "
        "from features of about 1",
        1.0,
        expected="greater than 0",
    )
    overwrite: bool = setting("replace a non-empty output_dir", False)


def put_weights(target: nn.Module, source: nn.Module, what: str) -> None:
    """Give `target` the weights of `source`. Raises UserError if they are not the same model."""
    wanted, found = target.state_dict(), source.state_dict()
    if {name: weight.shape for name, weight in wanted.items()} != {
        name: weight.shape for name, weight in found.items()
    }:
        raise UserError(f"the {what} of --model is not the one of --towers; pass the towers that it was built from")
    target.load_state_dict(found)


@torch.no_grad()
def scale_features(vision_model: nn.Module, factor: float) -> None:
    """Multiply every hidden state of a Chinese-CLIP vision model by `factor`.

    Each layer normalises what it reads, so scaling all that is written to the residual stream scales the stream, and
    what is computed from it stays the same.
    """
    writers = [vision_model.pre_layrnorm]
    for layer in vision_model.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for writer in writers:
        writer.weight *= factor
        writer.bias *= factor


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write both towers of a trained LLaVA, each into a folder of its own."""
    arguments = parse_arguments(SplitArguments, argv, description=__doc__)
    dtype = getattr(torch, arguments.dtype)
    llava = load_llava(arguments.model, torch.float32)
    language_folder, vision_folder = arguments.towers / "language_model", arguments.towers / "vision_tower"
    language_model = load_strictly(Qwen2ForCausalLM, language_folder, dtype=torch.float32)
    two_towers = load_strictly(ChineseCLIPModel, vision_folder, dtype=torch.float32)
    put_weights(language_model.model, llava.model.language_model, "language model")
    put_weights(language_model.lm_head, llava.lm_head, "language model's head")
    put_weights(two_towers.vision_model, llava.model.vision_tower, "vision tower")
    scale_features(two_towers.vision_model, arguments.feature_scale)
    rounding = Rounding(dtype)
    for tower, model in (("language_model", language_model), ("vision_tower", two_towers)):
        for name, weight in model.state_dict().items():
            rounding.apply(f"{tower}: {name}", weight)
    rounding.check()
    with write_directory(arguments.output_dir, arguments.overwrite) as folder, quiet_transformers():
        language_model.to(dtype).save_pretrained(folder / "language_model")
        AutoTokenizer.from_pretrained(language_folder, **LOCALLY).save_pretrained(folder / "language_model")
        two_towers.to(dtype).save_pretrained(folder / "vision_tower")
        AutoImageProcessor.from_pretrained(vision_folder, **LOCALLY).save_pretrained(folder / "vision_tower")
        write_run_record(folder, "split_towers", settings=to_plain(arguments))
    print(f"language model and vision tower: {arguments.output_dir}")


if __name__ == "__main__":
    main()
