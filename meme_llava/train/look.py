"""What train.py shows without training: the plan, the first batch."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import LlavaConfig

from meme_llava.dataset.dataset import TrainingOrder
from meme_llava.dataset.image_inspection import Inspection
from meme_llava.dataset.images import ImagePolicy
from meme_llava.distributed.engines import check_muon_runs, choose_engine
from meme_llava.distributed.environment import count_processes
from meme_llava.errors import UserError
from meme_llava.model.flops import count_batch
from meme_llava.model.llava import load_processing
from meme_llava.train.inputs import RunInputs, load_training_records
from meme_llava.train.planning.accelerators import CPU, find_accelerator, find_own_device
from meme_llava.train.planning.plan import SAMPLED_RECORDS, RunOutline, TrainingPlan, plan_training, print_plan
from meme_llava.train.prepared_run import make_collator, make_order
from meme_llava.train.resume import StartPoint
from meme_llava.train.run_plan import RunPlan, plan_run
from meme_llava.train.schedule import derive_accumulation
from meme_llava.train.settings import TrainArguments
from meme_llava.train.show_batch import print_batch


def look_at_run(arguments: TrainArguments) -> None:
    """Print what the run would be, or its first batch; nothing is trained, and no GPU is needed."""
    processes = arguments.gpus or count_processes()
    derive_accumulation(arguments, processes)  # raises where the batches do not divide
    # What is planned for several devices is planned for GPUs.
    engine = choose_engine(arguments.engine, processes, arguments.plan or torch.cuda.is_available())
    check_muon_runs(engine, arguments.muon_lr)
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
