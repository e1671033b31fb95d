"""The launcher: exit codes, last words, signals, and that nothing outlives a run."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from local_server import find_free_port

from meme_llava.distributed.launch import meet
from meme_llava.errors import ProcessError

REPORT_ENVIRONMENT = """
import os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
line = " ".join(f"{name}={os.environ.get(name)}" for name in names)
os.write(1, (line + " " + " ".join(sys.argv[1:]) + "\\n").encode())
"""
# A process, its child that ignores signals, and a file that tells when both are there.
WITH_CHILD = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", sys.argv[1]])
open(os.path.join(sys.argv[1], os.environ.get("RANK", "0")), "w").close()
time.sleep(600)
"""
SAVES_WHEN_ASKED = """
import os, signal, sys, time
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, lambda number, _: (os.write(1, f"saved: {number}\\n".encode()), os._exit(75)))
open(os.path.join(sys.argv[1], os.environ.get("RANK", "0")), "w").close()
time.sleep(600)
"""


def make_command(tmp_path, script: str, *arguments, processes=1, flags=()) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    launcher = [sys.executable, "-m", "meme_llava.distributed.launch", "--nproc_per_node", str(processes), *flags]
    return [*launcher, str(path), *map(str, arguments)]


def hear_signals():
    """Tests that run under nohup, or in the background of a shell, would hand on that signals are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start(command, quiet=False, **variables) -> subprocess.Popen:
    """Start a command. What a killed one started may keep its output open, so it should be `quiet`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    target = subprocess.DEVNULL if quiet else subprocess.PIPE
    streams = {"stdout": target, "stderr": target}
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
        **streams,
    )


def launch(tmp_path, script, *arguments, processes=1, flags=(), **variables):
    process = start(make_command(tmp_path, script, *arguments, processes=processes, flags=flags), **variables)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def find_all(tmp_path) -> list[int]:
    """Processes whose command line names a test's folder, but for zombies."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            str(tmp_path) in word for word in process.info["cmdline"] or ()
        ):
            found.append(process.info["pid"])
    return found


def end_all(tmp_path):
    """Kill what a test's processes left behind."""
    for pid in find_all(tmp_path):
        os.kill(pid, signal.SIGKILL)


def test_every_process_learns_its_place(tmp_path):
    code, out, err = launch(tmp_path, REPORT_ENVIRONMENT, "--flag", "a b", processes=2)
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [
        f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 --flag a b"
        for rank in (0, 1)
    ]


def test_nothing_listens_for_other_machines(tmp_path):
    process = start(make_command(tmp_path, WITH_CHILD, tmp_path, processes=2), quiet=True)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in family]
    assert listening and {address.ip for address in listening} == {"127.0.0.1"}
    process.kill()
    process.wait()
    end_all(tmp_path)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        pytest.param(
            *("sys.exit(7)", 7, "process 1 stopped: too little room on a disk; see its message above"),
            marks=pytest.mark.long,
        ),
        ("sys.exit(75)", 75, ""),
        pytest.param("raise ValueError('no such luck')", 1, "Last words of process 1:\n", marks=pytest.mark.long),
        ("os.kill(os.getpid(), 9)", 8, "process 1 was killed by SIGKILL (the kernel does that when memory runs out"),
        pytest.param(
            *("os.kill(os.getpid(), 11)", 8, "process 1 was killed by SIGSEGV; all processes were ended"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_first_fault_names_the_process_and_gives_the_exit_code(tmp_path, body, code, message):
    """Process 0 would go on for ever; it answers a request to stop, as training does."""
    script = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
if os.environ["RANK"] == "1":
    {body}
time.sleep(600)
"""
    found, _, err = launch(tmp_path, script, processes=2)
    assert found == code, err
    assert message in err
    if code == 1:
        assert "    ValueError: no such luck" in err
    assert find_all(tmp_path) == []


def test_a_process_that_failed_because_of_another_is_not_blamed(tmp_path):
    script = """
import os, sys, time
from meme_llava.distributed.environment import run_and_leave

def main():
    if os.environ["RANK"] == "0":
        raise RuntimeError("/gloo/transport/tcp/pair.cc: Connection closed by peer")
    time.sleep(0.5)
    sys.exit(1)

run_and_leave(main)
"""
    code, _, err = launch(tmp_path, script, processes=2)
    assert code == 1 and "process 1 ended with exit code 1" in err


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_is_handed_on_and_all_are_waited_for(tmp_path, number):
    process = start(make_command(tmp_path, SAVES_WHEN_ASKED, tmp_path, processes=2))
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    # Training hears of Ctrl-C and SIGTERM; a terminal that closed is a request to end, too.
    told = signal.SIGTERM if number == signal.SIGHUP else number
    assert out == f"saved: {int(told)}\n" * 2 and f"{number.name}: the run saves its state and stops" in err


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(make_command(tmp_path, WITH_CHILD, tmp_path))
    wait_for(lambda: (tmp_path / "0").exists())
    stopped = [p for p in psutil.Process(process.pid).children(recursive=True)]
    for child in stopped:
        child.suspend()  # it cannot answer
    wait_for(lambda: all(child.status() == psutil.STATUS_STOPPED for child in stopped))
    process.send_signal(signal.SIGINT)
    time.sleep(2.3)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "SIGINT again: ending at once, nothing more is saved" in err
    assert find_all(tmp_path) == []


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    script = "from meme_llava.distributed.launchers import die_with_parent; die_with_parent()" + WITH_CHILD
    process = start(make_command(tmp_path, script, tmp_path, processes=2), quiet=True)
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 10)
    end_all(tmp_path)  # what a process started by itself nobody ends without the launcher


def test_what_a_process_started_is_ended_with_it(tmp_path):
    script = WITH_CHILD.replace("time.sleep(600)\n", "os._exit(3)\n")
    code, _, _ = launch(tmp_path, script, tmp_path)
    assert code == 3
    wait_for(lambda: not find_all(tmp_path), 5)


@pytest.mark.long
def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = launch(tmp_path, REPORT_ENVIRONMENT, processes=2, flags=["--master_port", str(port)])
    assert code == 8 and out == ""
    assert err == (
        f"error: MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: Address already in use; node 0 needs an address of its own "
        "and a port that is free (on one node leave both out)\n"
    )


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--nproc_per_node", "0"], 2, "must be at least 1"),
        (["--nnodes", "2", "--node_rank", "2", "--master_port", "1"], 2, "--node_rank is 2, expected 0 to 1"),
        (["--nnodes", "2"], 2, "--master_port is 0, expected 1 to 65535"),
        (["--nnodes", "2", "--master_port", "29511"], 8, "MASTER_ADDR=127.0.0.1 is what every node calls itself"),
        (["--nnodes", "2", "--master_port", "29511", "--master_addr", "192.0.2.1"], 8,
         "MASTER_ADDR=192.0.2.1, MASTER_PORT=29511: Cannot assign requested address"),
        (["--nnodes", "2", "--master_port", "29511", "--master_addr", "no.such.host.invalid"], 8,
         "MASTER_ADDR=no.such.host.invalid, MASTER_PORT=29511: "),
        (["--nnodes", "2", "--master_port", "29511", "--master_addr", "node..a"], 2,
         "--master_addr is 'node..a', expected a host's name or address"),
        (["--start_timeout", "nan"], 2, "--start_timeout is nan, expected above 0 and at most 1e+06"),
        (["--nproces", "2"], 2, "error: "),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(tmp_path, flags, code, message):
    found, out, err = launch(tmp_path, REPORT_ENVIRONMENT, flags=flags)
    assert (found, out) == (code, "") and message in err and "Traceback" not in err


@pytest.fixture
def own_address():
    """This machine's, as another node would know it."""
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = [one.address for one in entries if one.family == socket.AF_INET and not one.address.startswith("127.")]
    return found[0] if found else pytest.skip("this machine has no address but its own loopback")


def test_a_node_that_does_not_come_ends_the_others(own_address):
    with (
        pytest.raises(ProcessError, match="not all 2 nodes met within 1 s. Start run.sh on each of them"),
        meet(2, 0, 1, own_address, 0, timeout=1),
    ):
        pass


def test_a_node_0_that_is_not_found_is_said_without_torchs_pages(tmp_path):
    flags = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "no.such.host.invalid", "--master_port", "29511"]
    code, _, err = launch(tmp_path, REPORT_ENVIRONMENT, flags=[*flags, "--start_timeout", "1"])
    assert code == 8 and err.count("\n") == 1
    assert "MASTER_PORT=29511: not all 2 nodes met within 1 s (" in err


def test_ctrl_c_ends_the_waiting_for_other_nodes(own_address):
    """As from a terminal: in the background of a shell it is ignored."""
    flags = ["--nnodes", "2", "--master_addr", own_address, "--master_port", str(find_free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "meme_llava.distributed.launch", *flags, "train.py"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "node 0 waits for the other 1, at most 600 s\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


def test_a_process_that_shows_no_progress_prints_its_stacks_and_ends_all(tmp_path):
    """Two beat every 0.2 s; one stops, and the other goes on."""
    script = """
import os, time
from meme_llava.distributed.environment import Heartbeat

def wait_for_ever(): time.sleep(600)

with Heartbeat(hang_timeout=2) as heartbeat:
    heartbeat.trains = True
    for count in range(5 if os.environ["RANK"] == "1" else 500):
        heartbeat.beat()
        time.sleep(0.2)
    wait_for_ever()
"""
    code, _, err = launch(tmp_path, script, processes=2)
    assert code == 1
    assert "process 1 made no progress for --hang_timeout seconds; all processes were ended." in err
    assert "in wait_for_ever" in err


def test_the_heart_of_a_process_that_ended_beats_no_more(tmp_path):
    script = """
import time
from meme_llava.distributed.environment import Heartbeat

with Heartbeat(hang_timeout=1) as heartbeat:
    heartbeat.trains = True
    heartbeat.beat()
time.sleep(2)
"""
    assert launch(tmp_path, script)[::2] == (0, "")


def test_a_long_save_is_no_hang(tmp_path):
    script = """
import time
from meme_llava.distributed.environment import Heartbeat

with Heartbeat(hang_timeout=1) as heartbeat:
    heartbeat.trains = True
    with heartbeat.wait_longer():
        time.sleep(2)
    print("saved", flush=True)
    time.sleep(10)
"""
    code, out, err = launch(tmp_path, script)
    assert (code, out) == (1, "saved\n")
    assert "Timeout (0:00:01)!" in err
