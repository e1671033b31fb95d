"""The training step: loss, parameter groups, what is logged and saved, on a transformers Trainer."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from meme_llava.distributed.engine_setup import check_engine_runs
from meme_llava.distributed.engines import DEEPSPEED, FSDP, Engine
from meme_llava.distributed.environment import is_main_process
from meme_llava.distributed.heartbeat import Heartbeat
from meme_llava.distributed.processes import StopRequest, WorkerStart
from meme_llava.errors import NonFiniteError
from meme_llava.model.trainable import ParameterGroup, save_trained_weights
from meme_llava.storage.manifest import read_manifest
from meme_llava.storage.run_record import RATE_PREFIX
from meme_llava.train.checkpoints import CheckpointContent, write_checkpoint
from meme_llava.train.evaluation import EvaluationCallback, EvaluationInterrupted, TrainingEvaluation
from meme_llava.train.muon import MuonWithAdamW
from meme_llava.train.optimizer_state import OPTIMIZER_PREFIX, TrainingState
from meme_llava.train.planning.flops import TrainingCosts
from meme_llava.train.step_guard import FiniteCheck, FirstGradientCheck, StepGuard
from meme_llava.train.throughput import RECORD_IDS, ThroughputMeter, find_own_accelerator

# Launchers and schedulers end a process 30 seconds after they asked it to stop.
LONG_SAVE_SECONDS = 20


class MemeTrainer(Trainer):
    """Trainer with our parameter groups, loss and checkpoints.

    Args:
        groups: what learns and how fast, from `plan_parameter_groups`.
        engine: what is to hold the model; anything else is an error.
        epochs_per_step: share of the records that one optimizer step trains on.
        records_per_step: the global batch.
        content: of a checkpoint.
        request: whether a signal asked this process to stop.
        evaluation: of the model while it trains, if there is one.
    """

    def __init__(
        self,
        *,
        groups: list[ParameterGroup],
        engine: Engine,
        epochs_per_step: float,
        records_per_step: int,
        content: CheckpointContent,
        quarantined_records: int,
        request: StopRequest,
        heartbeat: Heartbeat,
        evaluation: TrainingEvaluation | None = None,
        **options,
    ):
        super().__init__(**options)
        # compute_loss divides by the weight of the whole optimizer step.
        self.loss_is_scaled_for_ga = True
        self._meter = ThroughputMeter(
            TrainingCosts.of_model(self.model),
            records_per_step,
            find_own_accelerator(self.args.device),
            self.args.world_size,
            lambda counts: self.accelerator.reduce(counts.to(self.args.device), "sum").cpu(),
        )
        self._groups = groups
        self._engine = engine
        self._epochs_per_step = epochs_per_step
        self._content = content
        self._quarantined_records = quarantined_records
        self._heartbeat = heartbeat
        self._soundness = FiniteCheck()
        self._guard = StepGuard(self._soundness, request, heartbeat)
        self.add_callback(self._guard)
        if evaluation is not None:
            self._evaluation = evaluation
            self.add_callback(EvaluationCallback(evaluation, self.evaluate))
        self._group_learning_rates: list[float] = []
        self._names_without_gradient: set[str] | None = None

    @property
    def stopped_by(self) -> str | None:
        """The signal that ended training before its last step, if one did."""
        return self._guard.stopped_by if self.state.global_step < self.state.max_steps else None

    def create_optimizer(self, model=None):
        # DeepSpeed's set-up calls this twice.
        if self.optimizer is None and any(group.uses_muon for group in self._groups):
            self.optimizer = MuonWithAdamW(self._groups)
        elif self.optimizer is None:
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

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # train.py put the checkpoint's weights into the model. DeepSpeed in bf16 rounds what it is given.
        weights = None
        if resume_from_checkpoint is not None and self._engine.kind == DEEPSPEED and self.args.bf16:
            weights = {
                name: parameter.detach().clone()
                for group in self._groups
                for name, parameter in zip(group.names, group.parameters, strict=True)
            }
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check_engine_runs(self._engine, self.model_wrapped)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self._make_state().load(folder, weights, read_manifest(folder)["updates"])
            self._set_schedule(self.state.global_step)
        return prepared

    def _make_state(self) -> TrainingState:
        return TrainingState(self._engine, self._groups, self.optimizer.optimizer)

    def _set_schedule(self, step: int) -> None:
        # A LambdaLR's rates follow from the step alone.
        scheduler = self.lr_scheduler
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, rates
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        # Accelerate's loader iterates over one that it wraps, and that is the one which starts the workers.
        starts_workers = getattr(loader, "base_dataloader", loader)
        # A scheduler's SIGTERM reaches every process of a job; the workers must live until the state is saved.
        starts_workers.worker_init_fn = WorkerStart(starts_workers.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        step = self.state.global_step
        self._heartbeat.beat()
        batches = self._meter.fetch(epoch_iterator, num_batches)
        # Dropout depends on seed, step and process alone, so a resumed run draws what the whole one would have drawn.
        # Not before reading: a loader that starts draws a number, too.
        seed = np.random.SeedSequence([self.args.seed, step, self.args.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        self._soundness.begin([batch.pop(RECORD_IDS) for batch in batches])
        weight = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in batches)
        self._heartbeat.beat()
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
        loss = self._soundness.mark_loss(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._names_without_gradient is None:
            self._watch_first_gradients()
        self._heartbeat.beat()
        loss = super().training_step(model, inputs, num_items_in_batch)
        # One that is not finite would stay in the Trainer's running sum for ever.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        if self._engine.kind == FSDP and self._names_without_gradient:
            # Hooks see nothing of the gradients that FSDP divides.
            self._names_without_gradient -= {name for name, p in model.named_parameters() if p.grad is not None}
        norm = super()._get_grad_norm(model, grad_norm)
        self._soundness.gradients_are_finite = bool(torch.isfinite(torch.as_tensor(norm)))
        if not self._soundness.gradients_are_finite and self._engine.kind != DEEPSPEED:
            # Without gradients Adam updates nothing and counts no update; DeepSpeed has done the same by itself.
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _watch_first_gradients(self) -> None:
        self._names_without_gradient = {name for group in self._groups for name in group.names}
        handles = []
        # FSDP and ZeRO-3 put others in the place of the parameters that the groups name.
        learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name in tuple(self._names_without_gradient):
            discard = lambda gradient, name=name: self._names_without_gradient.discard(name)  # noqa: E731
            handles.append(learning[name].register_hook(discard))
        self.add_callback(FirstGradientCheck(self._names_without_gradient, handles))

    def _get_learning_rate(self) -> float:
        # Called once a step, between the optimizer's and the scheduler's step: these are the rates just used.
        self._group_learning_rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()]
        return self._group_learning_rates[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.pop("learning_rate", None) is not None:
            for group, rate in zip(self._groups, self._group_learning_rates, strict=True):
                logs[f"{RATE_PREFIX}{group.rate_name}"] = rate
        if "loss" in logs:
            logs.update(self._meter.read())
            self._leave_out_skipped(logs)
        if self._quarantined_records:
            logs["quarantined_records"] = self._quarantined_records
        # TrainingOrder is one long pass for the Trainer; a user counts passes over the records.
        self.state.epoch = self.state.global_step * self._epochs_per_step
        super().log(logs, start_time)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """Make the loss since the last line a mean over the steps that counted."""
        guard = self._guard
        steps, skipped = guard.steps_in_window, guard.skipped_in_window
        guard.steps_in_window = guard.skipped_in_window = 0
        if not skipped:
            return
        logs["skipped_steps"] = skipped
        if skipped < steps:
            logs["loss"] *= steps / (steps - skipped)
        else:
            del logs["loss"]
        if not self._soundness.gradients_are_finite:
            logs.pop("grad_norm", None)

    def evaluate(self, *unused, **options) -> dict[str, float]:
        """Evaluate on the validation records; nothing comes of it where the run is asked to stop."""
        figures = {}
        with self._meter.leave_out(), contextlib.suppress(EvaluationInterrupted):
            figures = self._evaluation.evaluate(
                self.state.global_step,
                self.model,
                self.args.device,
                self._measure,
                contextlib.nullcontext if self._engine.kind == DEEPSPEED else self.accelerator.autocast,
                lambda: self._guard.stop_if_asked(self.control),
            )
            self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _measure(self, batch: Mapping) -> torch.Tensor:
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.model_wrapped(**self._prepare_inputs(batch))["loss"]
        self.model_wrapped.train()
        return loss

    def _save_checkpoint(self, model, trial) -> None:
        step, start = self.state.global_step, time.monotonic()
        self._heartbeat.beat()
        state = self._make_state()
        updates = state.count_updates()
        write_checkpoint(
            Path(self.args.output_dir),
            step,
            state.nbytes,
            lambda folder: self._write_files(folder, state),
            lambda: {**self._content.make_manifest_metadata(step), "updates": updates},
            self._content.keep,
        )
        seconds = time.monotonic() - start
        if seconds > LONG_SAVE_SECONDS and is_main_process():
            print(
                f"writing a checkpoint took {seconds:.0f} s; a scheduler that ends jobs must ask them earlier than "
                "that (Slurm: --signal=TERM@SECONDS)",
                flush=True,
            )

    def _write_files(self, folder: Path, state: TrainingState) -> list[Path]:
        """Write this process's files of a checkpoint."""
        weights = state.gather_weights()
        self._heartbeat.beat()
        written = state.write_moments(folder)
        if not is_main_process():
            return written
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            raise NonFiniteError(
                f"{len(broken)} weights are not finite, e.g. {broken[0]}; nothing was saved, and the newest checkpoint "
                "is sound. Lower --low_lr and --high_lr."
            )
        save_trained_weights(self.model, folder, weights)
        self._content.write_sidecars(folder, self.state.global_step)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # training_args.bin, which Trainer would add, is a pickle and holds tokens in plain text.
        return [*written, *(path for path in folder.iterdir() if not path.name.startswith(OPTIMIZER_PREFIX))]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Does nothing: train.py has put the weights into the model, whatever the engine."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Does nothing: every step seeds its own."""
