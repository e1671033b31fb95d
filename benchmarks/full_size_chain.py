"""The whole chain at the size of the real model on a machine without a GPU: build, two training steps, resume for one
more, merge with its proof, infer. Random weights of Qwen2-7B-Instruct's and Chinese-CLIP ViT-L/14-336's shapes.

    python benchmarks/full_size_chain.py --work_dir FOLDER                 # 24 GiB of memory, 55 GB of disk
    python benchmarks/full_size_chain.py --work_dir FOLDER --scale wide    # full width, two layers of each tower
    python benchmarks/full_size_chain.py --work_dir FOLDER --scale tiny    # every step in two minutes

Steps compute in bf16 where the CPU multiplies it (AVX512_BF16 or AMX), all layers are recomputed, and a step has two
captions. At full size a CPU without bf16 cannot: float32 takes twice the memory. A call that was ended goes on where it
was. Every step is a process of its own; wall times and peaks of memory are printed as a table.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from full_size import describe_machine  # noqa: E402
from full_size_runs import GB, TAIL, Bench, Run  # noqa: E402

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402

MODELS = ROOT / "benchmarks" / "full_size_models.py"
MEME = ROOT / "data" / "images" / "meme_000000.jpg"
MEMORY_BAR = 21.0  # GB of RSS on a machine of 24 GiB
STEPS = {
    "language_model": "a language model with random weights",
    "vision_tower": "a vision tower with random weights",
    "base": "`build_base_model.py`, with its proof",
    "trained": "`train.py`, two steps of two captions, and a checkpoint",
    "resumed": "`train.py --resume_from_checkpoint latest`, one step more",
    "merged": "`merge_lora.py`, with its proof",
    "answer": "`infer.py`, one meme, 8 tokens",
}


def list_commands(work_dir: Path, scale: str) -> dict[str, list]:
    """The command of every step."""
    base, trained, merged = (work_dir / name for name in ("base", "trained", "merged"))
    data = ROOT / "data"
    towers = {name: work_dir / name for name in ("language_model", "vision_tower")}
    train = [
        *(ROOT / "train.py", "--model", base, "--annotations", data / "annotations.json", "--image_folder", data),
        *("--output_dir", trained, "--train_type", "lora", "--num_train_epochs", 1, "--lora_r", 32, "--lora_alpha", 64),
        *("--high_lr", "1e-3", "--low_lr", "2e-5", "--warmup_ratio", "0.1", "--model_max_length", 2048),
        *("--global_batch_size", 2, "--device_batch_size", 2, "--gradient_checkpointing", "full"),
        *("--precision", "bf16" if scale == "full" else "fp32", "--report_to", "none", "--hang_timeout", 7200),
    ]
    dtype = ["--dtype", "bfloat16" if scale == "full" else "float32"]
    return {
        **{name: [MODELS, name, "--folder", folder, "--scale", scale] for name, folder in towers.items()},
        "base": [
            *(ROOT / "build_base_model.py", "--language_model", towers["language_model"]),
            *("--vision_model", towers["vision_tower"], "--output_dir", base),
        ],
        # A longer run, stopped by its number of steps: the second call raises it.
        "trained": [*train, "--max_steps", 2],
        "resumed": [*train, "--max_steps", 3, "--resume_from_checkpoint", "latest", "--allow_changes"],
        "merged": [ROOT / "merge_lora.py", "--adapter", trained, "--output_dir", merged],
        "answer": [
            *(ROOT / "infer.py", "--model", merged, "--image", MEME, "--max_new_tokens", 8, "--json"),
            *("--device", "cpu", *dtype),
        ],
    }


def print_table(work_dir: Path, runs: dict[str, dict], scale: str) -> None:
    """The steps as a Markdown table."""
    print(describe_machine(work_dir))
    print("\n| Step | Time | Peak memory (RSS) | Not shared with the page cache |\n|---|---|---|---|")
    for step, run in runs.items():
        peak, own = run["peak_rss"] / GB, run["peak_anonymous"] / GB
        print(f"| {STEPS[step]} | {run['seconds']:.0f} s | {peak:.2f} GB | {own:.2f} GB |")
    highest = max(run["peak_rss"] for run in runs.values()) / GB
    if scale == "full":
        print(f"\nThe highest peak is {highest:.1f} GB, at most {MEMORY_BAR:g} GB are wanted.")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="gets a folder for each scale: models and results")
    parser.add_argument("--scale", choices=("full", "wide", "tiny"), default="full")
    return parser.parse_args(argv)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    work_dir = arguments.work_dir.absolute() / arguments.scale
    work_dir.mkdir(parents=True, exist_ok=True)
    record = work_dir / "chain.json"
    done: dict[str, dict] = json.loads(record.read_text()) if record.is_file() else {}
    bench = Bench(work_dir)
    for step, command in list_commands(work_dir, arguments.scale).items():
        if step in done:
            continue
        # What a call that was ended left of the step. `resumed` goes on in the folder of `trained`.
        bench.remove(work_dir / step)
        run: Run = bench.run_script(step, *command, may_fail=True)
        if run.exit_code:
            raise UserError(f"{step}: {run.note}; its output ends with\n{run.output[-TAIL:]}")
        done[step] = asdict(run) | {"output": run.output[-TAIL:]}
        record.write_text(json.dumps(done, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print_table(work_dir, done, arguments.scale)
    print(done["answer"]["output"].splitlines()[-1])


if __name__ == "__main__":
    main()
