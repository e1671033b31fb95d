"""A tiny random language model and vision tower, laid out as the hub's real ones are.

Qwen2's architecture and tokenizer format, and a two-tower Chinese-CLIP in a `pytorch_model.bin`.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ChineseCLIPConfig, ChineseCLIPModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from meme_llava.dataset.conversation import DEFAULT_SYSTEM  # noqa: E402
from meme_llava.model.loading import quiet_transformers  # noqa: E402

PROMPT_WORDS_WEIGHT = 100  # the words of every prompt count like those of a hundred records
# Qwen2's own split of text into words, single digits, punctuation and white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Transformers' 0.02 suits wide models; in narrow ones it would let a random layer pass on almost nothing.
INITIALIZER_RANGE = 0.07
VISION_INITIALIZER_FACTOR = 3.0


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


def make_language_model(folder: Path, texts: list[str], seed: int, vocabulary_size: int = 1500, **settings) -> None:
    """Write a random Qwen2 with its own tokenizer to `folder`; `settings` are of Qwen2Config."""
    tokenizer = train_tokenizer(texts, vocabulary_size)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-(len(tokenizer) + 8) // 64) * 64,  # padded, with room for <image>, as Qwen2's is
        max_position_embeddings=4096,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **{
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "initializer_range": INITIALIZER_RANGE,
            "tie_word_embeddings": False,
            **settings,
        },
    )
    with quiet_transformers():
        Qwen2ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_vision_tower(folder: Path, image_size: int, seed: int, **settings) -> None:
    """Write a random two-tower Chinese-CLIP to `folder` the way the hub ships it: one `pytorch_model.bin`.

    `settings` are of its vision part.
    """
    torch.manual_seed(seed + 1)
    config = ChineseCLIPConfig(
        vision_config={
            "image_size": image_size,
            "patch_size": 14,
            "initializer_factor": VISION_INITIALIZER_FACTOR,
            **settings,
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
