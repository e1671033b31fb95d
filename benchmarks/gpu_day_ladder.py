"""Row of gpu_day.py: captions per second of the published way and of ours, as throughput.py compares them.

Unlike throughput.py each way is measured with and without gradient checkpointing, and its memory stands beside the
plan's. The published way: padded to 2,623 positions, one caption at a time.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_day_batches import make_estimator, plan_bytes  # noqa: E402
from gpu_day_results import FAIL, Result, parse_row_arguments, reporting  # noqa: E402
from throughput import make_workload  # noqa: E402
from throughput_devices import Platform  # noqa: E402
from throughput_models import SHAPES, make_models  # noqa: E402
from throughput_rounds import LOSS_TOLERANCE, Bench, Turn  # noqa: E402
from throughput_ways import LADDER, PUBLISHED, Way, Workload  # noqa: E402

from meme_llava.dataset.sampling import BatchShape  # noqa: E402
from meme_llava.model.accelerators import recognise_accelerator  # noqa: E402
from meme_llava.model.flops import TrainingCosts  # noqa: E402
from meme_llava.train.planning.plan import GIB, measure_ceiling  # noqa: E402

GLOBAL_BATCH, DEVICE_BATCH, ROUNDS = 16, 8, 3
OURS = LADDER[-1]
# (way, gradient checkpointing), the most telling first.
CASES = (
    (PUBLISHED, True),
    (OURS, False),
    (PUBLISHED, False),
    (OURS, True),
    *((way, False) for way in LADDER[1:-1]),
)
SPARE_SECONDS = 15


def main() -> None:
    arguments = parse_row_arguments(__doc__)
    end = time.monotonic() + arguments.seconds - SPARE_SECONDS
    shapes, platform = SHAPES[arguments.scale], Platform.choose(arguments.device)
    shape = BatchShape(GLOBAL_BATCH, DEVICE_BATCH, processes=1)
    with tempfile.TemporaryDirectory() as folder:
        workload, source = make_workload(shapes, shape, ROUNDS + 1, Path(folder), seed=0)
        models = make_models(shapes, platform, seed=0)
        bench = Bench(models, workload, platform, TrainingCosts.of_model(models.packed))
        ceiling = measure_ceiling(platform.device, platform.dtype)
        turns: dict[tuple[Way, bool], list[Turn]] = {}
        for step in range(ROUNDS):
            for way, recomputes in CASES if step % 2 == 0 else reversed(CASES):
                if time.monotonic() < end:
                    take_turn(bench, way, recomputes, step, turns)
        report(bench, turns, ceiling, source)
        plan_memory(workload, shapes, platform)


def take_turn(bench: Bench, way: Way, recomputes: bool, step: int, turns: dict) -> None:
    """One optimizer step of a way; one that does not fit is measured no more."""
    if turns.get((way, recomputes)) is None and step > 0:
        return
    bench.checkpointed = [way.name] if recomputes else []
    try:
        turn = bench.measure_step(way, step)
    except torch.OutOfMemoryError as error:
        Result(describe(way, recomputes), FAIL, note=f"does not fit: {str(error)[:150]}").print()
        return
    turns.setdefault((way, recomputes), []).append(turn)
    print(f"step {step}, {describe(way, recomputes)}: {GLOBAL_BATCH / turn.seconds:.2f} captions/s", flush=True)


def describe(way: Way, recomputes: bool) -> str:
    """A row's title."""
    return f"{way.name}, {'with' if recomputes else 'without'} gradient checkpointing"


def report(bench: Bench, turns: dict, ceiling: float, source: str) -> None:
    """A result for each way: medians over the steps."""
    platform = bench.platform
    accelerator = recognise_accelerator(torch.cuda.get_device_name()) if platform.is_gpu else None
    published = turns.get((PUBLISHED, True))  # absent where it did not fit
    first_losses = [own[0].loss for own in turns.values()]
    for (way, recomputes), own in turns.items():
        with reporting(describe(way, recomputes)) as result:
            seconds = statistics.median(turn.seconds for turn in own)
            speed = statistics.median(turn.flops / turn.seconds for turn in own)
            result.figures = {
                "captions_per_second": GLOBAL_BATCH / seconds,
                "tflop_per_second": speed / 1e12,
                "share_of_measured_ceiling": speed / ceiling,
                "positions_per_caption": statistics.mean(turn.positions for turn in own) / GLOBAL_BATCH,
                "steps": len(own),
                "step_seconds": [turn.seconds for turn in own],
                "losses": [turn.loss for turn in own],
                "caption_lengths": [source],
            }
            if published is not None:
                result.figures["times_published"] = statistics.median(turn.seconds for turn in published) / seconds
            if accelerator is not None and accelerator.peak_tflops:
                result.figures["mfu"] = speed / accelerator.peak_tflops / 1e12
            if own[0].peak_bytes is not None:
                result.figures["peak_gib"] = max(turn.peak_bytes for turn in own) / GIB
            if abs(own[0].loss - statistics.median(first_losses)) > LOSS_TOLERANCE[platform.dtype]:
                result.status, result.note = FAIL, f"its first loss is {own[0].loss}, others have {first_losses}"


def plan_memory(workload: Workload, shapes, platform: Platform) -> None:
    """What the plan says of our largest device batch among those measured."""
    with reporting("the plan for our largest batch of the ladder") as result:
        batches = [batch for step in range(ROUNDS) for batch in workload.list_batches(OURS, step)]
        collated = [next(workload.load(OURS, [batch], Platform.choose("cpu"))) for batch in batches]
        largest = max(collated, key=lambda batch: batch["input_ids"].numel())
        largest.pop("counts")
        estimator = make_estimator(shapes, largest, platform.is_gpu)
        result.figures = {
            "positions": largest["input_ids"].numel(),
            "planned_gib_without": plan_bytes(estimator, recomputes=False) / GIB,
            "planned_gib_with": plan_bytes(estimator, recomputes=True) / GIB,
        }


if __name__ == "__main__":
    main()
