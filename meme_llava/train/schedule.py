"""How long a run is: device batches a step, steps, warmup."""

import math

from meme_llava.errors import UserError
from meme_llava.train.settings import TrainArguments


def derive_accumulation(arguments: TrainArguments, processes: int) -> int:
    """Device batches per optimizer step. Raises UserError when the global batch does not divide."""
    per_round = arguments.device_batch_size * processes
    if arguments.global_batch_size % per_round:
        raise UserError(
            f"--global_batch_size {arguments.global_batch_size} is not a multiple of --device_batch_size "
            f"{arguments.device_batch_size} x {processes} process(es) = {per_round}"
        )
    return arguments.global_batch_size // per_round


def count_steps(arguments: TrainArguments, records: int, first_step: int = 0, first_record: int = 0) -> tuple[int, int]:
    """Optimizer steps and warmup steps of the run. Raises UserError when --warmup_steps fill the run.

    Args:
        first_step: steps that a checkpoint has done.
        first_record: records that those steps trained on, in batches that may have been of another size.
    """
    left = records * arguments.num_train_epochs - first_record
    steps = arguments.max_steps or first_step + max(0, math.ceil(left / arguments.global_batch_size))
    if arguments.warmup_steps is None:
        return steps, min(math.ceil(steps * arguments.warmup_ratio), steps - 1)
    if arguments.warmup_steps >= steps:
        raise UserError(f"warmup takes {arguments.warmup_steps} of {steps} steps; lower --warmup_steps or train longer")
    return steps, arguments.warmup_steps
