"""Output directories are whole or not there, whatever kills the process, and nobody's files are lost."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from conversions import BASE_FILES

import build_base_model
import merge_lora
from meme_llava.errors import UserError
from meme_llava.storage import tensor_writer
from meme_llava.storage.folders import write_directory

OLD = {
    "run_record.json": b"{}",
    "old.txt": b"old",
    "part/one.txt": b"1",
    "part/two.txt": b"2",
    "weights.safetensors": b"old weights",
}
NEW = {"run_record.json": b"[]", "new.txt": b"new", "sub/deep.txt": b"deep"}


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def write_new(output_dir, overwrite=False):
    with write_directory(output_dir, overwrite) as folder:
        fill(folder, NEW)


def start(function, *arguments):
    """Run a function in a process of its own, a copy of this one, which needs no imports."""

    def run():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def die_at(owner, name, call, after=False):
    """In this process, be killed as it makes its `call`-th call of a function, or as it comes back from it."""
    function, calls = getattr(owner, name), 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == call and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def name_point(value):
    """How pytest names a point of `die_at`."""
    return f"{value[1]}_{value[2]}{'_after' * (len(value) > 3)}" if isinstance(value, tuple) else ""


def run_until_killed(point, function, *arguments):
    def run():
        die_at(*point)
        function(*arguments)

    process = start(run)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "the process must die where it should, or this test shows nothing"


def test_a_directory_gets_its_name_when_all_is_written(tmp_path):
    out = tmp_path / "made" / "on the way" / "out"
    with write_directory(out, False) as folder:
        fill(folder, NEW)
        assert not out.exists() and folder.parent == out.parent
    assert read_files(out) == NEW and names_of(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, error, overwrite):
    out = tmp_path / "out"
    if overwrite:
        fill(out, OLD)
    with pytest.raises(error), write_directory(out, overwrite) as folder:
        fill(folder, NEW)
        raise error("stop")
    assert names_of(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or read_files(out) == OLD


def test_overwrite_replaces_and_leaves_no_leftovers(tmp_path):
    out = tmp_path / "out"
    fill(out, OLD)
    with write_directory(out, True) as folder:
        fill(folder, NEW)
        assert read_files(out) == OLD, "the old one stays until the new one is whole"
    assert read_files(out) == NEW and names_of(tmp_path) == ["out"]


def test_nothing_is_replaced_without_being_told(tmp_path):
    fill(tmp_path / "out", OLD)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="out: is not empty. Choose another --output_dir, or pass --overwrite"):
        write_new(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="file: is a file, expected a directory to write to"):
            write_new(tmp_path / "file", overwrite)
    assert read_files(tmp_path / "out") == OLD and (tmp_path / "file").read_text() == "mine"
    write_new(tmp_path / "empty")
    assert read_files(tmp_path / "empty") == NEW
    assert names_of(tmp_path) == ["empty", "file", "out"]


@pytest.mark.parametrize("name", [".", "..", "/", "old/.."])
def test_a_path_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, name):
    fill(tmp_path / "old", OLD)
    monkeypatch.chdir(tmp_path / "old")
    with pytest.raises(UserError, match="is not a name for a new directory; give --output_dir one of its own"):
        write_new(Path(name), overwrite=True)
    assert read_files(tmp_path / "old") == OLD


def test_files_that_came_meanwhile_are_not_lost(tmp_path):
    """Merging takes minutes; what another program put at the place meanwhile is not a leftover of ours."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out: is not empty"), write_directory(out, False) as folder:
        fill(folder, NEW)
        fill(out, OLD)
    assert read_files(out) == OLD and names_of(tmp_path) == ["out"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path):
    """Also links, whose targets stay."""
    outside = tmp_path / "outside"
    fill(outside, OLD)
    left = tmp_path / ".out.incomplete"
    fill(left, {"model.safetensors": b"half", "new.txt": b"half", "folder/in/folder.txt": b"half"})
    (left / "link").symlink_to(outside)
    (left / "file_link").symlink_to(outside / "old.txt")
    write_new(tmp_path / "out")
    assert read_files(tmp_path / "out") == NEW and read_files(outside) == OLD
    assert names_of(tmp_path) == ["out", "outside"]


def test_a_replaced_directory_comes_back_where_the_new_one_never_came(tmp_path):
    """A process was killed between the two renames: `out` is gone, the old one stands beside."""
    out, replaced = tmp_path / "out", tmp_path / ".out.replaced"
    fill(replaced, OLD)
    fill(tmp_path / ".out.incomplete", NEW)
    with pytest.raises(UserError, match="out: is not empty"):
        write_new(out)
    assert read_files(out) == OLD and not replaced.exists()
    with pytest.raises(ZeroDivisionError), write_directory(out, True):
        raise ZeroDivisionError
    assert read_files(out) == OLD and names_of(tmp_path) == ["out"]
    write_new(out, overwrite=True)
    assert read_files(out) == NEW and names_of(tmp_path) == ["out"]


def test_a_replaced_directory_beside_a_whole_one_is_removed(tmp_path):
    """A process was killed while it removed what it had replaced."""
    fill(tmp_path / "out", OLD)
    fill(tmp_path / ".out.replaced", {"part/two.txt": b"2"})
    write_new(tmp_path / "out", overwrite=True)
    assert read_files(tmp_path / "out") == NEW and names_of(tmp_path) == ["out"]


def test_half_of_a_replaced_directory_never_comes_back(tmp_path):
    """Killed while it removed what it had replaced; then the user moves the new result away and starts again."""
    out = tmp_path / "out"
    fill(out, OLD)
    run_until_killed((os, "unlink", 2), write_new, out, True)
    assert read_files(out) == NEW
    out.rename(tmp_path / "kept")
    write_new(out)
    assert read_files(out) == NEW
    assert names_of(tmp_path) == ["kept", "out"]


def test_a_linked_output_dir_stays_a_link(tmp_path):
    """output -> /a/larger/disk: the result goes there, again and again, and nothing is left beside."""
    target, out = tmp_path / "disk" / "results", tmp_path / "here" / "out"
    fill(target, OLD)
    out.parent.mkdir()
    out.symlink_to(target)
    for _ in range(3):
        write_new(out, overwrite=True)
        assert out.is_symlink() and read_files(target) == NEW
        assert names_of(out.parent) == ["out"] and names_of(target.parent) == ["results"]


def hold(output_dir, ready):
    with write_directory(output_dir, False) as folder:
        fill(folder, OLD)
        ready.touch()
        time.sleep(120)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    out, ready = tmp_path / "out", tmp_path / "ready"
    first = start(hold, out, ready)
    wait_for(ready.exists)
    for overwrite in (False, True):
        with pytest.raises(UserError) as error:
            write_new(out, overwrite)
        assert str(error.value) == f"{out}: is being written by another process; wait for it or stop it"
    assert read_files(tmp_path / ".out.incomplete") == OLD, "what the first has written so far must stay"
    write_new(tmp_path / "other")
    kill(first)
    assert not out.exists() and read_files(tmp_path / ".out.incomplete") == OLD
    write_new(out)
    assert read_files(out) == NEW and names_of(tmp_path) == ["other", "out", "ready"]


@pytest.mark.parametrize(
    ("point", "state"),
    [
        ((os, "fsync", 1), OLD),
        ((os, "fsync", 5), OLD),
        ((Path, "rename", 1), OLD),
        ((Path, "rename", 1, True), None),
        ((Path, "rename", 2), None),
        ((Path, "rename", 2, True), NEW),
        ((os, "fsync", 6), NEW),
        ((os, "unlink", 1), NEW),
        ((os, "unlink", 3), NEW),
        ((os, "rmdir", 1, True), NEW),
    ],
    ids=name_point,
)
def test_whole_after_a_kill_at_any_step(tmp_path, point, state):
    """Five syncs (three files, a folder, the directory), two renames, the parent's sync, the removal of the old one."""
    out = tmp_path / "out"
    fill(out, OLD)
    run_until_killed(point, write_new, out, True)
    assert read_files(out) == (state or {})
    with pytest.raises(UserError, match="out: is not empty"):
        write_new(out)
    assert read_files(out) == (state or OLD), "between the renames the old one comes back"
    write_new(out, overwrite=True)
    assert read_files(out) == NEW and names_of(tmp_path) == ["out"]


def make_flags(script, world, trained, out):
    if script is merge_lora:
        flags = ["--adapter", trained, "--output_dir", out, "--dtype", "float32"]
    else:
        flags = ["--language_model", world.language_model, "--vision_model", world.vision_tower, "--output_dir", out]
    return [*map(str, flags), "--no_verify"]


def read_result(folder):
    """All files' bytes, but for the run record's time."""
    files = read_files(folder)
    record = json.loads(files.pop("run_record.json"))
    del record["environment"]
    record["settings"].pop("overwrite")
    return files | {"run_record.json": record}


@pytest.fixture(scope="module")
def results(world, trained, tmp_path_factory):
    """What the scripts write when nobody disturbs them."""
    found = {}
    for script in (merge_lora, build_base_model):
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        script.main(make_flags(script, world, trained, out))
        found[script] = read_result(out)
        assert set(found[script]) == BASE_FILES
    return found


def check_second_start(script, flags, out, expected):
    script.main([*flags, "--overwrite"])
    found = read_result(out)
    found["run_record.json"]["settings"]["output_dir"] = expected["run_record.json"]["settings"]["output_dir"]
    assert found == expected
    assert names_of(out.parent) == ["out"]


WRITING = [
    (tensor_writer, "_write_bytes", 1),
    (tensor_writer, "_write_bytes", 30),
    (os, "fsync", 1, True),
    (shutil, "copyfile", 3),
    (os, "fsync", 6),
]
REPLACING = [(Path, "rename", 1, True), (Path, "rename", 2, True), (os, "unlink", 3)]


@pytest.mark.parametrize("point", WRITING, ids=name_point)
def test_a_merge_killed_while_writing_is_whole_after_the_next(world, trained, tmp_path, results, point):
    flags = make_flags(merge_lora, world, trained, tmp_path / "out")
    run_until_killed(point, merge_lora.main, flags)
    assert names_of(tmp_path) == [".out.incomplete"]
    check_second_start(merge_lora, flags, tmp_path / "out", results[merge_lora])


@pytest.mark.parametrize("point", WRITING + REPLACING, ids=name_point)
def test_a_merge_killed_while_replacing_is_whole_after_the_next(world, trained, tmp_path, results, point):
    out = tmp_path / "out"
    fill(out, OLD)
    flags = make_flags(merge_lora, world, trained, out)
    run_until_killed(point, merge_lora.main, [*flags, "--overwrite"])
    if point in WRITING:
        assert read_files(out) == OLD
    elif point == (Path, "rename", 1, True):
        assert not out.exists()
    else:
        assert set(read_files(out)) == BASE_FILES
    check_second_start(merge_lora, flags, out, results[merge_lora])


def slow_down(seconds):
    """In this process, take so long for every piece that is written."""
    write = tensor_writer._write_bytes

    def write_slowly(file, view):
        time.sleep(seconds)
        write(file, view)

    tensor_writer._write_bytes = write_slowly


def run_slowly(script, flags):
    slow_down(0.05)
    script.main(flags)


@pytest.mark.parametrize(
    "script",
    [pytest.param(merge_lora, marks=pytest.mark.long, id="merge"), pytest.param(build_base_model, id="build")],
)
def test_kills_at_any_time_leave_the_old_result_and_are_no_obstacle(world, trained, tmp_path, results, script):
    """From outside, later and later, each time followed by a start that finds the leftovers."""
    out = tmp_path / "out"
    flags = make_flags(script, world, trained, out)
    for delay in (0.0, 0.1, 0.4, 1.0):
        fill(out, OLD)
        process = start(run_slowly, script, [*flags, "--overwrite"])
        wait_for((tmp_path / ".out.incomplete" / "model.safetensors").exists)
        time.sleep(delay)
        kill(process)
        assert read_files(out) == OLD and names_of(tmp_path) == [".out.incomplete", "out"]
        check_second_start(script, flags, out, results[script])
        shutil.rmtree(out)


# A script as the user starts it, with slow writing.
SLOW_PROGRAM = """
import runpy, sys, time
from meme_llava.storage import tensor_writer
write = tensor_writer._write_bytes
def write_slowly(file, view):
    time.sleep(0.2)
    write(file, view)
tensor_writer._write_bytes = write_slowly
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("script", [merge_lora, build_base_model], ids=["merge", "build"])
def test_a_killed_command_is_started_again(world, trained, tmp_path, results, script):
    """The whole story as a user meets it: a command, kill -9, a refused impatient second one, the command again."""
    out = tmp_path / "out"
    flags = make_flags(script, world, trained, out)
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PROGRAM, f"{script.__name__}.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for((tmp_path / ".out.incomplete" / "model.safetensors").exists)
        with pytest.raises(SystemExit) as stop:
            script.main(flags)
        assert stop.value.code == 2
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists() and names_of(tmp_path) == [".out.incomplete"]
    script.main(flags)
    found = read_result(out)
    found["run_record.json"]["settings"]["output_dir"] = results[script]["run_record.json"]["settings"]["output_dir"]
    assert found == results[script] and names_of(tmp_path) == ["out"]
