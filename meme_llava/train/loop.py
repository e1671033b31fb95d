"""The training loop: the steps of a prepared run in their order, what happens between two of them, the run's result."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import get_scheduler

from meme_llava.distributed.environment import DEEPSPEED, FSDP, Heartbeat, find_rank, is_main_process
from meme_llava.distributed.processes import (
    broadcast_from_main,
    check_engine_runs,
    divide_weights,
    leave_process_group,
    make_accelerator,
)
from meme_llava.errors import NonFiniteError, Stopped
from meme_llava.model.flops import RECORD_IDS, ThroughputMeter
from meme_llava.model.trainable import save_trained_weights
from meme_llava.storage.run_record import (
    RATE_PREFIX,
    RUN_RECORD,
    list_checkpoints,
    read_manifest,
    read_training_log,
    write_training_log,
)
from meme_llava.train.checkpoints import archive_newer_checkpoints, check_room, write_checkpoint, write_final
from meme_llava.train.optimizer_state import OPTIMIZER_PREFIX, TrainingState
from meme_llava.train.prepared_run import PreparedRun, make_loader, make_optimizer, write_sidecars
from meme_llava.train.run_plan import RunPlan
from meme_llava.train.session import Session, StepGuard, watch_first_gradients
from meme_llava.train.trackers import ProgressBar, TrackerRuns, draw_training_curves, open_tracker_runs

# Launchers and schedulers end a process 30 seconds after they asked it to stop.
LONG_SAVE_SECONDS = 20


class TrainingLoop:
    """Trains a prepared run from its start point to its last step, and tells the trackers what is logged; all processes
    make every call together."""

    def __init__(self, run: PreparedRun, session: Session, trackers: TrackerRuns):
        plan = run.plan
        self._run, self._plan, self._arguments = run, plan, plan.arguments
        self._accelerator = make_accelerator(plan.engine, plan.accumulation, run.uses_bf16, run.deepspeed_plugin)
        self._device = self._accelerator.device
        self._heartbeat, self._trackers, self._guard = session.heartbeat, trackers, StepGuard(session.request)
        self._bar = ProgressBar(plan.start.step, plan.steps)
        self._meter = ThroughputMeter(run.model, self._accelerator, self._arguments.global_batch_size)
        self.step = plan.start.step
        self._log_history = read_training_log(plan.start.checkpoint) if plan.start.checkpoint else []
        # Of the steps since the last log line: their losses, and how many were skipped.
        self._losses, self._skipped = [], 0
        self._prepare()
        first, last, every = self.step, plan.steps, self._arguments.save_steps
        saves = last // every - first // every + (last % every > 0)
        room = self._arguments.output_dir, self._state.nbytes, saves, self._arguments.save_total_limit
        broadcast_from_main(lambda: check_room(*room))
        self._evaluation = None
        if plan.validation is not None:
            from meme_llava.train.evaluation import TrainingEvaluation

            ask = self._guard.ask_to_stop
            self._evaluation = TrainingEvaluation(
                run, self._engine_model, self._model, self._accelerator, trackers, self._heartbeat, ask
            )

    def _prepare(self) -> None:
        """Hand model and optimizer to the engine, and take up the checkpoint's state."""
        run, plan, checkpoint, kind = self._run, self._plan, self._plan.start.checkpoint, self._plan.engine.kind
        optimizer = make_optimizer(run.groups)
        # Only its formula is used, so that the rates follow from the step alone.
        self._schedule = get_scheduler(self._arguments.lr_scheduler_type, optimizer, plan.warmup_steps, plan.steps)
        weights = None
        if checkpoint is not None and kind == DEEPSPEED and run.uses_bf16:
            # The checkpoint's are in the model already; DeepSpeed in bf16 rounds what it is given.
            weights = {
                name: parameter.detach().clone()
                for group in run.groups
                for name, parameter in zip(group.names, group.parameters, strict=True)
            }
        if plan.engine.zero_stage == 3:
            divide_weights(run.model, run.deepspeed_plugin, torch.bfloat16 if run.uses_bf16 else torch.float32)
        self._engine_model, self._optimizer = self._accelerator.prepare(run.model, optimizer)
        check_engine_runs(plan.engine, self._engine_model)
        # FSDP shards the model's own modules; the others hold it whole.
        self._model = self._engine_model if kind == FSDP else run.model
        self._state = TrainingState(plan.engine, run.groups, self._optimizer.optimizer)
        if checkpoint is not None:
            self._state.load(checkpoint, weights, read_manifest(checkpoint)["updates"])
        self._engine_model.train()

    def train(self) -> str | None:
        """Train to the last step. Returns the signal that ended it before, if one did."""
        batches = iter(make_loader(self._run, self._device))
        names = [name for group in self._run.groups for name in group.names]
        self._check_first_gradients = watch_first_gradients(names, self._model)
        try:
            # A run that was stopped had no time for the evaluation of the step that it continues from.
            evaluated = {entry["step"] for entry in self._log_history if "eval_loss" in entry}
            if self._is_evaluation_due() and self.step not in evaluated:
                self._evaluate()
            while self.step < self._plan.steps and self._guard.stopped_by is None:
                self._train_step(batches)
                self._finish_step()
        finally:
            self._bar.close()
        return self._guard.stopped_by

    def _train_step(self, batches: Iterator[dict]) -> None:
        """One optimizer step: every token, or every caption, of it weighs the same, however it is split."""
        device_batches, weight = self._fetch(batches)
        self._seed()
        self._set_rates()
        losses = []
        for batch in device_batches:
            self._heartbeat.beat()
            with self._accelerator.accumulate(self._engine_model):
                loss = self._compute_loss(batch, weight)
                # accelerate and DeepSpeed take the mean over device batches; what is wanted is their sum.
                self._accelerator.backward(loss * len(device_batches))
                losses.append(loss.detach())
        self._norm = self._clip_gradients()
        if self._guard.gradients_are_finite:
            self._optimizer.step()
            self._losses.append(sum(losses))
        self._optimizer.zero_grad()
        self.step += 1

    def _fetch(self, batches: Iterator[dict]) -> tuple[list[dict], torch.Tensor]:
        """The step's device batches of this process, and the loss weight of all of the step, over all processes."""
        self._heartbeat.beat()
        device_batches = self._meter.fetch(batches, self._plan.accumulation)
        self._guard.begin([batch.pop(RECORD_IDS) for batch in device_batches])
        weight = sum(batch["loss_weights"].sum(dtype=torch.float64) for batch in device_batches)
        self._heartbeat.beat()
        return device_batches, self._accelerator.reduce(weight.to(self._device), "sum")

    def _seed(self) -> None:
        """Let dropout depend on seed, step and process alone: a resumed run draws what the whole one would have."""
        seed = np.random.SeedSequence([self._arguments.seed, self.step, find_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))

    def _set_rates(self) -> None:
        schedule = self._schedule
        self._rates = [
            base * factor(self.step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _compute_loss(self, batch: Mapping, weight: torch.Tensor) -> torch.Tensor:
        """This device batch's share of the step's mean loss, times the processes: engines average gradients."""
        outputs = self._engine_model(**send_to_device(batch, self._device, non_blocking=True))
        return self._guard.mark_loss(outputs["loss"] * (self._plan.processes / weight).float())

    def _clip_gradients(self) -> float:
        """Clip to max_grad_norm and see whether all is finite, in all processes alike; returns the norm before."""
        if self._check_first_gradients is not None:
            self._check_first_gradients()
            self._check_first_gradients = None
        # DeepSpeed has clipped and stepped already, in its backward.
        limit = self._arguments.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(self._engine_model.parameters(), limit)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self._guard.gradients_are_finite = bool(np.isfinite(norm))
        return norm

    def _finish_step(self) -> None:
        """What follows a step: checks, the log line, evaluation, a checkpoint."""
        step, is_last = self.step, self.step == self._plan.steps
        self._skipped += not self._guard.gradients_are_finite
        self._guard.after_step(step)
        self._bar.update()
        if step % self._arguments.logging_steps == 0 or is_last:
            self._log_training()
        if not self._guard.ask_to_stop() and self._is_evaluation_due():
            self._evaluate()
        if step % self._arguments.save_steps == 0 or is_last or self._guard.stopped_by is not None:
            self._save()
        # Its log line is written, so that an evaluation's would be the last. Saving comes first when a run is to stop.
        if is_last and self._is_evaluation_due() and "eval_loss" not in self._log_history[-1] and is_main_process():
            print(
                f"training is finished, but {self._guard.stopped_by} came before the end of its last evaluation, which "
                "is missing; evaluate.py scores the result",
                flush=True,
            )
        self._heartbeat.beat()

    def _log_training(self) -> None:
        """Log the steps since the last line: the mean loss of those that counted, rates, speed."""
        figures = {}
        if self._losses:
            mean = torch.stack(self._losses).double().mean()
            figures["loss"] = float(self._accelerator.reduce(mean, "mean"))
            if self._guard.gradients_are_finite:
                figures["grad_norm"] = self._norm
        for group, rate in zip(self._run.groups, self._rates, strict=True):
            figures[f"{RATE_PREFIX}{group.role}"] = rate
        figures |= self._meter.read()
        if self._skipped:
            figures["skipped_steps"] = self._skipped
        if self._plan.data.checked.bad:
            figures["quarantined_records"] = len(self._plan.data.checked.bad)
        self._losses, self._skipped = [], 0
        self._log(figures)
        self._bar.show(self.step, figures)

    def _log(self, figures: Mapping[str, float]) -> None:
        epoch = self._plan.count_records(self.step) / len(self._plan.data.dataset)
        self._log_history.append({**figures, "epoch": epoch, "step": self.step})
        self._trackers.log({**figures, "epoch": epoch}, self.step)

    def _is_evaluation_due(self) -> bool:
        """Whether there is an evaluation after the last step done; there is one after the run's last, too."""
        every, step = self._arguments.eval_every, self.step
        return every is not None and step > 0 and (step % every == 0 or step == self._plan.steps)

    def _evaluate(self) -> None:
        """Evaluate on the validation records, unless the run is asked to stop meanwhile."""
        with self._meter.leave_out():
            if (figures := self._evaluation.evaluate(self.step)) is not None:
                self._log(figures)

    def _save(self) -> None:
        step, start = self.step, time.monotonic()
        updates = self._state.count_updates()
        with self._meter.leave_out(), self._heartbeat.wait_longer():
            write_checkpoint(
                self._arguments.output_dir,
                step,
                self._state.nbytes,
                self._write_files,
                lambda: {**self._plan.make_manifest_metadata(step), "updates": updates},
                self._arguments.save_total_limit,
            )
        seconds = time.monotonic() - start
        if seconds > LONG_SAVE_SECONDS and is_main_process():
            print(
                f"writing a checkpoint took {seconds:.0f} s; a scheduler that ends jobs must ask them earlier than "
                "that (Slurm: --signal=TERM@SECONDS)",
                flush=True,
            )

    def _write_files(self, folder: Path) -> list[Path]:
        """Write this process's files of a checkpoint."""
        weights = self._state.gather_weights()
        self._heartbeat.beat()
        written = self._state.write_moments(folder)
        if not is_main_process():
            return written
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            raise NonFiniteError(
                f"{len(broken)} weights are not finite, e.g. {broken[0]}; nothing was saved, and the newest checkpoint "
                "is sound. Lower --low_lr (LOW_LR) and --high_lr (HIGH_LR)."
            )
        save_trained_weights(self._model, folder, weights)
        write_sidecars(folder, self._plan.processing, self._run.to_record(self.step))
        write_training_log(folder, self.step, self._log_history)
        return [*written, *(path for path in folder.iterdir() if not path.name.startswith(OPTIMIZER_PREFIX))]


def fit(run: PreparedRun, session: Session) -> None:
    """Train to the last step. Raises Stopped where a signal ended it before that, state saved."""
    plan, arguments = run.plan, run.plan.arguments
    broadcast_from_main(lambda: archive_newer_checkpoints(arguments.output_dir, plan.start.step))
    session.heartbeat.beat()
    with open_tracker_runs(arguments.report_to, arguments.output_dir, arguments.run_name) as trackers:
        loop = TrainingLoop(run, session, trackers)
        broadcast_from_main(lambda: trackers.attach_record(run.to_record(plan.start.step)))
        session.request.is_deferred = session.heartbeat.trains = True
        stopped_by = loop.train()
        if loop.step < plan.steps:
            leave_process_group()
            # None is newer than the start where that belongs to another folder and no step was made.
            newest = [plan.start.checkpoint, *list_checkpoints(arguments.output_dir)][-1]
            raise Stopped(
                f"by {stopped_by} after step {loop.step} of {plan.steps}; {newest} is whole. Start the same command "
                "again to go on (run.sh by itself, train.py with --resume_from_checkpoint latest)."
            )


def finish(plan: RunPlan, heartbeat: Heartbeat) -> None:
    """Make the last checkpoint's weights the run's result, with its curves; all processes call it together."""

    def write_result() -> None:
        output_dir = plan.arguments.output_dir
        checkpoint = plan.start.checkpoint if plan.start.step == plan.steps else list_checkpoints(output_dir)[-1]
        draw_training_curves(read_training_log(checkpoint), output_dir / "training_curves.png")
        names = [name for name in read_manifest(checkpoint)["files"] if not name.startswith(OPTIMIZER_PREFIX)]
        write_final(output_dir, checkpoint, names, RUN_RECORD, plan.arguments.save_total_limit)
        print(f"trained weights, run record and curves: {output_dir}", flush=True)

    with heartbeat.wait_longer():
        broadcast_from_main(write_result)
