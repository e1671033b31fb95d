"""What the launcher tells a process in its environment. Without torch."""

import os


def count_processes() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_rank() -> int:
    """The number of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def find_local_rank() -> int:
    """The number of this process on its node, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count_local_processes() -> int:
    """Processes of the run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process prints and writes for all."""
    return find_rank() == 0
