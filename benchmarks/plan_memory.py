"""Compares the memory that the plan predicts with the memory that real training steps take, without a GPU or a hub.

A random LLaVA of about 200 million parameters trains in float32 on the CPU: LoRA, everything in full, and LoRA with all
layers recomputed, each in a process of its own. Measured is the peak of the process's resident memory over a few
optimizer steps of two device batches each, less what it held before the model was made. It is measured twice: with
glibc giving freed blocks back, which shows what is alive, as the plan counts it; and with glibc's defaults, under which
a process keeps freed blocks of up to 32 MB.

    python benchmarks/plan_memory.py --output plan_memory.json

Takes a few minutes and 6 GB. Exits 1 if a prediction is more than 10 % off what is alive.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import ChineseCLIPVisionConfig, LlavaConfig, Qwen2Config  # noqa: E402

from meme_llava.dataset.collator import PackingCollator  # noqa: E402
from meme_llava.dataset.conversation import IGNORED_LABEL  # noqa: E402
from meme_llava.dataset.images import ImagePolicy  # noqa: E402
from meme_llava.model.llava import count_image_tokens  # noqa: E402
from meme_llava.model.packed_attention import SDPA  # noqa: E402
from meme_llava.model.packed_llava import PackedLlava, prepare_packed_llava  # noqa: E402
from meme_llava.model.trainable import prepare_trainable, recompute_layers  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402
from meme_llava.train.planning.memory import StepEstimator  # noqa: E402
from meme_llava.train.planning.plan import GIB  # noqa: E402
from meme_llava.train.settings import TrainArguments, parse_train_arguments  # noqa: E402

CASES = {
    "lora": ["--train_type", "lora", "--gradient_checkpointing", "none"],
    "lora, recomputed": ["--train_type", "lora", "--gradient_checkpointing", "full"],
    "full": ["--train_type", "full", "--gradient_checkpointing", "none"],
}
STEPS, ACCUMULATION, CAPTIONS, CAPTIONS_PER_IMAGE, TEXT_TOKENS, SUPERVISED = 2, 2, 4, 2, 136, 106
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
IMAGE_TOKEN_ID, LARGEST_ERROR = 31_999, 0.10


def make_config() -> LlavaConfig:
    """A LLaVA with the proportions of Qwen2 and ViT, and 144 image tokens."""
    text = Qwen2Config(
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=3072,
        tie_word_embeddings=False,
    )
    vision = ChineseCLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=168,
        patch_size=14,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, vision_feature_layer=-2)


def make_arguments(flags: list[str]) -> TrainArguments:
    required = {
        **{name: "unused" for name in ("model", "annotations", "image_folder", "output_dir")},
        **{"num_train_epochs": 1, "high_lr": 1e-3, "low_lr": 2e-5, "lora_r": 32, "lora_alpha": 64},
        **{"warmup_ratio": 0.1, "model_max_length": 2048, "global_batch_size": CAPTIONS * ACCUMULATION},
        "device_batch_size": CAPTIONS,
    }
    pairs = [word for name, value in required.items() for word in (f"--{name}", str(value))]
    return parse_train_arguments([*pairs, *flags], description="")


def make_batch(config: LlavaConfig) -> dict:
    """A packed batch of captions, some of them about the same image."""
    tokens, size = count_image_tokens(config), config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number in range(CAPTIONS):
        words = torch.randint(0, IMAGE_TOKEN_ID, (TEXT_TOKENS,), generator=generator)
        ids = torch.cat([torch.full((tokens,), IMAGE_TOKEN_ID), words])
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[-SUPERVISED:] = ids[-SUPERVISED:]
        pixels = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        path = Path(f"{number // CAPTIONS_PER_IMAGE}.png")
        examples.append(
            {
                "record_id": str(number),
                "input_ids": ids,
                "labels": labels,
                "image_paths": (path,),
                "pixel_values": [pixels],
            }
        )
    return PackingCollator(IMAGE_TOKEN_ID, tokens, size)(examples)


def make_estimator(config: LlavaConfig, arguments: TrainArguments, batch: dict) -> StepEstimator:
    policy = ImagePolicy(config.vision_config.image_size, (0.5,) * 3, (0.25,) * 3)
    return StepEstimator(config, policy, arguments, batch, 1, on_gpu=False)


def read_resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(flags: list[str]) -> int:
    """Train for a few steps in this process; returns the bytes that it took at its peak beyond those before."""
    arguments, config = make_arguments(flags), make_config()
    batch = make_batch(config)
    estimator = make_estimator(config, arguments, batch)
    before = read_resident("VmRSS")
    model = PackedLlava._from_config(config, dtype=torch.float32)
    prepare_packed_llava(model, estimator.image_policy, SDPA, "random")
    model = prepare_trainable(model, arguments, arguments.seed).train()
    recompute_layers(model, estimator.choose_recomputed(arguments.gradient_checkpointing, memory=0))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    for step in range(STEPS):
        for _ in range(ACCUMULATION):
            model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            # Making the model may have taken more than training does; the optimizer's state exists from now on.
            Path("/proc/self/clear_refs").write_text("5")
    return read_resident("VmHWM") - before


def measure_apart(case: str, settings: dict[str, str]) -> int:
    """`measure` in a process of its own, under these settings of the environment."""
    command = [sys.executable, __file__, "--measure", case]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings})
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(CASES[options.measure]))
        return
    config, rows, figures = make_config(), [], {}
    batch = make_batch(config)
    for case, flags in CASES.items():
        arguments = make_arguments(flags)
        estimator = make_estimator(config, arguments, batch)
        memory = estimator.estimate(estimator.choose_recomputed(arguments.gradient_checkpointing, memory=0))
        alive, resident = (measure_apart(case, settings) for settings in (GIVES_BACK, {}))
        parts = asdict(memory)
        ratio = memory.total / alive
        figures[case] = {**parts, "predicted": memory.total, "alive": alive, "resident": resident, "ratio": ratio}
        shown = [f"{value / GIB:.2f}" for value in (*parts.values(), memory.total, alive, resident)]
        rows.append((case, *shown, f"{ratio:.3f}"))
    parameters = sum(parameter.numel() for parameter in estimator.model.parameters())
    title = f"GiB, {parameters / 1e6:,.0f} million parameters, {batch['input_ids'].numel():,} positions"
    print_table(title, ("what learns", *parts, "predicted", "alive", "resident", "predicted / alive"), rows)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if any(abs(figure["ratio"] - 1) > LARGEST_ERROR for figure in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
