"""Knows how to make a tiny random language model and vision tower, laid out as the hub's real ones are.

The embedded default of run.sh and the tests train on these: Qwen2's architecture and tokenizer format, and a
two-tower Chinese-CLIP in a `pytorch_model.bin`. They know nothing; they only memorise.

    python -m meme_llava.tiny_towers --annotations data/annotations.json --output_dir output/tiny
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ChineseCLIPConfig, ChineseCLIPModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil

from meme_llava.arguments import parse_arguments, to_plain
from meme_llava.checkpoint import RUN_RECORD, describe_environment, write_directory, write_json
from meme_llava.conversation import DEFAULT_SYSTEM
from meme_llava.errors import stop_on_user_error
from meme_llava.model import quiet_transformers
from meme_llava.records import read_records

PROMPT_WORDS_WEIGHT = 100  # the words of every prompt count like those of a hundred records
# Qwen2's own split of text into words, single digits, punctuation and white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Transformers' 0.02 suits wide models; in narrow ones it would let a random layer pass on almost nothing.
INITIALIZER_RANGE = 0.07
VISION_INITIALIZER_FACTOR = 3.0
DIMENSIONS = {
    "language_model": {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384},
    "vision_tower": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192},
}


@dataclass
class TinyTowersArguments:
    annotations: Path = field(metadata={"help": "annotation file whose words the tokenizer learns"})
    output_dir: Path = field(metadata={"help": "gets the folders language_model and vision_tower"})
    image_size: int = field(default=112, metadata={"help": "pixels a side of the vision tower"})
    seed: int = field(default=0, metadata={"help": "draws the weights"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output directory"})


def train_tokenizer(texts: list[str], vocabulary_size: int = 1500) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in Qwen2's format, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Whole phrases as one token would make reading too easy. A Chinese character is three bytes, and byte-level
        # BPE spells each of them with two.
        max_token_length=6,
        show_progress=False,
    )
    prompt_words = [DEFAULT_SYSTEM, "system\n", "user\n", "assistant\n"] * PROMPT_WORDS_WEIGHT
    tokenizer.train_from_iterator(texts + prompt_words, trainer)
    # Control tokens behind the text vocabulary, where Qwen2 has them.
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def make_language_model(folder: Path, texts: list[str], seed: int, **dimensions) -> None:
    """Write a random Qwen2 with its own tokenizer to `folder`."""
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-(len(tokenizer) + 8) // 64) * 64,  # padded, with room for <image>, as Qwen2's is
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tie_word_embeddings=False,
        **{**DIMENSIONS["language_model"], "num_key_value_heads": 2, **dimensions},
    )
    with quiet_transformers():
        Qwen2ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_vision_tower(folder: Path, image_size: int, seed: int, **dimensions) -> None:
    """Write a random two-tower Chinese-CLIP to `folder` the way the hub ships it: one `pytorch_model.bin`."""
    torch.manual_seed(seed + 1)
    config = ChineseCLIPConfig(
        vision_config={
            **DIMENSIONS["vision_tower"],
            "image_size": image_size,
            "patch_size": 14,
            "initializer_factor": VISION_INITIALIZER_FACTOR,
            **dimensions,
        },
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 64,
        },
        projection_dim=16,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model = ChineseCLIPModel(config)
        config.save_pretrained(folder)
        square = {"height": image_size, "width": image_size}
        ChineseCLIPImageProcessorPil(size=square, do_center_crop=False).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make both towers; run.sh calls this for its embedded default."""
    arguments = parse_arguments(TinyTowersArguments, argv, description=__doc__)
    records, _ = read_records(arguments.annotations)
    texts = [turn.text for record in records for turn in record.turns]
    with write_directory(arguments.output_dir, arguments.overwrite) as folder:
        make_language_model(folder / "language_model", texts, arguments.seed)
        make_vision_tower(folder / "vision_tower", arguments.image_size, arguments.seed)
        record = {"stage": "tiny_towers", "settings": to_plain(arguments), "environment": describe_environment()}
        write_json(folder / RUN_RECORD, record)
    print(f"tiny random language model and vision tower: {arguments.output_dir}")


if __name__ == "__main__":
    main()
