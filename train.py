"""Train a LLaVA on memes: LoRA on both towers and the whole projector, or another recipe of configs/train.

    torchrun --nproc_per_node 8 train.py --model output/base \
        --annotations data/annotations.json --image_folder data --output_dir output/train --train_type lora \
        --high_lr 1e-3 --low_lr 2e-5 …

run.sh gives all settings; `python train.py --help` lists them.
"""

# First, since it says how Ctrl-C ends a script while the others load.
import meme_llava  # noqa: F401

# isort: split

from meme_llava.distributed.environment import run_and_leave
from meme_llava.errors import stop_on_user_error
from meme_llava.train.settings import parse_train_arguments


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_train_arguments(argv, description=__doc__)
    # Torch takes seconds to load; what is wrong with the flags is said before.
    if arguments.plan or arguments.show_batch:
        from meme_llava.train.look import look_at_run

        look_at_run(arguments)
        return
    from meme_llava.train.checkpoints import hold_output_dir
    from meme_llava.train.loop import finish, fit
    from meme_llava.train.prepared_run import prepare_run
    from meme_llava.train.run_plan import is_nothing_left, load_plan
    from meme_llava.train.session import explain_out_of_memory, join_processes
    from meme_llava.train.start import check_unchanged

    with join_processes(arguments) as session:
        plan = load_plan(arguments, session)
        if is_nothing_left(plan):
            return
        with hold_output_dir(arguments.output_dir), explain_out_of_memory(arguments, session):
            check_unchanged(arguments.output_dir, plan.start)
            if plan.start.step < plan.steps:
                fit(prepare_run(plan, session.heartbeat), session)
            finish(plan, session.heartbeat)


if __name__ == "__main__":
    run_and_leave(main)
