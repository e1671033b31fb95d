"""Runs in processes of their own: training under a launcher, with faults or without, and run.sh; what they leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from conftest import ROOT, train_flags
from safetensors.torch import load_file

from meme_llava.storage.run_record import verify_directory

RUN_SECONDS = 180
FAULTY_TRAIN = str(ROOT / "tests" / "faults" / "inject.py")
# Dropout is on, a step takes two rounds, and checkpoints fall inside passes over the eight records.
RECIPE = {"max_steps": 6, "save_steps": 2, "lora_dropout": 0.1, "global_batch_size": 4, "device_batch_size": 1}


@dataclass(frozen=True)
class Result:
    code: int
    output: str  # of both streams
    seconds: float


def make_command(world, output_dir: Path, processes: int, launcher_flags=(), **changes) -> list[str]:
    """The command line of a run of six steps on the tiny world: under the launcher, but for a single process."""
    script = [FAULTY_TRAIN, *train_flags(world, output_dir, **{**RECIPE, **changes})]
    if processes == 1 and not launcher_flags:
        return [sys.executable, *script]
    launcher = ["-m", "meme_llava.distributed.launch", "--nproc_per_node", str(processes), *launcher_flags]
    return [sys.executable, *launcher, *script]


def start(command: list[str], faults=(), log: Path | None = None, **variables) -> subprocess.Popen:
    """Start a command with faults; nothing that it starts outlives the test in a process group of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FAULTS": json.dumps(list(faults)),
        **variables,
    }
    output = subprocess.PIPE if log is None else log.open("wb")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen, since: float) -> Result:
    """Wait for a started command; one that does not end is killed, and the test fails."""
    try:
        output, _ = process.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Result(process.returncode, (output or b"").decode(errors="replace"), time.monotonic() - since)


def run(world, output_dir: Path, processes: int, faults=(), launcher_flags=(), **changes) -> Result:
    """A whole run."""
    since = time.monotonic()
    return finish(start(make_command(world, output_dir, processes, launcher_flags, **changes), faults), since)


def go_on(world, output_dir: Path, processes: int, **changes) -> Result:
    """The same command again, without faults, as run.sh gives it."""
    if any(output_dir.glob("checkpoint-[0-9]*")):
        changes["resume_from_checkpoint"] = "latest"
    return run(world, output_dir, processes, **changes)


def list_whole_checkpoints(output_dir: Path) -> list[int]:
    """The steps of all checkpoints; each must verify, for nothing half-written may have such a name."""
    found = sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit())
    for step in found:
        verify_directory(output_dir / f"checkpoint-{step}")
    return found


def weights_equal(one: Path, other: Path) -> bool:
    """Whether two outputs hold the same weights to the last bit."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def find_processes(output_dir: Path) -> list[psutil.Process]:
    """Processes of a run that are alive, with the launcher."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(output_dir) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(condition, seconds: float) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def strip_settings(output: str) -> str:
    """Output without the tables, so that a message is not found in a setting's name."""
    return "\n".join(line for line in output.splitlines() if not re.match(r"^ {2}\w+ {2,}", line))


def run_with_torchrun(flags, processes=2, environment=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run(
        [*command, *flags], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def run_sh(*arguments: str, script: Path | str = ROOT / "run.sh", cwd: Path = ROOT, **variables: str):
    """The finished process of run.sh on the CPU, in the environment of the tests, with variables set."""
    environment = {**os.environ, "VENV": "active", "GPUS": "cpu", **variables}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
