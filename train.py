"""Train a LLaVA on memes: LoRA on both towers and the whole projector, or another recipe of configs/train.

    torchrun --nproc_per_node 8 train.py --model output/base --annotations data/annotations.json --image_folder data \
        --output_dir output/train --train_type lora --high_lr 1e-3 --low_lr 2e-5 …

run.sh gives all settings; `python train.py --help` lists them.
"""

from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from meme_llava.activation_checkpointing import recompute_layers
from meme_llava.arguments import TrainArguments, parse_train_arguments
from meme_llava.collator import PackingCollator
from meme_llava.computation import Computation, plan_computation
from meme_llava.curves import draw_training_curves
from meme_llava.dataset import LoadedData, TrainingOrder, load_dataset
from meme_llava.display import print_batch, print_findings
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.model import Processing, load_processing
from meme_llava.packed_model import check_compiler, compile_layers, load_packed_llava
from meme_llava.picture_cache import PictureCache, find_default_cache
from meme_llava.planning import plan_run, print_plan
from meme_llava.progress import ProgressBar, show_progress_with
from meme_llava.quarantine import write_quarantine
from meme_llava.run import (
    TrainingRun,
    choose_checkpoint,
    choose_load_dtype,
    describe_restart,
    is_finished,
    is_main_process,
    print_run,
)
from meme_llava.throughput import CountingCollator
from meme_llava.token_lengths import find_default_folder
from meme_llava.trainable import plan_parameter_groups, prepare_trainable
from meme_llava.trainer import (
    MemeTrainer,
    check_processes_agree,
    count_processes,
    derive_accumulation,
    leave_process_group,
    make_training_arguments,
)
from meme_llava.vision_features import encode_pictures, remove_features


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_train_arguments(argv, description=__doc__)
    processes = arguments.gpus or count_processes()
    accumulation = derive_accumulation(arguments, processes)
    checkpoint = None if arguments.plan or arguments.show_batch else choose_checkpoint(arguments)
    processing = load_processing(arguments.model)
    data = load_data(arguments, processing)
    collator = make_collator(arguments, processing)
    run = TrainingRun.plan(arguments, data, accumulation)
    examples = TrainingOrder(
        data.dataset,
        run.steps,
        arguments.global_batch_size,
        arguments.device_batch_size,
        processes,
        arguments.seed,
        arguments.shared_pictures,
    )
    if arguments.show_batch:
        print_batch(collator(examples.fetch_batch(0)), processing)
        return
    if arguments.plan:
        print_plan(plan_run(run, processing.image_policy, examples, collator, processes))
        return
    if checkpoint is not None:
        run.check_continues(checkpoint)
        finished = is_finished(arguments.output_dir)
        if is_main_process():
            print(
                f"nothing left to train: {arguments.output_dir}" if finished else f"continuing from {checkpoint}",
                flush=True,
            )
        if finished:
            return

    training_arguments = make_training_arguments(arguments, run.steps, run.warmup_steps, run.accumulation)
    check_processes_agree([checked.record.place for checked in data.checked.usable])
    if arguments.torch_compile:
        check_compiler(training_arguments.device)
    run.computation = plan_computation(
        arguments, processing.image_policy, collator(examples.fetch_largest_batch()), training_arguments
    )
    model = prepare_model(arguments, training_arguments, processing, run.computation)
    if arguments.cache_vision_features:
        data.dataset.vision_features = encode_pictures(
            model.to(training_arguments.device),
            data.dataset.image_paths,
            arguments.output_dir,
            arguments.max_pixels,
            training_arguments.dataloader_num_workers,
            training_arguments.bf16,
        )
    groups = plan_parameter_groups(model, arguments.high_lr, arguments.low_lr, arguments.weight_decay)
    run.parameter_groups = [group.describe() for group in groups]
    if is_main_process():
        print_run(run)
        print_left_out(arguments.output_dir, data)

    trainer = MemeTrainer(
        groups=groups,
        epochs_per_step=arguments.global_batch_size / len(data.dataset),
        records_per_step=arguments.global_batch_size,
        save_companions=run.make_companion_writer(processing),
        quarantined_records=len(data.checked.bad),
        model=model,
        args=training_arguments,
        train_dataset=examples,
        data_collator=CountingCollator(collator),
        processing_class=processing.processor,
    )
    show_progress_with(trainer, ProgressBar())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        raise UserError(f"stopped by Ctrl-C. {describe_restart(arguments.output_dir)}") from None

    trainer.save_state()
    trainer.save_model()
    if is_main_process():
        draw_training_curves(trainer.state.log_history, arguments.output_dir / "training_curves.png")
        print(f"trained weights, run record and curves: {arguments.output_dir}")
    leave_process_group()
    remove_features(arguments.output_dir)


def load_data(arguments: TrainArguments, processing: Processing) -> LoadedData:
    """The records that train, checked."""
    return load_dataset(
        arguments.annotations,
        arguments.image_folder,
        processing.encoder,
        processing.image_policy,
        arguments.model_max_length,
        arguments.bad_records,
        arguments.severities,
        arguments.max_pixels,
        PictureCache(find_default_cache(), read_only=True),
        find_default_folder(),
    )


def make_collator(arguments: TrainArguments, processing: Processing) -> PackingCollator:
    """What makes the run's batches."""
    return PackingCollator(
        processing.encoder.image_token_id,
        processing.tokens_per_image,
        processing.image_policy.size,
        arguments.loss_average,
        arguments.shared_pictures,
    )


def prepare_model(
    arguments: TrainArguments, training_arguments: TrainingArguments, processing: Processing, computation: Computation
) -> nn.Module:
    """The base, with what learns and how its layers compute."""
    dtype = choose_load_dtype(training_arguments)
    model = load_packed_llava(arguments.model, dtype, processing.image_policy, computation.attention)
    model = prepare_trainable(model, arguments)
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
        print(f"{data.checked.undecoded} pictures were never decoded whole; data/check.py does that before a run")


if __name__ == "__main__":
    main()
