"""Captions per second from annotation and image files to packed batches, without a model.

python benchmarks/input_pipeline.py --annotations train.json --image_folder memes --tokenizer qwen2_tokenizer
python benchmarks/input_pipeline.py --annotations train.json --image_folder memes --model output_7b/base \
    --captions_per_image 2.25 --captions captions.jsonl

"cold" drops the image files from the page cache first, as in the first epoch; "cached" reads them from there.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from meme_llava.dataset import images  # noqa: E402
from meme_llava.dataset.collator import PackingCollator  # noqa: E402
from meme_llava.dataset.conversation import IMAGE_PLACEHOLDER, ConversationEncoder  # noqa: E402
from meme_llava.dataset.dataset import LoadedData, TrainingOrder, load_records  # noqa: E402
from meme_llava.dataset.findings import RecordPolicy  # noqa: E402
from meme_llava.dataset.images import ImagePolicy  # noqa: E402
from meme_llava.dataset.records import read_records  # noqa: E402
from meme_llava.dataset.sampling import BatchShape  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.llava import load_processing  # noqa: E402
from meme_llava.model.loading import LOCALLY  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402

# Chinese-CLIP ViT-L/14-336.
SIZE, TOKENS_PER_IMAGE = 336, 576
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_LENGTH = 2048
GLOBAL_BATCH_SIZE = 64
QUESTION = f"{IMAGE_PLACEHOLDER}\n这张表情包写了什么，是什么意思？"
# Simulated records repeat captions; small images cost as much as a run would have them cost.
ALLOWED = ("duplicate_id", "duplicate_caption", "refusal", "loop", "too_small")


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    encoder, policy = load_encoder_and_policy(arguments)
    with tempfile.TemporaryDirectory() as folder:
        annotations = arguments.annotations
        if arguments.captions_per_image is not None:
            annotations = simulate_records(arguments, Path(folder) / "records.json")
        record_policy = RecordPolicy(bad_records="quarantine", allow=list(ALLOWED))
        data = load_records(annotations, arguments.image_folder, record_policy, encoder, MAX_LENGTH, policy)
    paths = sorted({path for checked in data.checked.usable for path in checked.image_paths})
    images, records = len(paths), len(data.dataset)
    print(f"{records:,} records on {images:,} images, {data.dataset.lengths.mean():.1f} positions each", flush=True)
    rows = []
    for workers, is_cold in itertools.product(arguments.workers, (True, False)):
        # A process of its own for every row, or the peak memory of one would stand in the next.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), share_data, (data, encoder, policy)) as pool:
            measured = pool.submit(measure_loading, arguments, workers, paths if is_cold else []).result()
        rows.append((workers, "cold" if is_cold else "cached", *measured))
    columns = ("workers", "files", "captions/s", "images/s", "positions", "peak MiB", "a worker's")
    print_table(f"Loading, {len(os.sched_getaffinity(0))} CPUs", columns, rows)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), share_data, (data, encoder, policy)) as pool:
        captions, stages = pool.submit(measure_stages, arguments).result()
    total = stages.pop("all")
    stages["the rest"] = total - sum(stages.values())
    shares = [(name, f"{seconds:.2f}", f"{seconds / total:.1%}") for name, seconds in stages.items()]
    print_table("Stages of one epoch in one thread, files cached", ("stage", "CPU seconds", "share"), shares)
    print(f"{captions / total:.0f} captions a CPU second")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, default=ROOT / "data" / "annotations.json")
    parser.add_argument("--image_folder", type=Path, default=ROOT / "data")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="base model, for its tokenizer and image policy")
    source.add_argument("--tokenizer", type=Path, help=f"tokenizer folder; images become {SIZE}x{SIZE} pixels")
    parser.add_argument("--captions_per_image", type=float, help="simulate N records an image")
    parser.add_argument("--captions", type=Path, help="JSONL with 'description', the answers of simulated records")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device_batch_size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    if GLOBAL_BATCH_SIZE % arguments.device_batch_size:
        parser.error(f"--device_batch_size is {arguments.device_batch_size}, expected a divisor of {GLOBAL_BATCH_SIZE}")
    if arguments.captions is not None and arguments.captions_per_image is None:
        parser.error("--captions needs --captions_per_image")
    return arguments


def load_encoder_and_policy(arguments: argparse.Namespace) -> tuple[ConversationEncoder, ImagePolicy]:
    """What a model folder says, or the published model's policy with a tokenizer of its own."""
    if arguments.model is not None:
        processing = load_processing(arguments.model)
        return processing.encoder, processing.image_policy
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, **LOCALLY)
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, TOKENS_PER_IMAGE, str(arguments.tokenizer))
    return encoder, ImagePolicy(SIZE, MEAN, STD)


def simulate_records(arguments: argparse.Namespace, path: Path) -> Path:
    """Write records about the images of the annotation file, as many an image as asked for on average."""
    records, _ = read_records(arguments.annotations)
    images = list(dict.fromkeys(path for record in records for path in record.images))
    answers = [turn.text for record in records for turn in record.turns if turn.role == "assistant"]
    if arguments.captions is not None:
        lines = arguments.captions.read_text(encoding="utf-8").splitlines()
        answers = [text for line in lines if (text := json.loads(line).get("description", "").strip())]
        if not answers:
            raise UserError(f"{arguments.captions}: has no line with a 'description'")
    endless = itertools.cycle(answers)
    values = []
    for number, image in enumerate(images, start=1):
        for _ in range(round(number * arguments.captions_per_image) - len(values)):
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": next(endless)}]
            values.append({"id": str(len(values)), "image": image, "conversations": turns})
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


# What the process of a measurement inherits.
shared: dict = {}


def share_data(data: LoadedData, encoder: ConversationEncoder, policy: ImagePolicy) -> None:
    shared.update(data=data, encoder=encoder, policy=policy)


def make_order_and_collator(arguments: argparse.Namespace, epochs: int) -> tuple[TrainingOrder, PackingCollator]:
    """The same parts that train.py puts together, for one process."""
    dataset, encoder = shared["data"].dataset, shared["encoder"]
    steps = max(1, len(dataset) * epochs // GLOBAL_BATCH_SIZE)
    shape = BatchShape(GLOBAL_BATCH_SIZE, arguments.device_batch_size, processes=1)
    order = TrainingOrder(dataset, steps, shape, seed=0, shared_images=True)
    return order, PackingCollator(encoder.image_token_id, encoder.tokens_per_image, shared["policy"].size)


def measure_loading(arguments: argparse.Namespace, workers: int, cold_paths: list[Path]) -> tuple:
    """Go through one cold epoch, or all epochs; returns rates and peak memory as the table shows them."""
    order, collator = make_order_and_collator(arguments, 1 if cold_paths else arguments.epochs)
    for path in cold_paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started, images, positions = time.perf_counter(), 0, 0
    for batch in DataLoader(order, arguments.device_batch_size, collate_fn=collator, num_workers=workers):
        images += len(batch["pixel_values"])
        positions += batch["input_ids"].shape[1]
    seconds = time.perf_counter() - started
    own, worker = (
        resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    captions = len(order)
    rates = f"{captions / seconds:.0f}", f"{images / seconds:.0f}", f"{positions / captions:.1f}"
    return *rates, own, worker if workers else "-"


def measure_stages(arguments: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """Captions of one epoch, and CPU seconds of every stage and of all together, in one thread as loaders have."""
    torch.set_num_threads(1)
    order, collator = make_order_and_collator(arguments, 1)
    seconds: dict[str, float] = defaultdict(float)

    def watch(owner, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args, **options):
            started = time.process_time()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.process_time() - started

        setattr(owner, name, watched)

    watch(images, "open_header")
    for name in ("open_image", "fit_to_square"):
        watch(collator, name)
    watch(PackingCollator, "__call__")
    started = time.process_time()
    for _ in DataLoader(order, arguments.device_batch_size, collate_fn=collator):
        pass
    return len(order), {
        "open": seconds["open_header"],
        "decode": seconds["open_image"] - seconds["open_header"],
        "resize": seconds["fit_to_square"],
        "collate": seconds["__call__"],
        "all": time.process_time() - started,
    }


if __name__ == "__main__":
    main()
