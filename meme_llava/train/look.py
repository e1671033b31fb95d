"""What train.py shows without training: the plan, the first batch."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from transformers import LlavaConfig

from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.dataset.dataset import TrainingOrder
from meme_llava.dataset.images import ImagePolicy
from meme_llava.dataset.inspection import Inspection
from meme_llava.distributed.engines import choose_engine
from meme_llava.distributed.environment import count_processes
from meme_llava.errors import UserError
from meme_llava.model.flops import CPU, count_batch
from meme_llava.model.llava import Processing, load_processing
from meme_llava.train.planning.accelerators import find_accelerator, find_own_device
from meme_llava.train.planning.plan import SAMPLED_RECORDS, RunOutline, TrainingPlan, plan_training, print_plan
from meme_llava.train.prepared_run import make_collator, make_order
from meme_llava.train.run_plan import (
    RunInputs,
    RunPlan,
    StartPoint,
    load_training_records,
    plan_run,
)
from meme_llava.train.session import derive_accumulation
from meme_llava.train.settings import TrainArguments


def look_at_run(arguments: TrainArguments) -> None:
    """Print what the run would be, or its first batch; nothing is trained, and no GPU is needed."""
    processes = arguments.gpus or count_processes()
    derive_accumulation(arguments, processes)  # raises where the batches do not divide
    # What is planned for several devices is planned for GPUs.
    on_gpu = arguments.plan or torch.cuda.is_available()
    engine = choose_engine(arguments.engine, processes, on_gpu, arguments.muon_lr)
    processing = load_processing(arguments.model)
    data = load_training_records(arguments, processing, Inspection(decode=False))
    run = plan_run(arguments, engine, processes, RunInputs(StartPoint(), processing, data))
    collator, order = make_collator(arguments, processing), make_order(run, data)
    if arguments.show_batch:
        print_batch(collator(order.fetch_batch(0)), processing)
    else:
        print_plan(estimate_run(run, processing.image_policy, order, collator))


def estimate_run(run: RunPlan, image_policy: ImagePolicy, order: TrainingOrder, collate: Callable) -> TrainingPlan:
    """What the run would take, in memory and time.

    Raises:
        UserError: the accelerator is not known or cannot compute in the precision of the settings.
    """
    arguments, processes = run.arguments, run.processes
    if processes > 1 and arguments.accelerator is None and find_own_device() == CPU:
        raise UserError(f"this plan is for {processes} GPUs, and there is none here; name one with --accelerator")
    batches = len(order) // arguments.device_batch_size
    count = min(batches, max(1, SAMPLED_RECORDS // arguments.device_batch_size))
    sample = np.linspace(0, batches - 1, count, dtype=np.int64)
    read = (count + 1) * arguments.device_batch_size
    print(f"planning: reads {read:,} records, then follows the largest batch through the model", flush=True)
    outline = RunOutline(
        records=run.data["records"],
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        counts=[count_batch(collate(order.fetch_batch(int(number)))) for number in sample],
        largest=collate(order.fetch_largest_batch()),
    )
    accelerator = find_accelerator(arguments.accelerator or find_own_device())
    config = LlavaConfig.from_pretrained(arguments.model, local_files_only=True)
    return plan_training(config, image_policy, arguments, outline, accelerator, processes)


SUPERVISED_STYLE = "bold green"
IMAGE_STYLE = "magenta"
# Real control tokens; text that merely looks like one keeps the colour of text.
CONTROL_STYLE = "cyan"


def print_batch(batch: dict[str, torch.Tensor], processing: Processing, console: Console | None = None) -> None:
    """Print a packed batch as a person reads it: supervised tokens in green and brackets, real control tokens in
    cyan, an image as one word; of a record that shares its beginning with one above, only what it adds.

    Args:
        batch: what `PackingCollator` returns.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    ids, segments, paths = (batch[name].tolist() for name in ("input_ids", "cu_seqlens_q", "cu_seqlens_k"))
    ids, kv_index = ids[0], batch["kv_index"].tolist()
    images, supervised = len(set(batch["image_runs"].tolist())), len(batch["loss_targets"])
    console.print(f"one packed row of {len(ids)} positions, {images} images, {supervised} supervised positions")
    learnt = set(zip(batch["loss_positions"].tolist(), batch["loss_targets"].tolist(), strict=True))
    for (start, end), (path_start, path_end) in zip(pairwise(segments), pairwise(paths), strict=True):
        path = kv_index[path_start:path_end]
        shared = len(path) - (end - start)
        # What comes before a position on its path predicts it.
        before = {after: position for position, after in pairwise(path)}
        labels = [
            ids[position] if (before.get(position), ids[position]) in learnt else IGNORED_LABEL
            for position in range(start, end)
        ]
        count = sum(label != IGNORED_LABEL for label in labels)
        where = f", continues after position {path[shared - 1]}, sharing {shared} positions" if shared else ""
        console.print(f"\n[bold]positions {start} to {end - 1}[/bold]: {count} supervised{where}")
        console.print(_describe_tokens(ids[start:end], labels, processing, start))


def _describe_tokens(ids: list[int], labels: list[int], processing: Processing, first_position: int) -> Text:
    controls = {processing.encoder.turn_start_id, processing.encoder.turn_end_id}
    kinds = [(_kind(token, label, processing), token in controls) for token, label in zip(ids, labels, strict=True)]
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        (kind, is_control), follows = kinds[start], kinds[end][0] if end < len(ids) else None
        if kind == "image":
            # Images that stand side by side are one run of tokens.
            count = (end - start) // processing.tokens_per_image
            name = "image" if count == 1 else f"{count} images"
            text.append(f"<{name}: {end - start} tokens at {first_position + start}>", style=IMAGE_STYLE)
        else:
            is_supervised = kind == "supervised"
            words = processing.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            opens = is_supervised and (start == 0 or kinds[start - 1][0] != kind)
            style = CONTROL_STYLE if is_control else SUPERVISED_STYLE if is_supervised else ""
            text.append("【" * opens + words, style)
            text.append("】" if is_supervised and follows != kind else "", SUPERVISED_STYLE)
        start = end
    return text


def _kind(token: int, label: int, processing: Processing) -> str:
    if token == processing.encoder.image_token_id:
        return "image"
    return "supervised" if label != IGNORED_LABEL else "prompt"
