"""Knows how a step is computed: loss, parameter groups, what is logged and saved. A transformers Trainer underneath."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from transformers import Trainer, TrainerCallback, TrainingArguments

from meme_llava.arguments import TrainArguments
from meme_llava.costs import TrainingCosts
from meme_llava.errors import UserError
from meme_llava.throughput import ThroughputMeter, find_own_machine
from meme_llava.trainable import ParameterGroup, load_trained_weights, save_trained_weights

TENSORBOARD_FOLDER = "tensorboard"
WORKERS_PER_GPU = 2
PREFETCHED_BATCHES = 4  # device batches that each worker process holds ready


def count_processes() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes_agree(records: Sequence[str]) -> None:
    """Raise UserError unless all processes train on the same records, given by their places.

    A picture that changes or is checked while the processes start can be bad for one and good for another.
    """
    if not torch.distributed.is_initialized():
        return
    digest = hashlib.sha256("\n".join(records).encode()).hexdigest()
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (len(records), digest))
    if len(set(found)) > 1:
        counts = ", ".join(str(count) for count, _ in found)
        raise UserError(
            f"the processes found different records to train on ({counts} of them); pictures changed while they "
            "started, or this machine's cache of checked pictures differs from another's. Run data/check.py, then "
            "start again."
        )


def derive_accumulation(arguments: TrainArguments, processes: int) -> int:
    """Device batches per optimizer step. Raises UserError when the global batch does not divide."""
    per_round = arguments.device_batch_size * processes
    if arguments.global_batch_size % per_round:
        raise UserError(
            f"--global_batch_size {arguments.global_batch_size} is no multiple of --device_batch_size "
            f"{arguments.device_batch_size} x {processes} process(es) = {per_round}"
        )
    return arguments.global_batch_size // per_round


def count_steps(arguments: TrainArguments, records: int) -> tuple[int, int]:
    """Optimizer steps and warmup steps of the run. Raises UserError when --warmup_steps fill the run."""
    steps = arguments.max_steps or math.ceil(records * arguments.num_train_epochs / arguments.global_batch_size)
    if arguments.warmup_steps is None:
        return steps, min(math.ceil(steps * arguments.warmup_ratio), steps - 1)
    if arguments.warmup_steps >= steps:
        raise UserError(f"warmup takes {arguments.warmup_steps} of {steps} steps; lower --warmup_steps or train longer")
    return steps, arguments.warmup_steps


def choose_bf16(arguments: TrainArguments) -> bool:
    """Whether steps compute in bf16 here. Raises UserError for a precision that this machine does not have."""
    precision, has_gpu = arguments.precision, torch.cuda.is_available()
    if precision in ("bf16", "tf32") and not has_gpu:
        why = "on a CPU it is several times slower than fp32" if precision == "bf16" else "no CPU has it"
        raise UserError(f"--precision {precision} needs a GPU here: {why}")
    if precision in ("auto", "bf16") and has_gpu and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU has no bf16; pass --precision fp32 (fp16 overflows with Qwen2)")
    return precision in ("auto", "bf16") and has_gpu


def make_training_arguments(arguments: TrainArguments, steps: int, warmup: int, accumulation: int) -> TrainingArguments:
    """Our settings as the Trainer's. Starts the process group when there are several processes."""
    use_cpu = not torch.cuda.is_available()
    if use_cpu:
        # DeepSpeed would find the same, with a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    uses_bf16 = choose_bf16(arguments)
    if arguments.deepspeed is not None:
        if "RANK" not in os.environ:
            raise UserError("--deepspeed needs a launcher: torchrun --nproc_per_node GPUS train.py …, as run.sh does")
        check_deepspeed_config(arguments.deepspeed)
    workers = arguments.dataloader_workers
    if workers is None:
        # On a CPU the step itself keeps all cores busy; workers beside it were measured to cost 5 %.
        workers = 0 if use_cpu else WORKERS_PER_GPU
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(arguments.output_dir / TENSORBOARD_FOLDER)
    training_arguments = TrainingArguments(
        output_dir=str(arguments.output_dir),
        per_device_train_batch_size=arguments.device_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        warmup_steps=warmup,
        lr_scheduler_type=arguments.lr_scheduler_type,
        learning_rate=arguments.low_lr,  # the groups carry their own; DeepSpeed's "auto" wants one
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        logging_steps=arguments.logging_steps,
        save_steps=arguments.save_steps,
        save_total_limit=arguments.save_total_limit,
        seed=arguments.seed,
        bf16=uses_bf16,
        tf32=None if use_cpu else arguments.precision == "tf32",
        # Without it several CPU processes would each train alone, into the same directory.
        use_cpu=use_cpu,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=PREFETCHED_BATCHES if workers else None,
        dataloader_pin_memory=not use_cpu,
        report_to=arguments.report_to,
        run_name=arguments.run_name,
        deepspeed=str(arguments.deepspeed) if arguments.deepspeed else None,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        # TrainingOrder holds the order; the same records meet in a step however many processes share it.
        train_sampling_strategy="sequential",
        # The filter would hide a NaN loss as 0.
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
    )
    if training_arguments.n_gpu > 1:
        # torch would split every batch over all of them behind our back, and the global batch would be another one.
        raise UserError(
            f"one process sees {training_arguments.n_gpu} GPUs; start one process a GPU with torchrun, as run.sh does, "
            "or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    if training_arguments.world_size != count_processes():
        raise UserError(
            f"the launcher started {count_processes()} processes but training sees {training_arguments.world_size}"
        )
    return training_arguments


def check_deepspeed_config(path: Path) -> None:
    """Raise UserError for a file that is missing or would overrule the two learning rates."""
    if not path.is_file():
        raise UserError(f"--deepspeed {path}: no such file; configs/deepspeed has the ones that come with us")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed {path}: not JSON ({error})") from error
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"--deepspeed {path}: remove its key {key!r}, which would replace the two learning rates")


class MemeTrainer(Trainer):
    """Trainer with our parameter groups, loss and saved files.

    Args:
        groups: what learns and how fast, from `plan_parameter_groups`.
        epochs_per_step: share of the records that one optimizer step trains on.
        records_per_step: the global batch.
        save_companions: writes processor and run record into a directory that got trained weights.
    """

    def __init__(
        self,
        *,
        groups: list[ParameterGroup],
        epochs_per_step: float,
        records_per_step: int,
        save_companions: Callable[[Path, int], None],
        quarantined_records: int,
        **options,
    ):
        super().__init__(**options)
        # compute_loss divides by the weight of the whole optimizer step.
        self.loss_is_scaled_for_ga = True
        self._meter = ThroughputMeter(
            TrainingCosts.of_model(self.model),
            records_per_step,
            find_own_machine(self.args.device),
            self.args.world_size,
            lambda counts: self.accelerator.reduce(counts.to(self.args.device), "sum").cpu(),
        )
        self._groups = groups
        self._epochs_per_step = epochs_per_step
        self._save_companions = save_companions
        self._quarantined_records = quarantined_records
        self._group_learning_rates: list[float] = []
        self._names_without_gradient: set[str] | None = None

    def create_optimizer(self, model=None):
        # DeepSpeed's set-up calls this twice.
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr")
            self.optimizer = optimizer_class(
                [
                    {"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay}
                    for g in self._groups
                ],
                **options,
            )
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self._meter.fetch(epoch_iterator, num_batches)
        weight = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in batches)
        return batches, self.accelerator.reduce(weight.to(device), "sum")

    def _prepare_inputs(self, inputs):
        # The Trainer's own would round the loss weights to bf16 under DeepSpeed.
        return send_to_device(inputs, self.args.device, non_blocking=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This device batch's share of the mean loss over the optimizer step.

        Every token, or every caption, of an optimizer step weighs the same, whatever its split into devices and
        accumulation: `num_items_in_batch` is the weight of all of it, over all processes.
        """
        outputs = model(**inputs)
        # The engines average gradients over processes; what is wanted is their sum.
        loss = outputs["loss"] * (self.args.world_size / num_items_in_batch).float()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._names_without_gradient is None:
            self._watch_first_gradients()
        return super().training_step(model, inputs, num_items_in_batch)

    def _watch_first_gradients(self) -> None:
        """After the first step, stop if a tensor that should learn got no gradient at all."""
        self._names_without_gradient = {name for group in self._groups for name in group.names}
        handles = []
        for group in self._groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                discard = lambda gradient, name=name: self._names_without_gradient.discard(name)  # noqa: E731
                handles.append(parameter.register_hook(discard))
        self.add_callback(_FirstGradientCheck(self._names_without_gradient, handles))

    def _get_learning_rate(self) -> float:
        # Called once a step, between the optimizer's and the scheduler's step: these are the rates just used.
        self._group_learning_rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()]
        return self._group_learning_rates[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.pop("learning_rate", None) is not None:
            for group, rate in zip(self._groups, self._group_learning_rates, strict=True):
                logs[f"learning_rate/{group.role}"] = rate
        if "loss" in logs:
            logs.update(self._meter.read())
        if self._quarantined_records:
            logs["quarantined_records"] = self._quarantined_records
        # TrainingOrder is one long pass for the Trainer; a user counts passes over the records.
        self.state.epoch = self.state.global_step * self._epochs_per_step
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Below ZeRO-3 every process holds all trainable tensors; gathering 7B parameters to save an adapter would
        # cost 15 GB of memory per process.
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            save_trained_weights(self.model, folder, state_dict)
            # training_args.bin, which Trainer would add, is a pickle and holds tokens in plain text.
            self._save_companions(folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained_weights(self.model, Path(resume_from_checkpoint))


class _FirstGradientCheck(TrainerCallback):
    def __init__(self, names_without_gradient: set[str], handles: list):
        self._names, self._handles = names_without_gradient, handles

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._names:
            raise UserError(
                f"after the first step {len(self._names)} tensors that should learn have no gradient, e.g. "
                f"{', '.join(sorted(self._names)[:3])}"
            )


def leave_process_group() -> None:
    """Wait for all processes and part. Leaving without it can abort one at exit, and torchrun then kills the others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
