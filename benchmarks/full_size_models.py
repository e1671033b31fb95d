"""Makes the random checkpoints of full_size.py: language model, vision tower, and an adapter for the assembled base.

Shapes, dtypes, names, shards and files are those of the real ones; only the values are drawn. The adapter and its run
record come from the product's own training code, on a model without memory behind it.

    python benchmarks/full_size_models.py language_model --folder F --scale full --seed 0 [--tokenizer FOLDER]
    python benchmarks/full_size_models.py vision_tower --folder F --scale full --seed 0
    python benchmarks/full_size_models.py adapter --folder F --base BASE --seed 0
    python benchmarks/full_size_models.py sizes --scale full
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny" / "making")]

import torch  # noqa: E402
from huggingface_hub import split_torch_state_dict_into_shards  # noqa: E402
from make_towers import make_vision_tower, train_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from meme_llava.dataset.records import read_records  # noqa: E402
from meme_llava.distributed.environment import SINGLE, choose_engine  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.llava import load_processing  # noqa: E402
from meme_llava.model.loading import LOCALLY, quiet_transformers  # noqa: E402
from meme_llava.model.trainable import plan_parameter_groups, prepare_trainable, save_trained_weights  # noqa: E402
from meme_llava.storage.files import write_json  # noqa: E402
from meme_llava.storage.folders import write_directory  # noqa: E402
from meme_llava.storage.run_record import describe_file, write_manifest  # noqa: E402
from meme_llava.train.prepared_run import write_sidecars  # noqa: E402
from meme_llava.train.run_plan import load_training_records, plan_run  # noqa: E402
from meme_llava.train.settings import parse_train_arguments  # noqa: E402
from meme_llava.train.start import StartPoint  # noqa: E402

SCALE_RECORD = "benchmark_scale.json"
ANNOTATIONS = ROOT / "data" / "annotations.json"
TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = 152_064
WEIGHT_STD = 0.02
# LoRA starts at B = 0; B of this size changes the weights by a few percent, as training does.
LORA_B_STD = 0.002
DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Scale:
    """Dimensions of both towers, and how large a shard of the language model may be."""

    language: dict
    vision: dict
    image_size: int
    shard_size: str


SCALES = {
    # Qwen2-7B-Instruct with Chinese-CLIP ViT-L/14-336.
    "full": Scale(
        language={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        image_size=336,
        shard_size="4GB",
    ),
    # The same vocabulary, so that any Qwen tokenizer fits.
    "tiny": Scale(
        language={
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        image_size=112,
        shard_size="20MB",
    ),
}
# The same width, few layers.
SCALES["wide"] = replace(
    SCALES["full"],
    language=SCALES["full"].language | {"num_hidden_layers": 2},
    vision=SCALES["full"].vision | {"num_hidden_layers": 3},
)


def make_language_model(
    folder: Path, scale: Scale, tokenizer_folder: Path | None, seed: int, device: str = "cpu"
) -> None:
    """Write a random bf16 Qwen2 to `folder`, laid out as on the hub; a GPU as `device` draws it in seconds."""
    tokenizer = _write_tokenizer(folder, tokenizer_folder)
    ends_turn, ends_text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    config = _describe_language_model(scale, bos_token_id=ends_text, eos_token_id=ends_turn)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": ends_text, "eos_token_id": [ends_turn, ends_text], "pad_token_id": ends_text},
    )
    generator = torch.Generator(device).manual_seed(seed)
    shapes = _list_language_tensors(config)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=scale.shard_size)
    for file_name, names in split.filename_to_tensors.items():
        _write_shard(folder / file_name, {name: shapes[name] for name in names}, generator)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    )


def make_adapter(folder: Path, base: Path, seed: int) -> None:
    """Write what train.py's `lora` writes for `base` after one step on the sample memes, but with drawn values."""
    arguments = parse_train_arguments(
        [
            *("--model", str(base), "--annotations", str(ANNOTATIONS), "--image_folder", str(ANNOTATIONS.parent)),
            *("--output_dir", str(folder), "--train_type", "lora", "--num_train_epochs", "5", "--max_steps", "1"),
            *("--high_lr", "1e-3", "--low_lr", "2e-5", "--lora_r", "32", "--lora_alpha", "64"),
            *("--warmup_ratio", "0.1", "--model_max_length", "2048"),
            *("--global_batch_size", "64", "--device_batch_size", "1"),
        ],
        description="",
    )
    processing = load_processing(base)
    data = load_training_records(arguments, processing)
    plan = plan_run(arguments, choose_engine(SINGLE, 1, on_gpu=False), 1, StartPoint(), processing, data)
    config = LlavaConfig.from_pretrained(base, local_files_only=True)
    config._name_or_path = str(base)
    with torch.device("meta"):
        model = prepare_trainable(LlavaForConditionalGeneration(config), arguments, arguments.seed)
    groups = plan_parameter_groups(model, arguments)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.empty(parameter.shape).normal_(
            std=LORA_B_STD if "lora_B" in name else WEIGHT_STD, generator=generator
        )
        for group in groups
        for name, parameter in zip(group.names, group.parameters, strict=True)
    }
    save_trained_weights(model, folder, drawn)
    learned = {"parameter_groups": [group.describe() for group in groups], "computation": None}
    write_sidecars(folder, processing, {**plan.to_record(plan.steps), **learned})
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    write_manifest(folder, files, plan.make_manifest_metadata(plan.steps))


def compute_sizes(scale: Scale) -> dict[str, int]:
    """Bytes of both towers' weights as they are stored, and their number of tensors."""
    language = _list_language_tensors(_describe_language_model(scale))
    with torch.device("meta"):
        vision_config = ChineseCLIPVisionConfig(image_size=scale.image_size, patch_size=14, **scale.vision)
        vision = ChineseCLIPVisionModel(vision_config).state_dict()
    return {
        **{"language_model": sum(t.nbytes for t in language.values()), "language_tensors": len(language)},
        **{"vision_tower": sum(t.nbytes for t in vision.values()), "vision_tensors": len(vision)},
    }


def _describe_language_model(scale: Scale, **token_ids) -> dict:
    """config.json with the keys that Qwen2-7B-Instruct's has, in the spelling of its time."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        **token_ids,
        "hidden_act": "silu",
        "initializer_range": WEIGHT_STD,
        "max_position_embeddings": 32768,
        "max_window_layers": scale.language["num_hidden_layers"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
        **scale.language,
    }


def _list_language_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Names and shapes of a language model: bf16 tensors without memory, in the order of the layers."""
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.bfloat16).state_dict()


def _write_tokenizer(folder: Path, source: Path | None):
    if source is None:
        records, _ = read_records(ANNOTATIONS)
        tokenizer = train_tokenizer([turn.text for record in records for turn in record.turns])
        with quiet_transformers():
            tokenizer.save_pretrained(folder)
        return tokenizer
    if not (source / "tokenizer_config.json").is_file():
        raise UserError(f"{source}: has no tokenizer_config.json; expected the tokenizer files of a Qwen model")
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCALLY)
    if not {"<|im_end|>", "<|endoftext|>"} <= set(tokenizer.get_added_vocab()):
        raise UserError(f"{source}: lacks <|im_end|> or <|endoftext|>; expected the tokenizer files of a Qwen model")
    return tokenizer


def _write_shard(path: Path, shapes: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Write drawn bf16 tensors as safetensors, without ever holding one whole: save_file would hold a shard twice."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, like in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(like.shape), "data_offsets": [end, end + like.nbytes]}
        end += like.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    buffer = torch.empty(DRAWN_AT_ONCE, device=generator.device)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, like in shapes.items():
            for start in range(0, like.numel(), DRAWN_AT_ONCE):
                part = buffer[: min(DRAWN_AT_ONCE, like.numel() - start)]
                part = part.fill_(1.0) if "norm" in name else part.normal_(std=WEIGHT_STD, generator=generator)
                file.write(part.to(torch.bfloat16).cpu().view(torch.uint8).numpy())


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("language_model", "vision_tower", "adapter", "sizes"))
    parser.add_argument("--folder", type=Path, help="where it goes")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--seed", type=int, default=0, help="draws the values")
    parser.add_argument("--device", default="cpu", help="where a language model's are drawn; cuda takes seconds")
    parser.add_argument("--tokenizer", type=Path, help="folder with Qwen's tokenizer files; else a small one is made")
    parser.add_argument("--base", type=Path, help="the assembled model that the adapter is for")
    arguments = parser.parse_args(argv)
    scale = SCALES[arguments.scale]
    if arguments.what == "sizes":
        print(json.dumps(compute_sizes(scale)))
        return
    if arguments.folder is None or (arguments.what == "adapter") != (arguments.base is not None):
        parser.error("--folder is needed, and --base for an adapter alone")
    if arguments.what == "adapter":
        make_adapter(arguments.folder, arguments.base, arguments.seed)
        return
    with write_directory(arguments.folder, overwrite=False) as folder:
        if arguments.what == "language_model":
            make_language_model(folder, scale, arguments.tokenizer, arguments.seed, arguments.device)
        else:
            make_vision_tower(folder, scale.image_size, arguments.seed, **scale.vision)
        write_json(folder / SCALE_RECORD, {"scale": arguments.scale})


if __name__ == "__main__":
    main()
