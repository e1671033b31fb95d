"""What train.py shows without training: the plan, the first batch."""

from collections.abc import Callable

import numpy as np
from transformers import LlavaConfig

from meme_llava.dataset.dataset import TrainingOrder
from meme_llava.dataset.images import ImagePolicy
from meme_llava.errors import UserError
from meme_llava.train.planning.accelerators import CPU, find_accelerator, find_own_device
from meme_llava.train.planning.flops import count_batch
from meme_llava.train.planning.plan import SAMPLED_RECORDS, RunOutline, TrainingPlan, plan_training
from meme_llava.train.run import TrainingRun


def plan_run(
    run: TrainingRun, image_policy: ImagePolicy, examples: TrainingOrder, collate: Callable, processes: int
) -> TrainingPlan:
    """Plan the run that train.py would start with these settings.

    Raises:
        UserError: the accelerator is not known or cannot compute in the precision of the settings.
    """
    arguments = run.arguments
    if processes > 1 and arguments.accelerator is None and find_own_device() == CPU:
        raise UserError(f"this plan is for {processes} GPUs, and there is none here; name one with --accelerator")
    batches = len(examples) // arguments.device_batch_size
    count = min(batches, max(1, SAMPLED_RECORDS // arguments.device_batch_size))
    sample = np.linspace(0, batches - 1, count, dtype=np.int64)
    read = (count + 1) * arguments.device_batch_size
    print(f"planning: reads {read:,} records, then follows the largest batch through the model", flush=True)
    outline = RunOutline(
        records=run.data["records"],
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        counts=[count_batch(collate(examples.fetch_batch(int(number)))) for number in sample],
        largest=collate(examples.fetch_largest_batch()),
    )
    accelerator = find_accelerator(arguments.accelerator or find_own_device())
    config = LlavaConfig.from_pretrained(arguments.model, local_files_only=True)
    return plan_training(config, image_policy, arguments, outline, accelerator, processes)
