"""Runs the rows of a GPU day one after another and writes what came out: see gpu_day.sh.

Each row is a process of its own with a time limit; one that fails, hangs or is killed stops no other. After every row
the table and all figures are written anew, so that an interruption loses nothing. The most telling rows come first.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_day_results import FAIL, LAST_WORDS, NOT_RUN, Result, describe_figures, read_results

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
POLL_SECONDS = 0.2
GRACE_SECONDS = 5
LAST_LINES = 4


@dataclass(frozen=True)
class Row:
    """One process of the day.

    Args:
        flags: of its script, besides --scale, --device and --work_dir.
        least: seconds without which it is not begun.
        most: seconds after which it is ended.
    """

    name: str
    title: str
    script: str
    least: int
    most: int
    flags: tuple[str, ...] = ()


# The most telling rows come first. Rows of one stage run at the same time; those whose speed counts run alone.
STAGES = (
    (Row("step", "one device batch of the 7B model", "gpu_day_step.py", 40, 170),),
    (Row("ladder", "the published way and ours", "gpu_day_ladder.py", 50, 140),),
    (
        Row("kernels", "attention kernels against float32 on the CPU", "gpu_day_kernels.py", 20, 90),
        Row("build", "a base model of the real size", "gpu_day_chain.py", 60, 150, ("--build",)),
        Row("samples", "run.sh as it stands, on the GPU", "gpu_day_samples.py", 60, 200, ("--train",)),
    ),
    (
        Row("chain", "the scripts at the 7B model's size", "gpu_day_chain.py", 60, 300),
        Row("scores", "what the sample model reads", "gpu_day_samples.py", 30, 150),
    ),
    (Row("compile", "the same device batch, compiled", "gpu_day_variants.py", 40, 150),),
)
ROWS = {row.name: row for stage in STAGES for row in stage}


class Day:
    """The results so far, and how much time is left."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.results: dict[str, list[Result]] = {}
        self.seconds: dict[str, float] = {}
        self.header = describe_machine(arguments)
        self._start = time.monotonic()
        self._running: list[tuple[Row, RowProcess]] = []

    def stop(self) -> None:
        """End what runs."""
        for _, process in self._running:
            process.kill()

    @property
    def left(self) -> float:
        return self.arguments.minutes * 60 - (time.monotonic() - self._start)

    def run(self) -> None:
        """Run every stage, and write the results after each row."""
        for stage in STAGES:
            running: list[tuple[Row, RowProcess]] = []
            self._running = running
            for row in stage:
                if row.name not in self.arguments.only:
                    continue
                if self.left < row.least:
                    note = f"{self.left:.0f} s were left of --minutes {self.arguments.minutes:g}"
                    self._keep(row, [Result(row.title, NOT_RUN, note=note)], 0.0)
                else:
                    limit = min(row.most, self.left - GRACE_SECONDS)
                    running.append((row, RowProcess(row, self.arguments, limit)))
            while running:
                time.sleep(POLL_SECONDS)
                for row, process in list(running):
                    if process.is_over():
                        running.remove((row, process))
                        self._keep(row, process.finish(), process.seconds)

    def _keep(self, row: Row, results: list[Result], seconds: float) -> None:
        self.results[row.name], self.seconds[row.name] = results, seconds
        for result in results:
            print(f"[{row.name}] {result.status}: {result.row}. {describe_figures(result.figures)} {result.note}")
        self.write()

    def write(self) -> None:
        """Write both files anew, each whole or not at all."""
        output = self.arguments.output
        figures = {
            **self.header,
            "rows": {
                name: {"seconds": self.seconds[name], "results": [asdict(result) for result in results]}
                for name, results in self.results.items()
            },
        }
        _replace(output / "gpu_day.json", json.dumps(figures, ensure_ascii=False, indent=2) + "\n")
        _replace(output / "gpu_day.md", "\n".join(self.list_table()) + "\n")

    def list_table(self) -> list[str]:
        """The table as Markdown."""
        lines = [f"{name.replace('_', ' ')}: {value}  " for name, value in self.header.items()]
        lines += ["", "| row | result | figures | note |", "|---|---|---|---|"]
        for results in self.results.values():
            for result in results:
                cells = (result.row, result.status, describe_figures(result.figures), result.note)
                cleaned = (" ".join(str(cell).split()).replace("|", r"\|") for cell in cells)
                lines.append(f"| {' | '.join(cleaned)} |")
        return lines

    @property
    def all_passed(self) -> bool:
        return all(result.status != FAIL for results in self.results.values() for result in results)


class RowProcess:
    """A row that runs."""

    def __init__(self, row: Row, arguments: argparse.Namespace, limit: float):
        self._row, self._limit = row, limit
        self._log = arguments.output / f"{row.name}.log"
        command = [sys.executable, BENCHMARKS / row.script, "--scale", arguments.scale, "--device", arguments.device]
        command += ["--work_dir", arguments.work_dir, "--seconds", str(int(limit)), *row.flags]
        print(f"[{row.name}] {row.title}, at most {limit:.0f} s", flush=True)
        self._start = time.monotonic()
        self.seconds = 0.0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_over(self) -> bool:
        """Whether it ended, or was ended because its time is over."""
        self.seconds = time.monotonic() - self._start
        if self._process.poll() is not None:
            return True
        if self.seconds < self._limit:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """End it and all that it started."""
        kill_tree(self._process.pid)
        self._process.wait()

    def finish(self) -> list[Result]:
        """Its results; a failure more if it ended badly."""
        output = self._log.read_text(encoding="utf-8", errors="replace")
        results = read_results(output)
        if self._process.returncode != 0:
            last = " / ".join([line for line in output.splitlines() if line.strip()][-LAST_LINES:])
            code = self._process.returncode
            end = f"ended after {self.seconds:.0f} s" if code == -signal.SIGKILL else f"exit code {code}"
            rest = "what followed" if results else self._row.title
            results.append(Result(rest, FAIL, note=f"{end}: {last[-LAST_WORDS:]}"))
        return results


def kill_tree(pid: int) -> None:
    """Kill a process and everything that it started, in sessions of their own, too."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def describe_machine(arguments: argparse.Namespace) -> dict[str, str]:
    """What the results were measured on, and how."""
    libraries = []
    for name in LIBRARIES:
        try:
            libraries.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            libraries.append(f"no {name}")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    devices = []
    if shutil.which("nvidia-smi"):
        devices = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    cores = len(os.sched_getaffinity(0))
    # All that decides what is measured, given or not; folders do not.
    flags = ["--minutes", f"{arguments.minutes:g}", "--scale", arguments.scale, "--device", arguments.device]
    flags += ["--only", *arguments.only]
    return {
        "device": "; ".join(devices) or "CPU",
        "machine": f"{cores} CPU cores, Linux {platform.release()}, Python {platform.python_version()}",
        "libraries": ", ".join(libraries),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": " ".join(["bash benchmarks/gpu_day.sh", *flags]),
    }


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_day.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10, help="the day ends after that many")
    parser.add_argument("--output", type=Path, default=Path("output_gpu_day"), help="gets table, figures and logs")
    parser.add_argument(
        "--work_dir", type=Path, help="gets the models, 50 GB at full scale, and is emptied; in --output"
    )
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny rehearses every row in minutes")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="only these rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where torch can use it, else cpu")
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.absolute()
    arguments.work_dir = (arguments.work_dir or arguments.output / "work").absolute()
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu" and arguments.scale == "full":
        parser.error("no GPU that torch can use is here; --scale tiny rehearses the day on a CPU")
    if arguments.work_dir.exists():
        parser.error(f"{arguments.work_dir} is there already; delete it, or choose another --work_dir")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.work_dir.mkdir(parents=True)
    day = Day(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        day.run()
    finally:
        day.stop()
        shutil.rmtree(arguments.work_dir, ignore_errors=True)
        day.write()
        signal.signal(signal.SIGTERM, before)
    print(f"table: {arguments.output / 'gpu_day.md'}; every figure: {arguments.output / 'gpu_day.json'}")
    return 0 if day.all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
