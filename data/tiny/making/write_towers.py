"""Writes trained towers as two folders that a hub could have, for build_base_model.py.

    python data/tiny/making/write_towers.py --start output/towers/start --export output/towers/work/export \
        --output_dir output/towers/new
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, ChineseCLIPModel, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from layout import PATCHES, SIDE  # noqa: E402
from make_towers import make_vision_tower  # noqa: E402
from networks import Sizes, make_language_config  # noqa: E402

from meme_llava.model.loading import LOCALLY, load_strictly, quiet_transformers  # noqa: E402
from meme_llava.storage.folders import write_directory  # noqa: E402
from meme_llava.storage.run_record import write_run_record  # noqa: E402


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


def write_vision_tower(weights: dict[str, torch.Tensor], sizes: Sizes, scale: float, folder: Path) -> None:
    """A two-tower Chinese-CLIP; behind the used layers comes one that LLaVA never reads, and is random."""
    with tempfile.TemporaryDirectory() as name:
        random_folder = Path(name)
        make_vision_tower(
            random_folder,
            SIDE,
            seed=0,
            hidden_size=sizes.vision_width,
            num_hidden_layers=sizes.vision_layers + 1,
            num_attention_heads=sizes.vision_heads,
            intermediate_size=sizes.vision_mlp,
            patch_size=SIDE // PATCHES,
            initializer_factor=1.0,
        )
        model = load_strictly(ChineseCLIPModel, random_folder, dtype=torch.float32)
        AutoImageProcessor.from_pretrained(random_folder, **LOCALLY).save_pretrained(folder)
    left = model.vision_model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    unused = f"encoder.layers.{sizes.vision_layers}."
    assert not left.unexpected_keys and all(name.startswith(unused) for name in left.missing_keys), left
    scale_features(model.vision_model, scale)
    model.half().save_pretrained(folder)


def write_language_model(weights: dict[str, torch.Tensor], sizes: Sizes, start: Path, folder: Path) -> None:
    """A Qwen2 with tied embeddings and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(start, **LOCALLY)
    config = make_language_config(sizes)
    config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config.bos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = Qwen2ForCausalLM(config)
    model.model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    model.tie_weights()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write trained towers as two folders.", allow_abbrev=False)
    parser.add_argument("--start", type=Path, required=True, help="what prepare_towers.py wrote")
    parser.add_argument("--export", type=Path, required=True, help="what train_towers.py exported")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets language_model and vision_tower")
    parser.add_argument("--overwrite", action="store_true", help="replace a non-empty output_dir")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    settings = parse_arguments(argv)
    facts = json.loads((settings.export / "facts.json").read_text(encoding="utf-8"))
    sizes = Sizes(**facts["sizes"])
    vision, language = (load_file(settings.export / f"{name}.safetensors") for name in ("vision", "language"))
    with write_directory(settings.output_dir, settings.overwrite) as folder, quiet_transformers():
        write_vision_tower(vision, sizes, facts["scale"], folder / "vision_tower")
        write_language_model(language, sizes, settings.start, folder / "language_model")
        write_run_record(folder, "train_towers", training=facts)
    print(f"towers: {settings.output_dir}")


if __name__ == "__main__":
    main()
