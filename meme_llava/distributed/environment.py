"""What the launcher tells a process in its environment. Without torch."""

import os


def count_processes() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_rank() -> int:
    """The number of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process prints and writes for all."""
    return find_rank() == 0
