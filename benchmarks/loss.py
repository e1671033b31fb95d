"""Time and memory of our LM head's loss beside other ways to compute the same, forward and backward, on one device.

    python benchmarks/loss.py --positions 848 --width 256 --vocabulary 38016

The head is frozen, as with LoRA: only hidden states get a gradient. All ways take turns; times are medians. Memory is
the growth of a fresh process's peak, hidden states and weights not counted. Exits 2 if a gradient differs.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.cross_entropy_head import CrossEntropyHead  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402

CHUNK = 256  # positions, of the ways that go through these in chunks
GRADIENT_TOLERANCE = 1e-5  # of the largest gradient


def make_full_logits(hidden: torch.Tensor, head: CrossEntropyHead, targets: torch.Tensor) -> torch.Tensor:
    """The plain way: logits of all positions in float32."""
    return functional.cross_entropy(functional.linear(hidden, head.weight).float(), targets, reduction="sum")


def checkpoint_chunks(hidden: torch.Tensor, head: CrossEntropyHead, targets: torch.Tensor) -> torch.Tensor:
    """Chunk by chunk, the logits of each computed again in the backward pass."""
    return sum(
        checkpoint(
            make_full_logits, hidden[start : start + CHUNK], head, targets[start : start + CHUNK], use_reentrant=False
        )
        for start in range(0, len(hidden), CHUNK)
    )


def call_torch(hidden: torch.Tensor, head: CrossEntropyHead, targets: torch.Tensor) -> torch.Tensor:
    """torch's own chunked loss."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    return functional.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)


def call_ours(hidden: torch.Tensor, head: CrossEntropyHead, targets: torch.Tensor) -> torch.Tensor:
    """The product's head."""
    return head(hidden, targets, torch.ones(len(hidden)))


WAYS = {
    "full logits": make_full_logits,
    "chunks, checkpointed": checkpoint_chunks,
    "torch's linear_cross_entropy": call_torch,
    "CrossEntropyHead": call_ours,
}


def make_inputs(positions: int, width: int, vocabulary: int) -> tuple[torch.Tensor, CrossEntropyHead, torch.Tensor]:
    """Hidden states that want a gradient, a frozen head, and targets."""
    torch.manual_seed(0)
    head = CrossEntropyHead(width, vocabulary, bias=False).requires_grad_(False)
    return torch.randn(positions, width, requires_grad=True), head, torch.randint(vocabulary, (positions,))


def compute_gradient(name: str, inputs: tuple) -> torch.Tensor:
    """Forward and backward once. Returns the gradient of the hidden states."""
    hidden = inputs[0]
    hidden.grad = None
    WAYS[name](*inputs).backward()
    return hidden.grad


def measure_memory(name: str, sizes: tuple[int, int, int]) -> int:
    """Bytes that a process grows by at its peak. For a process of its own: a peak never falls."""
    inputs = make_inputs(*sizes)
    # Threads and the libraries of matrix multiplication are there before the measurement.
    torch.randn(512, 512) @ torch.randn(512, 512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compute_gradient(name, inputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_seconds(names: list[str], sizes: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one that is not counted.

    Raises:
        UserError: two ways do not give the same gradient.
    """
    inputs = make_inputs(*sizes)
    expected = compute_gradient(names[0], inputs).clone()
    for name in names[1:]:
        difference = float((compute_gradient(name, inputs) - expected).abs().max() / expected.abs().max())
        if difference > GRADIENT_TOLERANCE:
            raise UserError(f"{name}: its gradient differs from that of full logits by {difference:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            compute_gradient(name, inputs)
            seconds[name].append(time.perf_counter() - start)
    return seconds


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=848, help="that carry loss: 8 captions' worth")
    parser.add_argument("--width", type=int, default=256, help="of a hidden state")
    parser.add_argument("--vocabulary", type=int, default=38_016, help="a quarter of Qwen2's")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    sizes = (arguments.positions, arguments.width, arguments.vocabulary)
    has_torch_loss = hasattr(functional, "linear_cross_entropy")
    names = [name for name in WAYS if has_torch_loss or WAYS[name] is not call_torch]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(measure_memory, (name, sizes)) for name in names}
    seconds = measure_seconds(names, sizes, arguments.rounds)
    plain = names[0]
    rows = []
    for name in names:
        ratio = statistics.median(own / full for own, full in zip(seconds[name], seconds[plain], strict=True))
        milliseconds = statistics.median(seconds[name]) * 1e3
        rows.append((name, f"{milliseconds:.0f} ms", f"{ratio:.2f}", f"{peaks[name] / 1e6:.0f} MB"))
    logits = arguments.positions * arguments.vocabulary * 4 / 1e6
    print_table(
        f"Loss of {arguments.positions} positions x {arguments.width} wide x {arguments.vocabulary:,} words, chunks "
        f"of {CHUNK} positions, {torch.get_num_threads()} threads; the logits alone are {logits:.0f} MB",
        ("way", "time", "x full logits", "peak memory"),
        rows,
    )


if __name__ == "__main__":
    main()
