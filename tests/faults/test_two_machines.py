"""Two machines, here two network namespaces joined by a cable: they train together, and one is lost.

They see the same disk, as machines of a cluster must.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, read_losses
from launching import find_processes, finish, go_on, list_whole_checkpoints, make_command, run, start, wait_until

pytestmark = pytest.mark.long
HOSTS = ("memellava0", "memellava1")
ADDRESSES = ("10.77.31.1", "10.77.31.2")
PORT = 29631
SLOW = [{"kind": "slow", "seconds": 0.3}]


def ip(*arguments) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (Debian: iproute2)")
    remove_hosts()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable1", "netns", HOSTS[1])
    for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
        ip("-n", host, "addr", "add", f"{address}/24", "dev", f"cable{number}")
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "link", "set", f"cable{number}", "up")
    yield HOSTS
    for host in HOSTS:
        end_host(host)
    remove_hosts()


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def end_host(host: str) -> None:
    """Every process of a machine is gone at once, as when it loses its power."""
    found = subprocess.run(["ip", "netns", "pids", host], check=False, capture_output=True, text=True).stdout.split()
    for pid in found:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def start_machine(world, output_dir, number: int, faults=(), nodes_timeout=60, **changes):
    flags = ["--nnodes", "2", "--node_rank", str(number), "--master_addr", ADDRESSES[0], "--master_port", str(PORT)]
    flags += ["--start_timeout", str(nodes_timeout)]
    command = make_command(world, output_dir, 1, flags, engine="zero2", **changes)
    return start(["ip", "netns", "exec", HOSTS[number], *command], faults)


def run_both(world, output_dir, **changes):
    since = time.monotonic()
    both = [start_machine(world, output_dir, number, **changes) for number in (0, 1)]
    return [finish(process, since) for process in both]


def test_two_machines_train_and_lose_one(world, hosts, tmp_path):
    """Together they lose what two processes of one machine lose; without one, the other says so and ends."""
    out = tmp_path / "out"
    since = time.monotonic()
    first, second = (start_machine(world, out, number, SLOW) for number in (0, 1))
    assert wait_until(lambda: (out / "checkpoint-2").exists(), 60)
    struck = time.monotonic()
    end_host(hosts[1])
    result = finish(first, since)
    second.communicate()

    assert time.monotonic() - struck < 60
    assert result.code == 8
    assert "process 0 lost a process on another node; all processes were ended" in result.output
    assert find_processes(out) == []
    assert list_whole_checkpoints(out)[-1] >= 2

    # Both again: it goes on, and ends as two processes of one machine do.
    both = run_both(world, out, resume_from_checkpoint="latest")
    assert [result.code for result in both] == [0, 0], both[0].output + both[1].output
    assert "continuing from" in both[0].output and "continuing from" not in both[1].output
    alone = run(world, tmp_path / "alone", 2, engine="zero2")
    assert alone.code == 0
    assert read_losses(out) == read_losses(tmp_path / "alone")


def test_a_cut_cable_ends_both_and_the_one_that_is_left_goes_on(world, hosts, tmp_path):
    """No process dies and no connection is closed; only nothing comes any more, until the hang timeout."""
    out = tmp_path / "out"
    since = time.monotonic()
    both = [start_machine(world, out, number, SLOW, hang_timeout=10) for number in (0, 1)]
    assert wait_until(lambda: (out / "checkpoint-2").exists(), 60)
    struck = time.monotonic()
    ip("-n", hosts[1], "link", "set", "cable1", "down")
    results = [finish(process, since) for process in both]
    assert time.monotonic() - struck < 60
    assert [result.code for result in results] == [1, 1]
    for rank, result in enumerate(results):
        assert f"process {rank} made no progress for --hang_timeout seconds" in result.output
    again = go_on(world, out, 1)
    assert again.code == 0, again.output
    assert "2 processes wrote it, and it goes on with 1" in again.output
    assert len(read_losses(out)) == 6


def test_a_signal_to_one_machine_stops_both(world, hosts, tmp_path):
    out = tmp_path / "out"
    since = time.monotonic()
    both = [start_machine(world, out, number, SLOW) for number in (0, 1)]
    assert wait_until(lambda: (out / "checkpoint-2").exists(), 60)
    both[1].send_signal(signal.SIGTERM)
    assert [finish(process, since).code for process in both] == [75, 75]
    assert find_processes(out) == []


def test_a_process_that_dies_on_one_machine_ends_both(world, hosts, tmp_path):
    out = tmp_path / "out"
    since = time.monotonic()
    fault = [{"kind": "signal_self", "rank": 1, "step": 3, "number": "SIGKILL"}]
    results = [
        finish(start_machine_, since) for start_machine_ in [start_machine(world, out, n, fault) for n in (0, 1)]
    ]
    assert [result.code for result in results] == [8, 8]
    assert "process 0 lost a process on another node" in results[0].output
    assert "process 1 was killed by SIGKILL" in results[1].output


def test_machines_that_start_another_number_of_processes_do_not_begin(world, hosts, tmp_path):
    since = time.monotonic()
    out = tmp_path / "out"
    flags = ["--nnodes", "2", "--node_rank", "1", "--master_addr", ADDRESSES[0], "--master_port", str(PORT)]
    first = start_machine(world, out, 0)
    second = start(["ip", "netns", "exec", HOSTS[1], *make_command(world, out, 2, flags)])
    results = [finish(process, since) for process in (first, second)]
    assert [result.code for result in results] == [8, 8]
    assert "the nodes start [1, 2] processes, by NODE_RANK" in results[0].output


def test_a_loop_over_ssh_starts_run_sh_on_every_node(hosts, tmp_path):
    """The loop of `bash run.sh --help`; ssh goes to a namespace in place of a machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text('#!/usr/bin/env bash\nhost=$2\nshift 2\nexec ip netns exec "$host" bash -c "$*"\n')
    ssh.chmod(0o755)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VENV": "active",
        "GPUS": "cpu",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MASTER_PORT": str(PORT),
    }
    loop = (
        f"rank=0; for host in {' '.join(HOSTS)}; do\n"
        f'ssh -n "$host" "cd {ROOT} && NNODES=2 NODE_RANK=$rank MASTER_ADDR={ADDRESSES[0]} bash run.sh '
        'build train --max_steps 4 --save_steps 2" & rank=$((rank + 1)); done; wait'
    )
    result = finish(start(["bash", "-c", loop], **variables), time.monotonic())
    assert result.code == 0, result.output
    assert "(4 a device x 2 processes x 1 accumulated)" in result.output
    assert "node 1 is done; node 0 goes on" in result.output


SRUN = """#!{python}
import os, subprocess, sys
flags = [word for word in sys.argv[1:] if word.startswith("--") and sys.argv.index(word) <= 2]
command = sys.argv[1 + len(flags):]
count = 1 if "--nodes=1" in flags else 2
tasks = []
for number in range(count):
    environment = {{**os.environ, "SLURM_NODEID": str(number)}}
    tasks.append(subprocess.Popen(["ip", "netns", "exec", f"memellava{{number}}", *command], env=environment))
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_slurm_script_builds_trains_and_merges(hosts, tmp_path):
    """srun starts a task a machine, here a namespace each; a run that was stopped is queued again."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(python=sys.executable))
    (programs / "scontrol").write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/calls\n[[ $1 != show ]] || printf "%s\\n" {" ".join(ADDRESSES)}\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VENV": "active",
        "GPUS": "cpu",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "memellava[0-1]",
        "SLURM_JOB_ID": "123456",
    }
    command = ["bash", str(ROOT / "configs/slurm/train.sbatch"), "--max_steps", "60", "--save_steps", "5"]
    process = start(command, log=tmp_path / "log", **variables)
    assert wait_until(lambda: (tmp_path / "out/train/checkpoint-5").exists(), 90), (tmp_path / "log").read_text()
    for launcher in find_processes(tmp_path / "out" / "train"):
        if "meme_llava.distributed.launch" in launcher.cmdline():
            launcher.send_signal(signal.SIGTERM)
            break
    assert process.wait(60) == 0
    assert "queueing again" in (tmp_path / "log").read_text()
    assert "requeue 123456" in (tmp_path / "calls").read_text()
    result = finish(start(command, **variables), time.monotonic())
    assert result.code == 0, result.output
    assert "continuing from" in result.output and result.output.count("reference:") == 20
