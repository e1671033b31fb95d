"""Captions per second of the published way of training beside ours, one step of ours after another, in one process.

    python benchmarks/throughput.py                       # on a CPU: a model of about 3/32 the size, 5 minutes
    python benchmarks/throughput.py --device cuda         # on one GPU: Qwen2-7B and ViT-L/14-336 in their exact shapes
    python benchmarks/throughput.py --check_losses        # the same losses over 50 steps

The published way pads every caption to model_max_length, computes one at a time, makes all logits in float32, runs all
vision layers and reads images in the main process. Both train LoRA on all thirteen projections and the projector in
full, from the same random weights, on the same records: lengths and captions per image as in the published data. The
ways take turns; every turn is one optimizer step over the global batch. Ratios are medians over the rounds.

Needs torch, transformers, peft and Pillow, and no network.
"""

import argparse
import json
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from throughput_data import MEAN_TEXT_LENGTH, LengthScale, make_records, read_caption_lengths  # noqa: E402
from throughput_devices import Platform  # noqa: E402
from throughput_models import SHAPES, Models, Shapes, make_models, measure_proportions  # noqa: E402
from throughput_rounds import Bench  # noqa: E402
from throughput_ways import LADDER, PUBLISHED, Training, Way, Workload  # noqa: E402

from meme_llava.dataset.sampling import BatchShape  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.flops import TrainingCosts  # noqa: E402
from meme_llava.model.llava import count_image_tokens  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402

# Real captions and the tokenizer that counts them, where somebody put them beside the checkout.
CAPTIONS = ROOT.parent / "shared" / "data" / "captions"
TOKENIZER = ROOT.parent / "shared" / "data" / "qwen_tokenizer"
PUBLISHED_CAPTIONS, PUBLISHED_EPOCHS, PUBLISHED_GPUS = 24_332, 5, 8
CHECKED_STEPS, CHECK_BATCH = 50, BatchShape(global_batch_size=16, device_batch_size=8, processes=1)
CHECK_TOLERANCE = 1e-5


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.check_losses:
        check_losses(arguments.seed)
        return
    platform = Platform.choose(arguments.device)
    shapes = SHAPES[arguments.shapes or ("full" if platform.is_gpu else "scaled")]
    shape = BatchShape(arguments.global_batch_size, arguments.device_batch_size, processes=1)
    with tempfile.TemporaryDirectory() as folder:
        # One step more than there are rounds, for reading ahead.
        workload, source = make_workload(shapes, shape, arguments.rounds + 1, Path(folder), arguments.seed)
        print(f"lengths of captions: {source}")
        if shapes is not SHAPES["full"]:
            print_proportions(shapes, workload)
        models = make_models(shapes, platform, arguments.seed)
        bench = Bench(models, workload, platform, TrainingCosts.of_model(models.packed))
        bench.run_rounds(arguments.rounds)
        rows = bench.summarise()
    print_rows(rows, bench)
    hours = None
    if shapes is SHAPES["full"]:
        hours = PUBLISHED_CAPTIONS * PUBLISHED_EPOCHS / PUBLISHED_GPUS / rows[-1]["captions_per_second"] / 3600
        print(
            f"{PUBLISHED_CAPTIONS:,} captions x {PUBLISHED_EPOCHS} epochs on {PUBLISHED_GPUS} such devices, if they "
            f"share the work without loss: {int(hours)} h {hours % 1 * 60:.0f} min (published, on A800: 5 h 12 min)"
        )
    if arguments.json is not None:
        write_figures(arguments, rows, bench, source, hours)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", choices=SHAPES, help="sizes of the model; full on a GPU, else scaled")
    parser.add_argument("--rounds", type=int, default=5, help="optimizer steps of every way")
    parser.add_argument("--global_batch_size", type=int, default=32, help="captions of an optimizer step")
    parser.add_argument("--device_batch_size", type=int, default=8, help="captions that ours computes at once")
    parser.add_argument("--check_losses", action="store_true", help="compare the losses of all ways instead, on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="draws weights, captions and images")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "global_batch_size", "device_batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.global_batch_size % arguments.device_batch_size:
        parser.error(
            f"--global_batch_size {arguments.global_batch_size} is not a multiple of --device_batch_size "
            f"{arguments.device_batch_size}"
        )
    return arguments


def make_workload(shapes: Shapes, shape: BatchShape, steps: int, folder: Path, seed: int) -> tuple[Workload, str]:
    """Records for a number of steps, their images in `folder`; and where the lengths of their captions come from."""
    lengths, source = None, "the built-in histogram"
    if CAPTIONS.is_dir() and TOKENIZER.is_dir():
        lengths = read_caption_lengths(CAPTIONS, TOKENIZER)
        source = f"{len(lengths):,} real ones, counted with their tokenizer"
    scale = LengthScale(count_image_tokens(shapes.config))
    vocabulary = range(min(shapes.image_token_id, shapes.config.text_config.vocab_size - 1))
    count = steps * shape.global_batch_size
    records = make_records(count, scale, vocabulary, shapes.image_token_id, folder, seed, lengths)
    return Workload.plan(records, scale, shapes.image_policy, shapes.image_token_id, shape, seed), source


def check_losses(seed: int) -> None:
    """Train every way on the same steps from the same start, in float32 without dropout, and compare the losses.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    shapes, platform = SHAPES["tiny"], Platform.choose("cpu")
    with tempfile.TemporaryDirectory() as folder:
        workload, _ = make_workload(shapes, CHECK_BATCH, CHECKED_STEPS, Path(folder), seed)
        models = make_models(shapes, platform, seed)
        losses = {way.name: compute_losses(way, models, workload, platform, CHECKED_STEPS) for way in LADDER}
    published = losses[PUBLISHED.name]
    differences = {
        name: max(abs(one - other) for one, other in zip(published, own, strict=True)) for name, own in losses.items()
    }
    print_table(
        f"Loss over {CHECKED_STEPS} steps of {CHECK_BATCH.global_batch_size} captions",
        ("way", "first", "last", "largest difference"),
        [(name, f"{own[0]:.6f}", f"{own[-1]:.6f}", f"{differences[name]:.1e}") for name, own in losses.items()],
    )
    if max(differences.values()) > CHECK_TOLERANCE:
        raise UserError(f"the losses differ by {max(differences.values()):.1e}, expected at most {CHECK_TOLERANCE}")


def compute_losses(way: Way, models: Models, workload: Workload, platform: Platform, steps: int) -> list[float]:
    """The mean loss of every step, from the models' start values."""
    models.restore()
    training = Training(way, models, platform)
    losses = []
    for step in range(steps):
        batches = workload.list_batches(way, step)
        loaded = workload.load(way, batches, platform)
        loss, _ = training.step(loaded, len(batches), workload.count_supervised(step))
        losses.append(loss.item())
    return losses


def print_proportions(shapes: Shapes, workload: Workload) -> None:
    """Show the model's proportions beside the real ones."""
    full, scale = SHAPES["full"], workload.scale
    text_length = statistics.mean(len(record.input_ids) for record in workload.records) - scale.tokens_per_image
    real = measure_proportions(full, LengthScale(count_image_tokens(full.config)).padded_length, MEAN_TEXT_LENGTH)
    own = measure_proportions(shapes, scale.padded_length, text_length)
    print_table(
        "Proportions of a padded record; parts of the model as shares of the language model's linear layers",
        ("", "real", "here"),
        [(name, f"{real[name]:.3g}", f"{own[name]:.3g}") for name in real],
    )


def print_rows(rows: list[dict], bench: Bench) -> None:
    """Show the ladder, and say which of its steps did not pay."""
    shape = bench.workload.shape
    print_table(
        f"{shape.global_batch_size} captions a step, {shape.device_batch_size} at once in ours; "
        f"{bench.platform.describe()}",
        ("way", "captions/s", "ratio", "step", "positions", "GiB", "MFU"),
        [
            (
                row["way"],
                f"{row['captions_per_second']:.2f}",
                f"{row['times_published']:.2f}",
                f"{row['times_step_before']:.2f}",
                f"{row['positions_per_caption']:.1f}",
                f"{row['peak_gib']:.2f}",
                f"{row['share_of_ceiling']:.0%}",
            )
            for row in rows
        ],
    )
    memory = (
        "all that the device held (an 80 GB card has 79.1)"
        if bench.platform.is_gpu
        else "tensors of a device batch, weights apart"
    )
    print(
        "ratio: captions/s beside the published way, step: beside the row above (medians over the rounds)\n"
        f"positions: computed per caption; GiB: {memory}\n"
        f"MFU: share of the ceiling, {max(bench.ceilings) / 1e12:.3g} TFLOP/s in large matrix multiplications; "
        f"ours computes {rows[-1]['teraflops_per_second']:.3g}"
    )
    for row in rows:
        if row["gradient_checkpointing"]:
            print(f"{row['way']}: DID NOT FIT without gradient checkpointing; measured with it")
        if row["times_step_before"] <= 1 and row is not rows[0]:
            print(f"{row['way']}: DOES NOT PAY here")


def write_figures(
    arguments: argparse.Namespace,
    rows: list[dict],
    bench: Bench,
    source: str,
    projected_hours: float | None,
) -> None:
    """Write everything that was measured, and on what."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    figures = {
        "settings": settings,
        "device": bench.platform.describe(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft")},
        "caption_lengths": source,
        "ceiling_teraflops": [ceiling / 1e12 for ceiling in bench.ceilings],
        "ways": rows,
        "projected_hours": projected_hours,
    }
    arguments.json.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(f"every figure: {arguments.json}")


if __name__ == "__main__":
    main()
