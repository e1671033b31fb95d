"""train.py under the launchers that clusters have: the same losses as one process gives."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, read_losses, train_flags
from local_server import find_free_port

import train
from meme_llava.distributed import launchers, meeting
from meme_llava.distributed.launchers import check_started_once, read_slurm, settle_environment
from meme_llava.errors import ProcessError, UserError

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
    assert "(1 a device x 2 processes x 2 accumulated)" in output
    assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)
    # What accelerate's own configuration says does not count, and that is said.
    assert ("ACCELERATE_MIXED_PRECISION" in output) == ("accelerate" in launcher[0])


@pytest.mark.long
def test_mpirun_trains_the_same(world, losses, tmp_path):
    """Without an MPI here: two processes with the variables that Open MPI's mpirun sets."""
    flags = train_flags(world, tmp_path / "out", engine="ddp", **CHANGES)
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": str(os.getpid())}
    both = [
        start(
            [sys.executable, "train.py", *flags],
            **mpi,
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "(1 a device x 2 processes x 2 accumulated)" in outputs[0] and outputs[1] == ""
    assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)


@pytest.mark.long
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
    assert "(1 a device x 2 processes x 2 accumulated)" in outputs[0] and outputs[1] == ""
    assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    ("nodes", "tasks", "master", "local"),
    [
        ("node[03-05,09]", "8(x4)", "node03", "8"),
        ("gpu-a,gpu-b", "3,4", "gpu-a", "4"),
        ("rack[1-2]-n[04,06]-ib,gpu-b", "8(x4)", "rack1-n04-ib", "8"),
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
        "MASTER_PORT": "30179",
    }


def test_a_batch_script_and_another_launcher_are_not_srun():
    for variables in (
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": "1"},
    ):
        before = dict(variables)
        read_slurm(variables)
        assert variables == before


SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23457"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
BOTH = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
JOB = {"RANK": "1", "WORLD_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "PMI_SIZE": "2"}


@pytest.mark.parametrize(
    ("given", "expected", "ignored"),
    [
        ({}, {}, ""),
        ({"LOCAL_RANK": "0"}, {}, "LOCAL_RANK"),
        ({"RANK": "0"}, {}, "RANK"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, {}, "LOCAL_RANK, RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}, "RANK, WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "1", **MEETING}, MEETING, "RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, {}, "WORLD_SIZE"),
        (MEETING, MEETING, ""),
        # torchrun with one process.
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **MEETING}, ..., ""),
        # A PyTorchJob sets no local rank.
        ({**JOB, **MEETING}, {**JOB, **MEETING, "LOCAL_RANK": "0"}, ""),
        # What mpirun sets is all of it, or nothing.
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {**BOTH, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "34191"}, ""),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **MEETING}, {**BOTH, **MEETING}, ""),
        ({**HYDRA, "MPI_LOCALNRANKS": "2", **MEETING}, {**BOTH, **MEETING}, ""),
        (MPI, {}, ", ".join(sorted(MPI))),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, {}, "PMI_RANK, PMI_SIZE"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, {}, "MV2_COMM_WORLD_SIZE"),
        ({name.replace("OMPI", "MV2"): "1" for name in MPI}, {}, ...),
        # A launcher's own word counts.
        ({**BOTH, "RANK": "0", **MEETING, "PMI_SIZE": "8"}, {**BOTH, "RANK": "0", **MEETING}, "PMI_SIZE"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2"}, {}, "ACCELERATE_MIXED_PRECISION, FSDP_VERSION"),
        ({"NVIDIA_TF32_OVERRIDE": "1", "ACCELERATE_USE_DEEPSPEED": "true"}, {}, ...),
    ],
)  # fmt: skip
def test_what_no_launcher_set_is_ignored_by_name(monkeypatch, capsys, given, expected, ignored):
    monkeypatch.setattr(launchers, "die_with_parent", lambda: None)
    monkeypatch.setattr(launchers, "choose_interface", lambda variables: None)
    variables = {"PYTORCH_ALLOC_CONF": "", "PMIX_NAMESPACE": "prterun-node-17@1", **given}
    settle_environment(variables)
    del variables["PYTORCH_ALLOC_CONF"], variables["PMIX_NAMESPACE"]
    assert variables == (given if expected is ... else expected)
    ignored = ", ".join(sorted(given)) if ignored is ... else ignored
    said = f"ignored: {ignored}; the launcher, --engine and --precision count\n" if ignored else ""
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (JOB, "(RANK=1 WORLD_SIZE=2), but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", **MEETING}, "(WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=23457), but RANK is not set"),
        ({**JOB, "MASTER_ADDR": "a"}, "but MASTER_PORT is not set"),
        ({**JOB, "RANK": "2", **MEETING}, "but RANK counts from 0 to below WORLD_SIZE"),
        ({**BOTH, "LOCAL_RANK": "2", **MEETING}, "but LOCAL_RANK counts from 0 to below LOCAL_WORLD_SIZE"),
        ({**JOB, "WORLD_SIZE": "two", **MEETING}, "but WORLD_SIZE is no whole number"),
        ({**JOB, "RANK": "-1", **MEETING}, "but RANK is no whole number"),
        # On several nodes nobody but the user knows where process 0 is.
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "but MASTER_ADDR is not set"),
        ({**JOB, **MEETING, "MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid: "),
        ({**JOB, **MEETING, "MASTER_ADDR": "node..a"}, "MASTER_ADDR=node..a: "),
        ({**JOB, **MEETING, "MASTER_PORT": "0"}, "but MASTER_PORT is no port from 1 to 65535"),
        ({**JOB, **MEETING, "MASTER_PORT": "65536"}, "but MASTER_PORT is no port from 1 to 65535"),
        # srun sets all of it; a container may let only a part through.
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started this process as one of several, but SLURM_PROCID is not set"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is ''"),
        ({**SLURM, "SLURM_JOB_ID": "7_1"}, "SLURM_JOB_ID is '7_1'"),
    ],
)  # fmt: skip
def test_what_says_that_there_are_others_and_not_where_is_refused(monkeypatch, given, reason):
    monkeypatch.setattr(launchers, "die_with_parent", lambda: None)
    with pytest.raises(UserError) as caught:
        settle_environment({**given})
    assert reason in str(caught.value)


def test_a_process_that_is_told_of_localhost_is_reached_elsewhere_where_it_is_process_0(monkeypatch):
    """Of a PyTorchJob's processes; on the loopback interface, the others would never reach it."""
    monkeypatch.setattr(launchers, "die_with_parent", lambda: None)
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for given, interface in (({**JOB, "RANK": "0"}, None), (JOB, "lo"), ({**JOB, **local, "RANK": "0"}, "lo")):
        variables = {**given, **MEETING}
        settle_environment(variables)
        assert variables.get("GLOO_SOCKET_IFNAME") == variables.get("NCCL_SOCKET_IFNAME") == interface


@pytest.mark.long
@pytest.mark.parametrize(("rank", "number", "code"), [(0, signal.SIGTERM, 75), (1, signal.SIGTERM, 75)])
def test_a_process_whose_others_do_not_come_says_so_and_heeds_the_first_signal(world, tmp_path, rank, number, code):
    words = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}
    process = start([sys.executable, "train.py", *train_flags(world, tmp_path / "out", **CHANGES)], **words)
    line = process.stdout.readline()
    place = f"MASTER_ADDR=localhost, MASTER_PORT={words['MASTER_PORT']}"
    assert line == f"process {rank} waits for the others of 2 at {place}\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == code, output
    assert output in ("", "stopped: by SIGTERM before the first step; there was nothing to save\n")


@pytest.fixture
def told(monkeypatch):
    """A function that tells this process where the others are."""

    def tell(rank: int, processes: int, port: int):
        words = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in words.items():
            monkeypatch.setenv(name, str(value))

    return tell


def test_others_that_do_not_come_end_the_waiting(told):
    told(0, 2, port := find_free_port())
    with pytest.raises(ProcessError, match="not all 2 processes met within 0.3 s. Start all of them at the same time"):
        meeting.meet_processes(0.3)
    with socket.create_server(("localhost", port)):
        with pytest.raises(ProcessError, match="process 0 needs a port that is free"):
            meeting.meet_processes(0.3)


@pytest.mark.parametrize(
    ("rank", "processes", "reason"),
    [
        (1, 3, "two processes came with RANK=1; give each another, from 0 to 2"),
        (2, 4, "WORLD_SIZE is 4 here and 3 in another process; give all the same"),
    ],
)
def test_processes_that_were_told_what_does_not_agree_do_not_wait(told, rank, processes, reason):
    """Process 0 and one with the number 1 are there; torch would wait for the third without a word."""
    port = find_free_port()
    store = meeting.distributed.TCPStore("localhost", port, 3, is_master=True, wait_for_workers=False)
    store.set("processes", "3")
    store.add("process 1", 1)
    told(rank, processes, port)
    with pytest.raises(ProcessError, match=f"MASTER_ADDR=localhost, MASTER_PORT={port}: {reason}"):
        meeting.meet_processes(30)


def test_a_variable_without_a_value_says_nothing_of_several():
    check_started_once({"WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "1"})
    with pytest.raises(UserError, match="PMI_SIZE=2 says that run.sh was started several times at once"):
        check_started_once({"WORLD_SIZE": "", "PMI_SIZE": "2"})


@pytest.mark.parametrize("mode", [pytest.param("leftover rank", marks=pytest.mark.long), "incomplete"])
def test_leftover_ranks_do_not_reach_a_run(world, losses, tmp_path, mode):
    words = {"RANK": "1", "LOCAL_RANK": "0"} if mode == "leftover rank" else {"RANK": "1", "WORLD_SIZE": "2"}
    process = start([sys.executable, "train.py", *train_flags(world, tmp_path / "out", **CHANGES)], **words)
    output, _ = process.communicate(timeout=180)
    if mode == "incomplete":
        assert process.returncode == 2 and output.startswith("error: the environment says"), output
        assert output.count("\n") == 1
    else:
        assert process.returncode == 0, output
        assert output.startswith("ignored: LOCAL_RANK, RANK; ")
        assert read_losses(tmp_path / "out") == pytest.approx(losses, abs=1e-6)


def test_memory_that_gpus_allocate_grows_in_segments_unless_the_user_says_otherwise():
    for own, expected in (
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ):
        settle_environment(own)
        assert own == expected
