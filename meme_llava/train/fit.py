"""Training from the start point to the last step, and the run's result."""

import json

from transformers.trainer import TRAINER_STATE_NAME

from meme_llava.distributed.heartbeat import Heartbeat
from meme_llava.distributed.processes import broadcast_from_main, leave_process_group
from meme_llava.errors import Stopped
from meme_llava.storage.manifest import read_manifest
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.train.checkpoints import (
    CheckpointContent,
    archive_newer_checkpoints,
    list_checkpoints,
    write_final,
)
from meme_llava.train.curves import draw_training_curves
from meme_llava.train.evaluation import TrainingEvaluation
from meme_llava.train.optimizer_state import OPTIMIZER_PREFIX
from meme_llava.train.prepared_run import PreparedRun
from meme_llava.train.progress import ProgressBar, show_progress_with
from meme_llava.train.run_plan import RunPlan
from meme_llava.train.session import Session
from meme_llava.train.throughput import CountingCollator
from meme_llava.train.tracker_runs import TrackerRuns, open_tracker_runs
from meme_llava.train.trainer import MemeTrainer
from meme_llava.train.vision_features import remove_features


def fit(run: PreparedRun, session: Session) -> None:
    """Train to the last step.

    Raises:
        Stopped: a signal ended it before that, state saved.
    """
    plan, arguments = run.plan, run.plan.arguments
    broadcast_from_main(lambda: archive_newer_checkpoints(arguments.output_dir, plan.start.checkpoint))
    session.heartbeat.beat()
    with open_tracker_runs(arguments.report_to, arguments.output_dir, arguments.run_name) as trackers:
        trainer = make_trainer(run, session, trackers)
        trackers.join(trainer)
        broadcast_from_main(lambda: trackers.attach_record(run.to_record(plan.start.step)))
        trainer.train(resume_from_checkpoint=str(plan.start.checkpoint) if plan.start.checkpoint else None)
        if trainer.stopped_by is not None:
            step = trainer.state.global_step
            leave_process_group()
            raise Stopped(
                f"by {trainer.stopped_by} after step {step} of {plan.steps}; "
                f"{list_checkpoints(arguments.output_dir)[-1]} is whole. Start the same command again to go on "
                "(run.sh by itself, train.py with --resume_from_checkpoint latest)."
            )


def make_trainer(run: PreparedRun, session: Session, trackers: TrackerRuns) -> MemeTrainer:
    """What computes the steps."""
    arguments, data = run.plan.arguments, run.inputs.data
    evaluation = None if run.inputs.validation is None else TrainingEvaluation(run, trackers, session.heartbeat)
    trainer = MemeTrainer(
        groups=run.groups,
        engine=run.plan.engine,
        epochs_per_step=arguments.global_batch_size / len(data.dataset),
        records_per_step=arguments.global_batch_size,
        content=CheckpointContent(run.write_sidecars, run.plan.make_manifest_metadata, arguments.save_total_limit),
        quarantined_records=len(data.checked.bad),
        request=session.request,
        heartbeat=session.heartbeat,
        evaluation=evaluation,
        model=run.model,
        args=run.training_arguments,
        train_dataset=run.order,
        data_collator=CountingCollator(run.collator),
        processing_class=run.inputs.processing.processor,
    )
    show_progress_with(trainer, ProgressBar())
    return trainer


def finish(plan: RunPlan, heartbeat: Heartbeat) -> None:
    """Make the last checkpoint's weights the run's result, with its curves; all processes call it together."""
    heartbeat.beat()
    broadcast_from_main(lambda: _write_result(plan))


def _write_result(plan: RunPlan) -> None:
    output_dir = plan.arguments.output_dir
    checkpoint = plan.start.checkpoint if plan.start.step == plan.steps else list_checkpoints(output_dir)[-1]
    log = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    draw_training_curves(log, output_dir / "training_curves.png")
    names = [name for name in read_manifest(checkpoint)["files"] if not name.startswith(OPTIMIZER_PREFIX)]
    write_final(output_dir, checkpoint, names, last=RUN_RECORD)
    remove_features(output_dir)
    print(f"trained weights, run record and curves: {output_dir}", flush=True)
