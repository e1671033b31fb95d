"""A data worker leaves signals to the process that trains, and ends when that one says so."""

import subprocess
import sys
import time

from conftest import ROOT
from torch.utils.data import DataLoader

from meme_llava.distributed.processes import leave_signals_to_parent

# An error that keeps the loader's iterator alive until the interpreter ends, where multiprocessing ends the workers.
BREAKS_OFF = """
from torch.utils.data import DataLoader
from meme_llava.distributed.processes import leave_signals_to_parent
batches = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=leave_signals_to_parent))
next(batches)
raise SystemExit(3)
"""


def test_a_worker_outlives_a_signal_from_outside_and_ends_by_its_parents():
    batches = iter(DataLoader(range(1000), num_workers=1, worker_init_fn=leave_signals_to_parent))
    next(batches)
    (worker,) = batches._workers
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)
    time.sleep(0.2)
    assert [next(batches).item() for _ in range(20)] == list(range(1, 21))
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_process_that_breaks_off_does_not_wait_for_its_workers_for_ever():
    command = [sys.executable, "-c", BREAKS_OFF]
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode == 3
