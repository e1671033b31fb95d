"""Row of gpu_day.py: run.sh as it stands, the tiny towers on the sample memes, and what the trained model reads.

Answers are scored on the first of the unseen memes, before training and after it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_day_results import FAIL, LAST_WORDS, NOT_RUN, Result, parse_row_arguments, reporting  # noqa: E402

UNSEEN = ROOT / "data" / "unseen"
SCORED = {"full": 80, "tiny": 3}
TRAIN_FLAGS = {"full": [], "tiny": ["--max_steps", "3"]}


def main() -> None:
    arguments = parse_row_arguments(__doc__, "--train")
    folder = arguments.work_dir / "samples"
    environment = {
        **os.environ,
        "VENV": "active",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUTPUT_DIR": str(folder),
        "GPUS": "1" if arguments.device == "cuda" else "cpu",
    }
    if arguments.train:
        train(folder, TRAIN_FLAGS[arguments.scale], environment)
    else:
        score(folder, SCORED[arguments.scale], environment)


def train(folder: Path, flags: list[str], environment: dict[str, str]) -> None:
    """Build, train and merge with run.sh's own values."""
    with reporting("run.sh build train merge, the tiny towers on the sample memes") as result:
        start = time.monotonic()
        run(["bash", "run.sh", "build", "train", "merge", *flags], environment)
        newest = max((folder / "train").glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
        log = json.loads(newest.read_text(encoding="utf-8"))["log_history"]
        losses = [line["loss"] for line in log if "loss" in line]
        speeds = sorted(line["captions_per_second"] for line in log if "captions_per_second" in line)
        result.figures = {
            "steps": len(losses),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "median_captions_per_second": speeds[len(speeds) // 2],
            "seconds": time.monotonic() - start,
        }


def score(folder: Path, count: int, environment: dict[str, str]) -> None:
    """Evaluate the merged model and the base on the first unseen memes."""
    asked = ["--annotations", UNSEEN / "annotations.json", "--image_folder", UNSEEN, "--limit", count]
    for name, title in (("merged", "after training"), ("base", "before training")):
        row = f"evaluate.py on {count} unseen memes, {title}"
        if not (folder / name / "run_record.json").is_file():
            Result(row, NOT_RUN, note=f"run.sh left no {name}").print()
            continue
        with reporting(row) as result:
            start = time.monotonic()
            output = folder / f"scores_{name}"
            run([sys.executable, "evaluate.py", "--model", folder / name, *asked, "--output_dir", output], environment)
            scores = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["scores"]
            result.figures = {key: score["value"] for key, score in scores.items()}
            result.figures["seconds"] = time.monotonic() - start
            if not scores:
                result.status, result.note = FAIL, "nothing was scored"


def run(command: list, environment: dict[str, str]) -> None:
    """Run a command of the product; raises RuntimeError with its last words."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip()[-LAST_WORDS:]}")


if __name__ == "__main__":
    main()
