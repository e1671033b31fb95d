"""What this process was given of its machine. Without torch."""

import os


def count_cores() -> int:
    """CPU cores that this process may use: a scheduler or container can give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_own_cores() -> int:
    """Its share of them beside the other processes of the run on this node."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
