"""Meme-LLaVA: build, train, merge and ask vision-language models that read Chinese memes.

Here: folders of the checkout, and the cores that this process was given.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
DATA = ROOT / "data"

# peft reads a property that transformers has renamed; a user can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

# With this package bitsandbytes, which peft imports, runs code that it fetches from a hub, on CPUs that have bf16;
# without it, it says so in every process. Neither is asked for.
sys.modules["kernels"] = None
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_report_before = sys.excepthook


def _report(kind, error, traceback) -> None:
    """Ctrl-C while libraries load, which takes seconds, is not a fault and has no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr, flush=True)
    else:
        _report_before(kind, error, traceback)


sys.excepthook = _report


def count_cores() -> int:
    """CPU cores that this process may use: a scheduler or container can give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
