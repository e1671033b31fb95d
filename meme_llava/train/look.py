"""What train.py shows without training: the plan (--plan), the first batch as a person reads it (--show_batch)."""

from itertools import groupby, pairwise

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from meme_llava.distributed.environment import choose_engine, count_processes
from meme_llava.errors import UserError, count, printable
from meme_llava.model.accelerators import CPU
from meme_llava.model.flops import count_batch
from meme_llava.model.llava import Processing, load_processing
from meme_llava.model.packing import describe_rows
from meme_llava.train.planning.memory import StepEstimator
from meme_llava.train.planning.plan import find_accelerator, plan_training, print_plan
from meme_llava.train.prepared_run import make_order
from meme_llava.train.run_plan import load_training_records, outline_run
from meme_llava.train.session import derive_accumulation
from meme_llava.train.settings import TrainArguments
from meme_llava.train.start import StartPoint

SAMPLED_RECORDS = 256  # whose batches are made to know the average one
# Real control tokens; text that merely looks like one keeps the colour of text.
SUPERVISED_STYLE, IMAGE_STYLE, CONTROL_STYLE = "bold green", "magenta", "cyan"


def look_at_run(arguments: TrainArguments) -> None:
    """Print what the run would be, or its first batch; nothing is trained, and no GPU is needed."""
    processes = arguments.gpus or count_processes()
    derive_accumulation(arguments, processes)  # raises where the batches do not divide
    # What is planned for several devices is planned for GPUs.
    on_gpu = arguments.plan or torch.cuda.is_available()
    engine = choose_engine(arguments.engine, processes, on_gpu)
    processing = load_processing(arguments.model)
    data = load_training_records(arguments, processing, decode=False)
    run = outline_run(arguments, engine, processes, StartPoint(), processing, data)
    order, collate = make_order(run)
    if arguments.show_batch:
        if rows := describe_rows(processing.config.text_config):
            print(rows)
        print_batch(collate(order.fetch_batch(0)), processing)
        return
    own = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
    if processes > 1 and arguments.accelerator is None and own == CPU:
        raise UserError(f"this plan is for {processes} GPUs, and there is none here; name one with --accelerator")
    size = arguments.device_batch_size
    batches = min(len(order) // size, max(1, SAMPLED_RECORDS // size))
    sample = np.linspace(0, len(order) // size - 1, batches, dtype=np.int64)
    read = (batches + 1) * size
    print(f"planning: reads {read:,} records, then follows the largest batch through the model", flush=True)
    counts = [count_batch(collate(order.fetch_batch(int(number)))) for number in sample]
    largest, accelerator = order.fetch_largest_batch(), find_accelerator(arguments.accelerator or own)
    config, policy, on_gpu = processing.config, processing.image_policy, not accelerator.is_cpu
    estimator = StepEstimator(config, policy, arguments, collate(largest), processes, on_gpu)
    print_plan(plan_training(estimator, counts, accelerator, lambda records: collate(largest[:records])), run)


def print_batch(batch: dict[str, torch.Tensor], processing: Processing, console: Console | None = None) -> None:
    """Print what `PackingCollator` returned as a person reads it: supervised tokens in green and brackets, real control
    tokens in cyan, an image as one word; of a record that shares its beginning with one above, only what it adds."""
    console = console or Console(highlight=False, soft_wrap=True)
    segments, paths, kv_index = (batch[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_index"))
    ids, images, supervised = batch["input_ids"][0].tolist(), batch["image_runs"].unique(), len(batch["loss_targets"])
    console.print(
        f"a device batch of {count(len(ids), 'position')}, {count(len(images), 'image')}, "
        f"{count(supervised, 'supervised position')}"
    )
    learnt = set(zip(batch["loss_positions"].tolist(), batch["loss_targets"].tolist(), strict=True))
    for (start, end), (path_start, path_end) in zip(pairwise(segments), pairwise(paths), strict=True):
        path = kv_index[path_start:path_end]
        shared = len(path) - (end - start)
        # What comes before a position on its path predicts it.
        before = {after: position for position, after in pairwise(path)}
        learns = [(before.get(position), ids[position]) in learnt for position in range(start, end)]
        where = f", continues after position {path[shared - 1]}, sharing {shared} positions" if shared else ""
        console.print(f"\n[bold]positions {start} to {end - 1}[/bold]: {sum(learns)} supervised{where}")
        console.print(_describe_tokens(ids[start:end], learns, processing, start))


def _describe_tokens(ids: list[int], learns: list[bool], processing: Processing, position: int) -> Text:
    """One segment of the row, which begins at a position."""
    encoder, text = processing.encoder, Text()
    controls = {encoder.turn_start_id, encoder.turn_end_id}
    # Of every token: whether it stands for an image, is supervised, is a control token.
    kinds = [(one == encoder.image_token_id, learn, one in controls) for one, learn in zip(ids, learns, strict=True)]
    runs = [
        (kind, [token for _, token in run])
        for kind, run in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0])
    ]
    for before, (kind, tokens), after in zip([None, *runs[:-1]], runs, [*runs[1:], None], strict=True):
        is_image, is_supervised, is_control = kind
        if is_image:
            # Images that stand side by side are one run of tokens.
            images = len(tokens) // processing.tokens_per_image
            name = "image" if images == 1 else f"{images} images"
            text.append(f"<{name}: {len(tokens)} tokens at {position}>", style=IMAGE_STYLE)
        else:
            opens, closes = (is_supervised and not (other and other[0][1]) for other in (before, after))
            words = printable(processing.tokenizer.decode(tokens, skip_special_tokens=False))
            style = CONTROL_STYLE if is_control else SUPERVISED_STYLE if is_supervised else ""
            text.append("【" * opens + words, style)
            text.append("】" * closes, SUPERVISED_STYLE)
        position += len(tokens)
    return text
