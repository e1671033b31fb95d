"""CPU seconds and memory of a training step beside LLaMA-Factory and TRL, on one thin LLaVA; see against_peers.sh.

The model has random weights: Qwen2's shape at width 256 with four layers and all of its vocabulary, a CLIP tower of
width 192 with four layers at 336 pixels. 64 captions of 94 tokens on average are about 32 of the sample memes. Everyone
trains LoRA of rank 32 on all projections, and the projector in full, on eight captions a step, in float32 without
dropout. A step's cost is the difference of a short run and a long one, divided by the steps between them. Runs take
turns, and each round measures the machine's matrix products anew.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCH, FEW = 8, 2
CAPTIONS, SHORTEST, LONGEST = 64, 64, 124  # of characters, each a token
VOCABULARY = 152_064
QUESTION = "使用中文描述图片中的信息"
OURS, LLAMA_FACTORY, TRL = "ours", "LLaMA-Factory", "TRL"
ALONE = "ours, every caption with an image of its own"
# Steps of the long run. Ours are few seconds each, as much as its start varies.
MANY = {OURS: 26, ALONE: 20, LLAMA_FACTORY: 8, TRL: 8}


def call_apart(function: Callable, *arguments):
    """A function's result, from a process of its own: one that is measured starts with the peak RSS of the one that
    starts it, so this one must stay small, without torch."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_inputs(folder: Path) -> None:
    """Write the model, built by build_base_model.py, and the records in the forms that the three read."""
    import torch
    from transformers import ChineseCLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    tiny = ROOT / "data" / "tiny"
    torch.manual_seed(0)
    language, vision, base = (folder / name for name in ("language_model", "vision_tower", "base"))
    for half in (language, vision, base):  # of a call that was ended
        shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(tiny / "language_model", language)
    known = json.loads((language / "config.json").read_text())
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **{name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known},
    )
    Qwen2ForCausalLM(config).save_pretrained(language)
    shape = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **shape)).save_pretrained(vision)
    size = {"height": 336, "width": 336}
    ChineseCLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(vision)
    command = [sys.executable, ROOT / "build_base_model.py", "--language_model", language, "--vision_model", vision]
    subprocess.run([*command, "--output_dir", base], check=True, stdout=subprocess.DEVNULL)

    samples = json.loads((ROOT / "data" / "annotations.json").read_text(encoding="utf-8"))
    images = list(dict.fromkeys(record["image"] for record in samples))[: CAPTIONS // 2]
    words = "".join(record["conversations"][-1]["value"] for record in samples).replace("□", "")
    draw, ours, theirs = random.Random(0), [], []
    for number in range(CAPTIONS):
        start = draw.randrange(len(words) - LONGEST)
        caption = words[start : start + draw.randint(SHORTEST, LONGEST)]
        image = images[number // 2]
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": caption}]
        ours.append({"id": str(number), "image": image, "conversations": turns})
        theirs.append({"conversations": turns, "images": [str(ROOT / "data" / image)]})
    columns = {"messages": "conversations", "images": "images"}
    files = {
        "annotations.json": ours,
        "memes.json": theirs,
        "dataset_info.json": {"memes": {"file_name": "memes.json", "formatting": "sharegpt", "columns": columns}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def make_command(who: str, folder: Path, steps: int, pythons: dict[str, Path]) -> list:
    """What trains that many steps."""
    output = folder / "output"
    if who in (OURS, ALONE):
        flags = {
            "--model": folder / "base",
            "--annotations": folder / "annotations.json",
            "--image_folder": ROOT / "data",
            "--output_dir": output,
            "--train_type": "lora",
            "--high_lr": 1e-3,
            "--low_lr": 2e-5,
            "--lora_r": 32,
            "--lora_alpha": 64,
            "--model_max_length": 2048,
            "--num_train_epochs": 1,
            "--warmup_steps": 0,
            "--max_steps": steps,
            "--global_batch_size": BATCH,
            "--device_batch_size": BATCH,
            "--lora_dropout": 0,
            "--report_to": "none",
            "--shared_images": "true" if who == OURS else "false",
        }
        return [sys.executable, ROOT / "train.py", *(str(part) for pair in flags.items() for part in pair)]
    if who == LLAMA_FACTORY:
        settings = {
            "model_name_or_path": str(folder / "base"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 32,
            "lora_alpha": 64,
            "lora_target": "all",
            "freeze_vision_tower": False,
            "freeze_multi_modal_projector": False,
            "additional_target": "multi_modal_projector",
            "dataset_dir": str(folder),
            "dataset": "memes",
            "template": "llava",
            "cutoff_len": 2048,
            "output_dir": str(output),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "learning_rate": 2e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "fp16": False,
            "disable_gradient_checkpointing": True,
        }
        # Its reader of JSON fails (0.9.5); JSON is YAML, where a number has a dot.
        recipe = folder / "llamafactory.yaml"
        recipe.write_text(json.dumps(settings).replace("2e-05", "2.0e-05"))
        return [pythons[who], "-m", "llamafactory.cli", "train", recipe]
    return [pythons[who], ROOT / "benchmarks" / "against_peers_trl.py", folder, output, str(steps), str(BATCH)]


def measure(command: list, folder: Path, threads: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds with children, and peak RSS in GB of a run. One that fails ends this program."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRUST_REMOTE_CODE": "0",
    }
    start = time.monotonic()
    with (folder / "last_run.log").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status):
        last = (folder / "last_run.log").read_text(errors="replace")[-2000:]
        sys.exit(f"{' '.join(map(str, command[:4]))} … failed:\n{last}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def measure_multiplication(threads: int) -> float:
    """FLOP/s of large matrix products in float32 with so many threads."""
    import torch

    from meme_llava.train.planning.plan import measure_ceiling

    torch.set_num_threads(threads)
    return measure_ceiling(torch.device("cpu"), torch.float32)


def count_flops(folder: Path) -> float:
    """Model FLOPs of a step of ours, as its log counts them."""
    log = json.loads((folder / "output" / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in log if "model_tflops_per_second" in entry][-1]
    return last["model_tflops_per_second"] * 1e12 * BATCH / last["captions_per_second"]


def print_results(found: dict[str, list], flops: dict[str, float], ceiling: float, threads: int) -> None:
    """Print medians over the rounds, and each one's CPU time beside ours."""
    from meme_llava.terminal import print_table

    middle = {who: [statistics.median(values) for values in zip(*runs, strict=True)] for who, runs in found.items()}
    rows = []
    for who, (wall, cpu, memory) in middle.items():
        share = f"{flops[who] / wall / ceiling:.0%}" if who in flops else ""
        rows.append((who, f"{wall:.2f}", f"{cpu:.2f}", f"{cpu / middle[OURS][1]:.1f}", f"{memory:.1f}", share))
    heads = ("", "s a step", "CPU s a step", "times ours", "peak GB", "of matrix products' speed")
    print_table(f"{BATCH} captions a step, {threads} threads", heads, rows)
    print(f"matrix multiplication: {ceiling / 1e12:.3f} TFLOP/s; a step of ours: {flops[OURS] / 1e12:.3f} TFLOP")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="an empty folder, or one of an earlier call")
    parser.add_argument("--llamafactory", type=Path, help="the Python of an environment that has it")
    parser.add_argument("--trl", type=Path, help="the Python of an environment that has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.work_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dataset_info.json").is_file():
        call_apart(make_inputs, folder)
    pythons = {LLAMA_FACTORY: arguments.llamafactory, TRL: arguments.trl}
    everyone = [OURS, ALONE, *(who for who, python in pythons.items() if python is not None)]
    found: dict[str, list] = {who: [] for who in everyone}
    flops: dict[str, float] = {}
    ceilings = []
    for turn in range(arguments.rounds):
        ceilings.append(call_apart(measure_multiplication, arguments.threads))
        for who in everyone:
            few, many = (
                measure(make_command(who, folder, number, pythons), folder, arguments.threads)
                for number in (FEW, MANY[who])
            )
            step = [(after - before) / (MANY[who] - FEW) for before, after in zip(few, many, strict=True)]
            found[who].append((step[0], step[1], many[2]))
            if who in (OURS, ALONE):
                flops[who] = count_flops(folder)
            print(f"round {turn + 1}: {who}: {step[1]:.2f} CPU s a step", flush=True)
    print_results(found, flops, statistics.median(ceilings), arguments.threads)


if __name__ == "__main__":
    main()
