"""Runs the steps of full_size.py as processes of their own and keeps their wall times and peaks of memory."""

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from meme_llava.errors import UserError

GB = 1e9
POLL_SECONDS = 0.05
TAIL = 2000  # characters of output that tell why a step failed


@dataclass(frozen=True)
class Run:
    """One process that was measured."""

    step: str
    seconds: float
    peak_rss: int
    peak_anonymous: int
    exit_code: int
    note: str
    output: str

    def __str__(self) -> str:
        memory = f"peak RSS {self.peak_rss / GB:.2f} GB, anonymous {self.peak_anonymous / GB:.2f} GB"
        return f"{self.step}: {self.seconds:.1f} s, {memory}" + (f", {self.note}" if self.note else "")


class MemoryWatch:
    """Follows the anonymous memory of a process and its children, and kills them above a limit."""

    def __init__(self, pid: int, limit: float | None):
        self.peak = 0
        self.note = ""
        self._pid, self._limit = pid, limit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            anonymous = sum(read_kilobytes(f"/proc/{pid}/status", "RssAnon") for pid in list_family(self._pid)) * 1024
            self.peak = max(self.peak, anonymous)
            if self._limit is not None and anonymous > self._limit:
                self.note = f"killed at {anonymous / GB:.1f} GB"
                kill_family(self._pid)
                return

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()


class Bench:
    """Runs steps one after the other and keeps what was measured."""

    def __init__(self, work_dir: Path):
        self.work_dir = work_dir
        self.runs: list[Run] = []

    def run(self, step: str, command: list, memory_limit: float | None = None, may_fail: bool = False) -> Run:
        """Measure one command.

        Raises:
            UserError: it failed and may not.
        """
        # What others left to write must not be written on our time.
        subprocess.run(["sync"], check=True)
        log = self.work_dir / "logs" / f"{len(self.runs):03d}_{step}.txt"
        log.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as file:
            start = time.monotonic()
            # A session of its own, so that it can be killed with its children.
            process = subprocess.Popen(
                [str(word) for word in command], stdout=file, stderr=file, env=environment, start_new_session=True
            )
            watch = MemoryWatch(process.pid, memory_limit)
            try:
                if memory_limit is not None:
                    Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.monotonic() - start
            except BaseException:
                kill_family(process.pid)
                process.wait()
                raise
            finally:
                watch.finish()
        process.returncode = exit_code = os.waitstatus_to_exitcode(status)
        output = log.read_text(errors="replace")
        if exit_code and not watch.note:
            watch.note = "killed by the system" if exit_code == -signal.SIGKILL else f"failed, exit code {exit_code}"
        # A process starts with the peak RSS of the one that starts it: this one must stay small, without torch.
        run = Run(step, seconds, usage.ru_maxrss * 1024, watch.peak, exit_code, watch.note, output)
        print(run, flush=True)
        self.runs.append(run)
        if exit_code and not may_fail:
            raise UserError(f"{step}: {watch.note}; its output ends with\n{output[-TAIL:]}")
        return run

    def run_script(self, step: str, script: Path, *flags, **options) -> Run:
        """Measure one of our programs."""
        return self.run(step, [sys.executable, script, *flags], **options)

    def sync(self, step: str, folder: Path) -> None:
        """Measure how long the files of a folder take to reach the disk."""
        self.run(step, ["sync", *sorted(path for path in folder.rglob("*") if path.is_file())])

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def list_runs(self, step: str) -> list[Run]:
        return [run for run in self.runs if run.step == step]

    def list_seconds(self, step: str, with_sync: bool = False) -> list[float]:
        """Wall times of a step, in the order of the runs."""
        seconds = [run.seconds for run in self.list_runs(step)]
        if with_sync:
            synced = [run.seconds for run in self.list_runs(f"{step}_sync")]
            seconds = [sum(pair) for pair in zip(seconds, synced, strict=True)]
        return seconds

    def compare(self, step: str, other: str, with_sync: bool) -> float:
        """How many times as long as another step this one takes, by their medians."""
        ours, theirs = (statistics.median(self.list_seconds(name, with_sync)) for name in (step, other))
        return ours / theirs


def list_family(pid: int) -> list[int]:
    """A process and all its descendants."""
    family = [pid]
    for parent in family:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += map(int, path.read_text().split())
    return family


def kill_family(leader: int) -> None:
    """Kill a process group, if it still is there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def read_kilobytes(path: str, key: str) -> int:
    """A value of /proc/meminfo or /proc/PID/status; 0 if the process is gone."""
    with contextlib.suppress(OSError), open(path) as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return 0
