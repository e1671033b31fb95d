"""Train a LLaVA on memes: LoRA on both towers and the whole projector, or another recipe of configs/train.

    python -m meme_llava.distributed.launch --processes 8 train.py --model output/base \
        --annotations data/annotations.json --image_folder data --output_dir output/train --train_type lora \
        --high_lr 1e-3 --low_lr 2e-5 …

run.sh gives all settings; `python train.py --help` lists them.
"""

# First, since it says how Ctrl-C ends a script while the others load.
import meme_llava  # noqa: F401

# isort: split

import json
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from meme_llava.dataset.check import print_findings
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.dataset import LoadedData, TrainingOrder
from meme_llava.dataset.quarantine import write_quarantine
from meme_llava.distributed.engine_setup import load_whole
from meme_llava.distributed.engines import Engine, check_muon_runs, choose_engine
from meme_llava.distributed.heartbeat import Heartbeat
from meme_llava.distributed.processes import (
    StopRequest,
    broadcast_from_main,
    check_processes_agree,
    count_processes,
    handle_stop_signals,
    is_main_process,
    leave_process_group,
    run_and_leave,
    start_process_group,
)
from meme_llava.errors import Stopped, stop_on_user_error
from meme_llava.model.activation_checkpointing import recompute_layers
from meme_llava.model.llava import Processing, load_processing
from meme_llava.model.packed_llava import compile_layers, load_packed_llava
from meme_llava.model.trainable import load_projector, load_trained_weights, plan_parameter_groups, prepare_trainable
from meme_llava.report.curves import draw_training_curves
from meme_llava.storage.manifest import read_manifest
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.train.checkpoints import (
    CheckpointContent,
    archive_newer_checkpoints,
    hold_output_dir,
    list_checkpoints,
    write_final,
)
from meme_llava.train.computation import check_device, plan_computation
from meme_llava.train.evaluation import make_evaluation
from meme_llava.train.hf_arguments import derive_accumulation, make_training_arguments
from meme_llava.train.look import plan_run
from meme_llava.train.optimizer_state import OPTIMIZER_PREFIX
from meme_llava.train.out_of_memory import explain_out_of_memory
from meme_llava.train.planning.plan import print_plan
from meme_llava.train.progress import ProgressBar, show_progress_with
from meme_llava.train.records import load_records
from meme_llava.train.resume import StartPoint, check_continues, choose_start, describe_continuation, is_finished
from meme_llava.train.run import TrainingRun, choose_load_dtype, print_run
from meme_llava.train.settings import TrainArguments, parse_train_arguments
from meme_llava.train.show_batch import print_batch
from meme_llava.train.throughput import CountingCollator
from meme_llava.train.tracker_runs import TrackerRuns, open_tracker_runs
from meme_llava.train.trackers import check_trackers
from meme_llava.train.trainer import MemeTrainer
from meme_llava.train.validation import ValidationData, load_validation
from meme_llava.train.vision_features import encode_images, remove_features


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_train_arguments(argv, description=__doc__)
    if arguments.plan or arguments.show_batch:
        look_at_run(arguments)
        return
    processes = count_processes()
    engine = choose_engine(arguments.engine, processes, torch.cuda.is_available())
    check_muon_runs(engine, arguments.muon_lr)
    derive_accumulation(arguments, processes)
    check_device(arguments)
    heartbeat = Heartbeat(arguments.hang_timeout)
    with handle_stop_signals() as request:
        heartbeat.beat("meeting the other processes")
        start_process_group(arguments.hang_timeout, engine.needs_process_group)
        broadcast_from_main(lambda: check_trackers(arguments.report_to))
        heartbeat.beat("verifying checkpoints")
        start = broadcast_from_main(lambda: choose_start(arguments))
        heartbeat.beat("reading the records")
        processing = load_processing(arguments.model)
        data = load_records(arguments, arguments.annotations, arguments.image_folder, processing)
        heartbeat.beat("reading the validation records")
        validation = load_validation(arguments, processing)
        heartbeat.beat("comparing records with the others")
        check_processes_agree([checked.record.place for checked in data.checked.usable])
        run = plan_run_from(arguments, data, engine, start)
        run.evaluation = None if validation is None else validation.description
        if start.checkpoint is not None and say_how_it_continues(run):
            return
        with hold_output_dir(arguments.output_dir), explain_out_of_memory(arguments, engine, processes):
            checkpoint = start.checkpoint
            if start.step < run.steps:
                broadcast_from_main(lambda: archive_newer_checkpoints(arguments.output_dir, start.checkpoint))
                heartbeat.beat("starting trackers")
                with open_tracker_runs(arguments.report_to, arguments.output_dir, arguments.run_name) as trackers:
                    train(run, processing, data, validation, trackers, request, heartbeat)
                checkpoint = list_checkpoints(arguments.output_dir)[-1]
            broadcast_from_main(lambda: finish(arguments.output_dir, checkpoint))
        leave_process_group()


def train(
    run: TrainingRun,
    processing: Processing,
    data: LoadedData,
    validation: ValidationData | None,
    trackers: TrackerRuns,
    request: StopRequest,
    heartbeat: Heartbeat,
) -> None:
    """Train from the start point to the last step. Raises Stopped when a signal ends it before that, state saved."""
    arguments = run.arguments
    collator = make_collator(arguments, processing)
    examples = make_order(run, data, count_processes())
    training_arguments = make_training_arguments(arguments, run.engine, run.steps, run.warmup_steps, run.accumulation)
    run.computation = plan_computation(
        arguments, processing.image_policy, collator(examples.fetch_largest_batch()), training_arguments
    )
    heartbeat.beat("loading the model")
    model = prepare_model(run, training_arguments, processing)
    if arguments.cache_vision_features:
        data.dataset.vision_features = encode_images(
            model.to(training_arguments.device),
            data.dataset.image_paths,
            arguments.output_dir,
            arguments.max_pixels,
            training_arguments.dataloader_num_workers,
            training_arguments.bf16,
            heartbeat,
        )
    groups = plan_parameter_groups(model, arguments)
    run.parameter_groups = [group.describe() for group in groups]
    if is_main_process():
        print_run(run)
        print_left_out(arguments.output_dir, data)

    trainer = MemeTrainer(
        groups=groups,
        engine=run.engine,
        epochs_per_step=arguments.global_batch_size / len(data.dataset),
        records_per_step=arguments.global_batch_size,
        content=CheckpointContent(
            run.make_sidecar_writer(processing), run.make_manifest_metadata, arguments.save_total_limit
        ),
        quarantined_records=len(data.checked.bad),
        request=request,
        heartbeat=heartbeat,
        evaluation=make_evaluation(run, validation, processing, collator, trackers, heartbeat),
        model=model,
        args=training_arguments,
        train_dataset=examples,
        data_collator=CountingCollator(collator),
        processing_class=processing.processor,
    )
    show_progress_with(trainer, ProgressBar())
    trackers.join(trainer)
    broadcast_from_main(lambda: trackers.attach_record(run.to_record(run.start.step)))
    trainer.train(resume_from_checkpoint=str(run.start.checkpoint) if run.start.checkpoint else None)
    if trainer.stopped_by is not None:
        step = trainer.state.global_step
        leave_process_group()
        raise Stopped(
            f"by {trainer.stopped_by} after step {step} of {run.steps}; "
            f"{list_checkpoints(arguments.output_dir)[-1]} is whole. Start the same command again to go on "
            "(run.sh by itself, train.py with --resume_from_checkpoint latest)."
        )


def look_at_run(arguments: TrainArguments) -> None:
    """Print what the run would be, or its first batch; nothing is trained, and no GPU is needed."""
    processes = arguments.gpus or count_processes()
    accumulation = derive_accumulation(arguments, processes)
    # What is planned for several devices is planned for GPUs.
    engine = choose_engine(arguments.engine, processes, arguments.plan or torch.cuda.is_available())
    check_muon_runs(engine, arguments.muon_lr)
    processing = load_processing(arguments.model)
    data = load_records(arguments, arguments.annotations, arguments.image_folder, processing)
    run = TrainingRun.plan(arguments, data, accumulation, engine, StartPoint())
    collator = make_collator(arguments, processing)
    examples = make_order(run, data, processes)
    if arguments.show_batch:
        print_batch(collator(examples.fetch_batch(0)), processing)
    else:
        print_plan(plan_run(run, processing.image_policy, examples, collator, processes))


def plan_run_from(arguments: TrainArguments, data: LoadedData, engine: Engine, start: StartPoint) -> TrainingRun:
    """The run as this process and its peers will train it."""
    return TrainingRun.plan(arguments, data, derive_accumulation(arguments, count_processes()), engine, start)


def say_how_it_continues(run: TrainingRun) -> bool:
    """Check that the checkpoint belongs to the run and print what is different; whether nothing is left to do."""
    ours = run.to_record(run.start.step)
    changes = check_continues(run.start, ours, run.arguments.allow_changes)
    finished = run.start.step == run.steps and is_finished(run.arguments.output_dir)
    if is_main_process():
        nothing_left = f"nothing left to train: {run.arguments.output_dir}"
        print(nothing_left if finished else describe_continuation(run.start, ours, changes), flush=True)
    return finished


def make_order(run: TrainingRun, data: LoadedData, processes: int) -> TrainingOrder:
    """The records in the order of training."""
    arguments = run.arguments
    return TrainingOrder(
        data.dataset,
        run.steps,
        arguments.global_batch_size,
        arguments.device_batch_size,
        processes,
        arguments.seed,
        arguments.shared_images,
        run.start.step,
        run.start.records,
    )


def finish(output_dir: Path, checkpoint: Path) -> None:
    """Make the last checkpoint's weights the run's result, with its curves."""
    log = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    draw_training_curves(log, output_dir / "training_curves.png")
    names = [name for name in read_manifest(checkpoint)["files"] if not name.startswith(OPTIMIZER_PREFIX)]
    write_final(output_dir, checkpoint, names, last=RUN_RECORD)
    remove_features(output_dir)
    print(f"trained weights, run record and curves: {output_dir}", flush=True)


def make_collator(arguments: TrainArguments, processing: Processing) -> PackingCollator:
    """What makes the run's batches."""
    return PackingCollator(
        processing.encoder.image_token_id,
        processing.tokens_per_image,
        processing.image_policy.size,
        arguments.loss_average,
        arguments.shared_images,
    )


def prepare_model(run: TrainingRun, training_arguments: TrainingArguments, processing: Processing) -> nn.Module:
    """The base with what learns, as it is at the start point, and how its layers compute."""
    arguments, computation = run.arguments, run.computation
    dtype = choose_load_dtype(training_arguments)
    with load_whole(training_arguments):
        model = load_packed_llava(arguments.model, dtype, processing.image_policy, computation.attention)
    model = prepare_trainable(model, arguments, arguments.seed)
    if run.start.checkpoint is not None:
        load_trained_weights(model, run.start.checkpoint)
    elif arguments.projector_from is not None:
        load_projector(model, arguments.projector_from)
    recompute_layers(model, computation.recomputed)
    if arguments.torch_compile:
        compile_layers(model)
    return model


def print_left_out(output_dir: Path, data: LoadedData) -> None:
    """Print what was found about the records, and write down which of them do not train."""
    print_findings(data.checked)
    if path := write_quarantine(output_dir, data.checked):
        print(f"{len(data.checked.bad)} bad records are left out; they are listed in {path}")
    if data.checked.undecoded:
        print(f"{data.checked.undecoded} images were never decoded whole; data/check.py does that before a run")


if __name__ == "__main__":
    run_and_leave(main)
