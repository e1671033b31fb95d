"""Row of gpu_day.py: one device batch of the 7B model beside the plan, where its time goes, and larger batches."""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_day_batches import make_batch, make_estimator, plan_bytes  # noqa: E402
from gpu_day_model import StepBench  # noqa: E402
from gpu_day_results import Result, parse_row_arguments, reporting  # noqa: E402
from gpu_day_variants import run_liger, run_variants  # noqa: E402
from throughput_models import SHAPES  # noqa: E402

from meme_llava.train.planning.plan import GIB, GPU_UTILISATION  # noqa: E402

CAPTIONS = 8
LARGER = ((2, False), (4, True), (8, True))  # times as many captions, and whether layers are computed again
OTHER_SECONDS = 45  # for what follows the variants
NEEDED_SECONDS = 15  # for one more batch


def main() -> None:
    arguments = parse_row_arguments(__doc__)
    end = time.monotonic() + arguments.seconds
    shapes = SHAPES[arguments.scale]
    with reporting("random weights on the device") as made:
        start = time.perf_counter()
        bench = StepBench.make(arguments.scale, arguments.device)
        made.figures = {"seconds": time.perf_counter() - start, "ceiling_tflop_per_second": bench.ceiling / 1e12}
    batch = make_batch(shapes)
    measured = measure(bench, batch, CAPTIONS, recomputes=False)
    with reporting("GPU time of that batch by kind") as result:
        result.figures = bench.profile(batch)
    run_variants(bench, batch, end - OTHER_SECONDS)
    measure(bench, batch, CAPTIONS, recomputes=True)
    with reporting("clipping and AdamW") as result:
        result.figures = {"ms": bench.measure_update()}
    estimator = None
    with reporting("the plan for that batch") as result:
        estimator = make_estimator(shapes, batch, bench.platform.is_gpu)
        for recomputes, name in ((False, "none"), (True, "full")):
            result.figures[f"planned_gib_{name}"] = plan_bytes(estimator, recomputes) / GIB
        if bench.peak is not None and measured.figures:
            result.figures["planned_ms"] = 1e15 * measured.figures["model_tflop"] / (bench.peak * GPU_UTILISATION)
    for times, recomputes in LARGER:
        if end - time.monotonic() < NEEDED_SECONDS:
            break
        larger = make_batch(shapes, times)
        result = measure(bench, larger, times * CAPTIONS, recomputes)
        if result.figures and times == LARGER[0][0]:
            planned = plan_bytes(make_estimator(shapes, larger, bench.platform.is_gpu), recomputes) / GIB
            Result(f"the plan for {times * CAPTIONS} captions", figures={"planned_gib": planned}).print()
    run_liger(bench, batch, end)


def measure(bench: StepBench, batch: dict, captions: int, recomputes: bool) -> Result:
    """Report the figures of a batch."""
    layers = "all layers computed twice" if recomputes else "no layer computed twice"
    with reporting(f"{captions} captions on {captions // 2} images, {layers}") as result:
        bench.recompute(recomputes)
        result.figures = bench.measure(batch)
        result.figures["captions_per_second"] = 1000 * captions / result.figures["ms"]
    bench.recompute(False)
    return result


if __name__ == "__main__":
    main()
