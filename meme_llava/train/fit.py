"""Training from the start point to the last step, and the run's result."""

from meme_llava.distributed.environment import Heartbeat
from meme_llava.distributed.processes import broadcast_from_main, leave_process_group
from meme_llava.errors import Stopped
from meme_llava.storage.manifest import read_manifest
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.storage.training_log import read_training_log
from meme_llava.train.checkpoints import archive_newer_checkpoints, list_checkpoints, write_final
from meme_llava.train.curves import draw_training_curves
from meme_llava.train.loop import TrainingLoop
from meme_llava.train.optimizer_state import OPTIMIZER_PREFIX
from meme_llava.train.prepared_run import PreparedRun
from meme_llava.train.run_plan import RunPlan
from meme_llava.train.session import Session
from meme_llava.train.tracker_runs import open_tracker_runs


def fit(run: PreparedRun, session: Session) -> None:
    """Train to the last step.

    Raises:
        Stopped: a signal ended it before that, state saved.
    """
    plan, arguments = run.plan, run.plan.arguments
    broadcast_from_main(lambda: archive_newer_checkpoints(arguments.output_dir, plan.start.checkpoint))
    session.heartbeat.beat()
    with open_tracker_runs(arguments.report_to, arguments.output_dir, arguments.run_name) as trackers:
        loop = TrainingLoop(run, session, trackers)
        broadcast_from_main(lambda: trackers.attach_record(run.to_record(plan.start.step)))
        stopped_by = loop.train()
        if loop.step < plan.steps:
            leave_process_group()
            raise Stopped(
                f"by {stopped_by} after step {loop.step} of {plan.steps}; "
                f"{list_checkpoints(arguments.output_dir)[-1]} is whole. Start the same command again to go on "
                "(run.sh by itself, train.py with --resume_from_checkpoint latest)."
            )


def finish(plan: RunPlan, heartbeat: Heartbeat) -> None:
    """Make the last checkpoint's weights the run's result, with its curves; all processes call it together."""
    heartbeat.beat()
    broadcast_from_main(lambda: _write_result(plan))


def _write_result(plan: RunPlan) -> None:
    output_dir = plan.arguments.output_dir
    checkpoint = plan.start.checkpoint if plan.start.step == plan.steps else list_checkpoints(output_dir)[-1]
    draw_training_curves(read_training_log(checkpoint), output_dir / "training_curves.png")
    names = [name for name in read_manifest(checkpoint)["files"] if not name.startswith(OPTIMIZER_PREFIX)]
    write_final(output_dir, checkpoint, names, last=RUN_RECORD)
    print(f"trained weights, run record and curves: {output_dir}", flush=True)
