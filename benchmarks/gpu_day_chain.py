"""Row of gpu_day.py: build, train, resume, merge and infer by the product's own scripts, at the size of the real model.

The weights are random. Training is stopped by SIGTERM to its whole process tree, data workers among them, as Slurm does
it, and goes on from the checkpoint that it leaves.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
from gpu_day_results import FAIL, LAST_WORDS, NOT_RUN, Result, parse_row_arguments, reporting  # noqa: E402

from meme_llava.errors import Stopped  # noqa: E402
from meme_llava.storage.run_record import list_checkpoints, read_step, verify_directory  # noqa: E402

BENCHMARKS = ROOT / "benchmarks"
IMAGE = ROOT / "data" / "images" / "meme_000000.jpg"
STEPS_BEFORE_SIGNAL, STEPS, SAVE_STEPS = 3, 7, 3
# As run.sh has it for the published run, and the same small.
GLOBAL_BATCH, DEVICE_BATCH = {"full": 64, "tiny": 8}, {"full": 8, "tiny": 4}
POLL_SECONDS = 0.1


class Chain:
    """The folders and commands of one run."""

    def __init__(self, scale: str, device: str, work_dir: Path):
        self.scale, self.device = scale, device
        self.folder = work_dir / "chain"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base, self.trained, self.merged = (self.folder / name for name in ("base", "trained", "merged"))

    def run(self, *command: object) -> str:
        """Run one of the product's scripts. Returns what it printed; raises RuntimeError with its last words."""
        print("$", *command, flush=True)
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        if done.returncode != 0:
            raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip()[-LAST_WORDS:]}")
        return done.stdout

    def build(self) -> None:
        """Random towers, and the base model made of them."""
        models = BENCHMARKS / "full_size_models.py"
        towers = {name: self.folder / name for name in ("language_model", "vision_tower")}
        for name, folder in towers.items():
            self.run(models, name, "--folder", folder, "--scale", self.scale, "--device", self.device)
        flags = [word for name, folder in towers.items() for word in (f"--{name.replace('tower', 'model')}", folder)]
        self.run(ROOT / "build_base_model.py", *flags, "--output_dir", self.base, "--no_verify")
        for folder in towers.values():
            shutil.rmtree(folder)  # the base has their weights

    def list_train_command(self) -> list[object]:
        """train.py with the published settings."""
        data = ROOT / "data"
        workers = [] if self.device == "cuda" else ["--dataloader_workers", 1]
        return [
            *(ROOT / "train.py", "--model", self.base, "--annotations", data / "annotations.json"),
            *("--image_folder", data),
            *("--output_dir", self.trained, "--train_type", "lora", "--num_train_epochs", 5, "--max_steps", STEPS),
            *("--high_lr", "1e-3", "--low_lr", "2e-5", "--warmup_ratio", "0.1", "--lora_r", 32, "--lora_alpha", 64),
            *("--model_max_length", 2048, "--global_batch_size", GLOBAL_BATCH[self.scale]),
            *("--device_batch_size", DEVICE_BATCH[self.scale], "--save_steps", SAVE_STEPS, "--report_to", "none"),
            *workers,
        ]

    def list_merge_command(self) -> list[object]:
        """merge_lora.py for a model in bf16."""
        return [
            *(ROOT / "merge_lora.py", "--adapter", self.trained, "--output_dir", self.merged),
            *("--dtype", "bfloat16"),
        ]

    def train_until_signal(self) -> tuple[int, float]:
        """Train, and when the first checkpoint is there, signal it and all below it. Returns exit code and
        seconds from the signal to the end."""
        command = [sys.executable, *map(str, self.list_train_command())]
        print("$", *command, flush=True)
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and not list_checkpoints(self.trained):
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            raise RuntimeError(f"training ended with exit code {process.returncode} before its first checkpoint")
        # A moment for the run to begin its next step, so that what the signal saves is a checkpoint of its own.
        time.sleep(POLL_SECONDS)
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        print(f"SIGTERM to {len(family)} processes: {[' '.join(one.cmdline()[:3]) for one in family]}", flush=True)
        start = time.monotonic()
        for member in family:
            os.kill(member.pid, signal.SIGTERM)
        code = process.wait()
        return code, time.monotonic() - start

    def read_log(self, checkpoint: Path) -> list[dict]:
        """The log lines of the steps before a checkpoint."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return [line for line in state["log_history"] if "loss" in line]


def main() -> None:
    arguments = parse_row_arguments(__doc__, "--build")
    end = time.monotonic() + arguments.seconds
    chain = Chain(arguments.scale, arguments.device, arguments.work_dir)
    stages: tuple[tuple[str, Callable[[Chain, Result], None]], ...] = (
        ("steps of train.py, then SIGTERM to the whole process tree", train),
        ("train.py --resume_from_checkpoint latest", resume),
        ("merge_lora.py --dtype bfloat16 --no_verify", merge),
        ("infer.py in bf16 on the device", infer),
        ("merge_lora.py again, compared with base + adapter", verify),
    )
    if arguments.build:
        stages = (("random weights to files, build_base_model.py --no_verify", build),)
    for name, stage in stages:
        if stage is not build and not (chain.base / "run_record.json").is_file():
            Result(name, NOT_RUN, note="there is no base model").print()
            continue
        if end - time.monotonic() < NEEDED_SECONDS.get(stage, 0):
            Result(name, NOT_RUN, note=f"{end - time.monotonic():.0f} s were left").print()
            continue
        with reporting(name) as result:
            start = time.monotonic()
            stage(chain, result)
            result.figures["seconds"] = time.monotonic() - start


def build(chain: Chain, result: Result) -> None:
    """Make the base model; nothing else can follow without it."""
    chain.build()
    size = sum(path.stat().st_size for path in chain.base.glob("*.safetensors"))
    result.figures["gigabytes"] = size / 1e9


def train(chain: Chain, result: Result) -> None:
    """Three steps or more, and what a signal leaves."""
    code, seconds = chain.train_until_signal()
    newest = list_checkpoints(chain.trained)[-1]
    verify_directory(newest)
    log = chain.read_log(newest)
    result.figures = {
        "exit_code": code,
        "checkpoint_step": read_step(newest),
        "seconds_from_signal_to_end": seconds,
        **summarise_log(log),
    }
    if code != Stopped.exit_code:
        result.status = FAIL
        result.note = f"exit code {code}, expected {Stopped.exit_code}; the newest whole checkpoint is {newest.name}"
    elif len(log) < STEPS_BEFORE_SIGNAL:
        result.status, result.note = FAIL, f"{len(log)} steps in the log, expected {STEPS_BEFORE_SIGNAL} or more"


def summarise_log(log: list[dict]) -> dict:
    """The last line's speed, and all losses."""
    names = ("captions_per_second", "mfu", "data_wait_share", "positions_per_caption")
    figures = {name: log[-1][name] for name in names if log and name in log[-1]}
    return {**figures, "losses": [line["loss"] for line in log], "log": log}


def resume(chain: Chain, result: Result) -> None:
    """From the newest checkpoint to the last step."""
    begun = read_step(list_checkpoints(chain.trained)[-1])
    chain.run(*chain.list_train_command(), "--resume_from_checkpoint", "latest")
    newest = list_checkpoints(chain.trained)[-1]
    log = chain.read_log(newest)
    result.figures = {"from_step": begun, "to_step": read_step(newest), **summarise_log(log)}
    if read_step(newest) != STEPS or len(log) != STEPS:
        result.status, result.note = FAIL, f"expected step {STEPS} and a log line for each step"


def merge(chain: Chain, result: Result) -> None:
    """The standalone model."""
    chain.run(*chain.list_merge_command(), "--no_verify")
    record = json.loads((chain.merged / "run_record.json").read_text(encoding="utf-8"))
    result.figures["lora_merged"] = record["summary"]["lora_merged"]


def verify(chain: Chain, result: Result) -> None:
    """The same, and its answers compared with those of base and adapter."""
    chain.run(*chain.list_merge_command(), "--overwrite")
    record = json.loads((chain.merged / "run_record.json").read_text(encoding="utf-8"))
    result.figures = {name.replace(" ", "_"): value for name, value in record["checks"].items()}


def infer(chain: Chain, result: Result) -> None:
    """An answer about an image; of random weights it means nothing."""
    flags = ("--model", chain.merged, "--dtype", "bfloat16", "--device", chain.device, "--image", IMAGE)
    output = chain.run(ROOT / "infer.py", *flags, "--max_new_tokens", 16, "--json")
    answer = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    result.figures["tokens"] = answer["tokens"]


NEEDED_SECONDS = {resume: 40, merge: 30, infer: 25, verify: 90}


if __name__ == "__main__":
    main()
