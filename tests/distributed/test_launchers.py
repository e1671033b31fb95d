"""train.py under the launchers that clusters have: the same losses as one process gives."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_losses, train_flags

import train
from meme_llava.distributed.environment import read_slurm, settle_environment

CHANGES = {"global_batch_size": 4, "device_batch_size": 1, "max_steps": 4, "save_steps": 4, "lora_dropout": 0}
CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def losses(world, tmp_path_factory):
    """Of one process."""
    output_dir = tmp_path_factory.mktemp("single") / "out"
    train.main(train_flags(world, output_dir, **CHANGES))
    return read_losses(output_dir)


def start(command, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **CPU, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "ddp"),
        (["deepspeed.launcher.runner", "--num_gpus", "2", "--master_addr", "127.0.0.1"], "zero2"),
        (
            ["accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
            + ["--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", "29643"],
            "zero2",
        ),
    ],
    ids=["torchrun", "deepspeed", "accelerate"],
)
def test_other_launchers_train_the_same(world, losses, tmp_path, launcher, engine):
    flags = train_flags(world, tmp_path / "out", engine=engine, **CHANGES)
    process = start([sys.executable, "-m", *launcher, ROOT / "train.py", *flags])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "(1 a device x 2 process(es) x 2 accumulated)" in output
    assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)
    # What accelerate's own configuration says does not count, and that is said.
    assert ("ACCELERATE_MIXED_PRECISION" in output) == ("accelerate" in launcher[0])


def test_srun_trains_the_same(world, losses, tmp_path):
    """Without a Slurm here: two processes with the variables that srun sets (srun(1), OUTPUT ENVIRONMENT VARIABLES)."""
    flags = train_flags(world, tmp_path / "out", engine="ddp", report_to="tensorboard", **CHANGES)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    both = [
        start([sys.executable, "train.py", *flags], SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **slurm)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "(1 a device x 2 process(es) x 2 accumulated)" in outputs[0] and outputs[1] == ""
    assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    ("nodes", "tasks", "master", "local"),
    [
        ("node[03-05,09]", "8(x4)", "node03", "8"),
        ("gpu-a,gpu-b", "4,3", "gpu-a", "4"),
        ("10.0.0.7", "2", "10.0.0.7", "2"),
    ],
)
def test_where_processes_of_srun_meet(nodes, tasks, master, local):
    variables = {
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "32",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    slurm = dict(variables)
    read_slurm(variables)
    found = {name: value for name, value in variables.items() if name not in slurm}
    assert found == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "32",
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": master,
        "MASTER_PORT": "36701",
    }


def test_a_batch_script_and_another_launcher_are_not_srun():
    for variables in (
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "3"},
    ):
        before = dict(variables)
        read_slurm(variables)
        assert variables == before


def test_memory_that_gpus_allocate_grows_in_segments_unless_the_user_says_otherwise():
    for own, expected in (
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ):
        settle_environment(own)
        assert own == expected
