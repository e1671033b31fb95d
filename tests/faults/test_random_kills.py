"""kill -9 at random moments, each followed by the same command: nothing is lost, and nobody has to help."""

import os
import random
import signal
import time

import pytest
from conftest import read_losses
from launching import (
    find_processes,
    finish,
    list_whole_checkpoints,
    make_command,
    run,
    start,
    wait_until,
    weights_equal,
)

pytestmark = pytest.mark.long
# A checkpoint every second step; with them so close, about a third of the kills fall into the writing of one.
STEPS, SAVE_STEPS = 16, 2
CHANGES = {"max_steps": STEPS, "save_steps": SAVE_STEPS}


def count_steps_seen(output: str) -> int:
    """The furthest step that a run reported."""
    steps = [line.split("/")[0].split()[-1] for line in output.splitlines() if line.startswith("step ") and "/" in line]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def strike(world, output_dir, processes, engine, victim: str, delay: float) -> None:
    """Start the run, wait until it trains, and kill -9 one of its processes `delay` seconds later."""
    changes = dict(CHANGES)
    if any(output_dir.glob("checkpoint-[0-9]*")):
        changes["resume_from_checkpoint"] = "latest"
    before = list_whole_checkpoints(output_dir) if output_dir.is_dir() else []
    since = time.monotonic()
    # A step of 50 ms or more leaves room to strike inside one.
    process = start(
        make_command(world, output_dir, processes, engine=engine, **changes), [{"kind": "slow", "seconds": 0.05}]
    )
    trains = lambda: (  # noqa: E731
        process.poll() is not None
        or any(output_dir.glob(".checkpoint-*"))
        or (output_dir.is_dir() and list_names(output_dir) != {f"checkpoint-{step}" for step in before})
    )
    wait_until(trains, 60)
    time.sleep(delay)
    family = [found for found in find_processes(output_dir) if found.pid != process.pid]
    if victim == "launcher" or not family:
        process.kill()
    else:
        family[0 if victim == "first" else -1].kill()
    finish(process, since)
    assert wait_until(lambda: not find_processes(output_dir), 10), "a process outlived its run"


def list_names(output_dir) -> set[str]:
    return {path.name for path in output_dir.glob("checkpoint-*")}


@pytest.mark.parametrize(("engine", "processes", "kills"), [("zero2", 2, 20), ("single", 1, 20), ("ddp", 2, 10)])
def test_random_kills(world, tmp_path, engine, processes, kills):
    """The moments differ in every run of this test; MEME_LLAVA_SEED repeats one."""
    seed = int(os.environ.get("MEME_LLAVA_SEED", time.time_ns() % 1_000_000))
    print(f"MEME_LLAVA_SEED={seed}")
    generator = random.Random(seed)
    assert run(world, tmp_path / "whole", processes, engine=engine, **CHANGES).code == 0
    struck = inside_a_save = rounds = 0
    while struck < kills:
        out = tmp_path / f"out{rounds}"
        rounds += 1
        while struck < kills:
            newest = max(list_whole_checkpoints(out), default=0) if out.is_dir() else 0
            if newest == STEPS:
                break
            victim = generator.choice(["first", "last", "launcher"])
            strike(world, out, processes, engine, victim, generator.uniform(0, 0.6))
            struck += 1
            inside_a_save += any(out.glob(".*.incomplete"))
            # Whatever was on the disk before is there still, or a newer one: at most one interval is lost.
            assert max(list_whole_checkpoints(out), default=0) >= newest
        again = finish(start(make_command(world, out, processes, engine=engine, **resume(out))), time.monotonic())
        assert again.code == 0, again.output
        assert weights_equal(out, tmp_path / "whole")
        assert read_losses(out) == read_losses(tmp_path / "whole")
        assert list_whole_checkpoints(out) == [STEPS - SAVE_STEPS, STEPS]
    print(f"{struck} kills, {inside_a_save} of them inside the writing of a checkpoint, {rounds} runs ended equal")


def resume(output_dir) -> dict:
    found = any(output_dir.glob("checkpoint-[0-9]*"))
    return {**CHANGES, **({"resume_from_checkpoint": "latest"} if found else {})}


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_no_process_outlives_a_launcher_that_is_killed(world, tmp_path, engine):
    """The ranks and their data workers; nobody is left to end them but themselves."""
    out = tmp_path / "out"
    command = make_command(world, out, 2, engine=engine, dataloader_workers=1)
    process = start(command, [{"kind": "slow", "seconds": 0.5}])
    assert wait_until(lambda: (out / "checkpoint-2").exists(), 60)
    assert len(find_processes(out)) >= 5  # launcher, two ranks, two workers
    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not find_processes(out), 10)
