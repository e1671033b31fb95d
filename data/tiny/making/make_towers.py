"""A tiny random language model and vision tower, laid out as the hub's real ones are.

Qwen2's architecture and tokenizer format, and a two-tower Chinese-CLIP in a `pytorch_model.bin`. Those of the command
line can learn to read every character of an alphabet:

    python data/tiny/making/make_towers.py --alphabet alphabet.txt --output_dir output/towers
"""

import json
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ChineseCLIPConfig, ChineseCLIPModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments, setting, to_plain  # noqa: E402
from meme_llava.dataset.conversation import DEFAULT_SYSTEM  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.loading import quiet_transformers  # noqa: E402
from meme_llava.storage.folders import write_directory  # noqa: E402
from meme_llava.storage.run_record import write_run_record  # noqa: E402

ALPHABET_WEIGHT = 50
PROMPT_WORDS_WEIGHT = 100  # the words of every prompt count like those of a hundred records
# Qwen2's own split of text into words, single digits, punctuation and white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Transformers' 0.02 suits wide models; in narrow ones it would let a random layer pass on almost nothing.
INITIALIZER_RANGE = 0.07
VISION_INITIALIZER_FACTOR = 3.0
# What a small model needs in order to learn reading from nothing, found by trial. Tied embeddings carry what is learned
# about copying one character over to all. With a larger factor the random layers of the tower drown the pixels.
READER_LANGUAGE_MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 640,
    "initializer_range": 0.035,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
# One head looks at one place at a time: a letter that lies in several patches has to be gathered by the vision tower.
# Behind it is hardly room to recognise anything. Copying spelled pages it has a loss of 0.006 after 250 steps of 16;
# one layer with four heads and the reader's MLP had 0.09 after 625.
COPIER_LANGUAGE_MODEL = {
    **READER_LANGUAGE_MODEL,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}
READER_VISION_TOWER = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "patch_size": 16,
    "initializer_factor": 1.0,
}
READER_IMAGE_SIZE = 160  # pixels: 10 x 10 patches
READER_PATCH_DEVIATION = 0.02


@dataclass
class TinyTowersArguments:
    output_dir: Path = setting("gets the folders language_model and vision_tower")
    alphabet: Path = setting("text file, each of whose characters becomes a token")
    copier: bool = setting("a language model that can only copy; the vision tower has to recognise", False)
    seed: int = setting("draws the weights", 0)
    overwrite: bool = setting("replace an existing output directory", False)


def read_alphabet(path: Path) -> list[str]:
    """The characters of a text file, each once, without white space. Raises UserError for want of any."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--alphabet {path} cannot be read: {error}; pass a text file in UTF-8") from error
    characters = sorted(set(text) - set(string.whitespace))
    if not characters:
        raise UserError(f"--alphabet {path} has no characters; draw_lessons.py of data/ writes an alphabet.txt")
    return characters


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


def make_vision_tower(folder: Path, image_size: int, seed: int, shows_places: bool = False, **settings) -> None:
    """Write a random two-tower Chinese-CLIP to `folder` the way the hub ships it: one `pytorch_model.bin`.

    `settings` are of its vision part. `shows_places`: see `show_places`.
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
        if shows_places:
            show_places(model.vision_model.embeddings)
        config.save_pretrained(folder)
        square = {"height": image_size, "width": image_size}
        ChineseCLIPImageProcessorPil(size=square, do_center_crop=False).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def show_places(embeddings: torch.nn.Module) -> None:
    """Let every patch begin with where it is, as loud as with what it shows.

    Positions become sines and cosines of row and column, of amplitude 1 and wavelengths from 2 pi to 100 times that
    (Vaswani et al. 2017, section 3.5, half of the channels for each axis). CLIP's own 0.02 is lost beside the pixels.
    """
    weight = embeddings.position_embedding.weight  # (1 + side * side, hidden_size), the class token first
    side, hidden_size = round((weight.shape[0] - 1) ** 0.5), weight.shape[1]
    frequencies = 100 ** -(torch.arange(hidden_size // 4) / (hidden_size // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]  # (side * side, hidden_size / 4)
    patches = embeddings.patch_embedding.weight
    with torch.no_grad():
        weight[1:] = torch.cat([wave for axis in waves for wave in (axis.sin(), axis.cos())], dim=1)
        patches *= READER_PATCH_DEVIATION / patches.std()


def make_reader(language_folder: Path, vision_folder: Path, alphabet: list[str], seed: int, copier: bool) -> None:
    """Write a language model and a vision tower that can learn to read; a `copier` can only say what it is shown."""
    settings = COPIER_LANGUAGE_MODEL if copier else READER_LANGUAGE_MODEL
    # Alone and often, so that no word becomes a token; a Chinese character takes at most two merges of bytes.
    texts, vocabulary_size = alphabet * ALPHABET_WEIGHT, 512 + 2 * len(alphabet)
    make_language_model(language_folder, texts, seed, vocabulary_size, **settings)
    make_vision_tower(vision_folder, READER_IMAGE_SIZE, seed, shows_places=True, **READER_VISION_TOWER)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make both towers."""
    arguments = parse_arguments(TinyTowersArguments, argv, description=__doc__)
    with write_directory(arguments.output_dir, arguments.overwrite) as folder:
        alphabet = read_alphabet(arguments.alphabet)
        language_folder, vision_folder = folder / "language_model", folder / "vision_tower"
        make_reader(language_folder, vision_folder, alphabet, arguments.seed, arguments.copier)
        write_run_record(folder, "tiny_towers", settings=to_plain(arguments))
    print(f"tiny random language model and vision tower: {arguments.output_dir}")


if __name__ == "__main__":
    main()
