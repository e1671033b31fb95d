"""Checkpoints are whole or absent: damage of any kind is found, named and passed over, and two are always kept."""

import contextlib
import json
import os
import resource
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batches import load_prepared
from conftest import read_losses, train_flags
from safetensors.torch import load_file

import infer
import merge_lora
import train
from meme_llava.errors import CheckpointError, DiskFullError, UserError
from meme_llava.model.llava import load_processing
from meme_llava.model.trainable import save_trained_weights
from meme_llava.storage import tensor_writer
from meme_llava.storage.run_record import (
    list_checkpoints,
    read_manifest,
    read_run_record,
    verify_directory,
    write_manifest,
)
from meme_llava.train import checkpoints, prepared_run, run_plan
from meme_llava.train.checkpoints import check_room, find_newest, hold_output_dir, write_checkpoint
from meme_llava.train.run_plan import count_steps, list_warnings
from meme_llava.train.settings import parse_train_arguments
from meme_llava.train.start import StartPoint, check_continues

CHECKPOINT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "manifest.json",
    "optimizer-00001-of-00001.safetensors",
    "processor_config.json",
    "run_record.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """Six steps with every second one kept."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    train.main(train_flags(world, output_dir, max_steps=6, save_steps=2, save_total_limit=3, lora_dropout=0.1))
    return output_dir


def interrupt(finished, output_dir) -> Path:
    """The directory as it was after step 4, the last two checkpoints there."""
    output_dir.mkdir()
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    return output_dir


def resume_flags(world, output_dir, **changes):
    recipe = {"max_steps": 6, "save_steps": 2, "save_total_limit": 3, "lora_dropout": 0.1}
    return train_flags(world, output_dir, **{**recipe, "resume_from_checkpoint": "latest", **changes})


def resume(world, output_dir, **changes):
    train.main(resume_flags(world, output_dir, **changes))


def test_a_run_that_was_killed_after_its_last_checkpoint_keeps_no_more_than_asked_for(world, finished, tmp_path):
    output_dir = interrupt(finished, tmp_path / "out")
    shutil.copytree(finished / "checkpoint-6", output_dir / "checkpoint-6")
    resume(world, output_dir, save_total_limit=2)
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-4", "checkpoint-6"]
    assert (output_dir / "run_record.json").is_file()


def fail(capsys, world, output_dir, code, **changes) -> str:
    with pytest.raises(SystemExit) as stop:
        resume(world, output_dir, **changes)
    assert stop.value.code == code
    return capsys.readouterr().err


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "flipped": flip_byte,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(finished, tmp_path, capsys, name, damage):
    output_dir = interrupt(finished, tmp_path / "out")
    assert {path.name for path in (output_dir / "checkpoint-4").iterdir()} == set(CHECKPOINT_FILES)
    DAMAGES[damage](output_dir / "checkpoint-4" / name)
    assert find_newest(output_dir) == output_dir / "checkpoint-2"
    said = capsys.readouterr().out
    assert said.startswith("passed over checkpoint-4: ") and name in said


def test_every_byte_of_a_manifest_counts(finished, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(finished / "checkpoint-4", folder)
    text = (folder / "manifest.json").read_bytes()
    for place in range(0, len(text), 37):
        changed = bytearray(text)
        changed[place] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest.json: |is missing|says|differs"):
            verify_directory(folder)
    (folder / "manifest.json").write_bytes(text.replace(b"\n", b"\r\n"))
    with pytest.raises(CheckpointError, match="its own checksum differs"):
        verify_directory(folder)


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(world, finished, tmp_path, capsys):
    output_dir = interrupt(finished, tmp_path / "out")
    flip_byte(output_dir / "checkpoint-4" / "optimizer-00001-of-00001.safetensors")
    resume(world, output_dir)
    said = capsys.readouterr().out
    assert "passed over checkpoint-4: " in said and "sha256 differs" in said
    assert "checkpoint-4 is kept as checkpoint-4.passed_over" in said
    assert f"continuing from {output_dir}/checkpoint-2, after 2 steps and 8 records" in said
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert read_losses(output_dir) == read_losses(finished)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (output_dir, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # It is known by where it began, and says where it was continued.
    begun = read_run_record(finished / "checkpoint-2")["environment"]
    for folder, continued in ((finished, []), (output_dir / "checkpoint-4", [2]), (output_dir, [2])):
        record = read_run_record(folder)
        assert record["environment"] == begun and [part["step"] for part in record["continued"]] == continued


def test_a_checkpoint_of_another_run_does_not_train_into_a_run(world, finished, tmp_path, capsys):
    output_dir = interrupt(finished, tmp_path / "out")
    for checkpoint in (finished / "checkpoint-2", finished / "checkpoint-4"):
        flags = train_flags(world, output_dir, max_steps=6, lora_dropout=0.1, resume_from_checkpoint=checkpoint)
        with pytest.raises(SystemExit):
            train.main(flags)
        assert f"{output_dir}: is not empty" in capsys.readouterr().err
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-2", "checkpoint-4"]


def test_a_run_goes_on_from_a_checkpoint_of_any_name_but_not_from_a_result(world, finished, tmp_path, capsys):
    output_dir, kept = interrupt(finished, tmp_path / "out"), tmp_path / "out" / "kept"
    error = fail(capsys, world, output_dir, 4, resume_from_checkpoint=finished)
    assert f"{finished}: is a run's result" in error and f"such as {finished / 'checkpoint-6'}, or latest" in error
    (output_dir / "checkpoint-4").rename(kept)
    shutil.copytree(finished / "checkpoint-6", output_dir / "checkpoint-6")
    resume(world, output_dir, resume_from_checkpoint=kept)
    assert "checkpoint-6 is kept as checkpoint-6.passed_over" in capsys.readouterr().out
    assert read_losses(output_dir) == read_losses(finished)


def test_without_a_whole_checkpoint_nothing_starts_over_by_itself(world, finished, tmp_path, capsys):
    output_dir = interrupt(finished, tmp_path / "out")
    for step in (2, 4):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").unlink()
    error = fail(capsys, world, output_dir, 4)
    assert "none of checkpoint-2, checkpoint-4 is whole, for the reasons above" in error
    assert len(list_checkpoints(output_dir)) == 2


def test_a_manifest_says_what_a_reader_must_know(world, finished):
    manifest = read_manifest(finished / "checkpoint-4")
    assert (manifest["step"], manifest["records"], manifest["updates"]) == (4, 16, 4)
    assert (manifest["processes"], manifest["engine"], manifest["global_batch_size"]) == (1, "single", 4)
    record = json.loads((finished / "run_record.json").read_text())
    assert manifest["base_fingerprint"] == record["base"]["fingerprint"]
    assert manifest["data_sha256"] == record["data"]["sha256"]
    assert manifest["libraries"]["torch"] == version("torch")
    assert set(manifest["files"]) == set(CHECKPOINT_FILES) - {"manifest.json"}


def write_small(output_dir, step, keep=2, content=b"x"):
    def write_files(folder):
        (folder / "weights").write_bytes(content)
        return [folder / "weights"]

    return write_checkpoint(output_dir, step, len(content), write_files, lambda: {"step": step}, keep)


def test_older_checkpoints_go_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    for step in (1, 2, 10):
        write_small(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]

    def find_damage(folder):
        raise CheckpointError(f"{folder}: the disk gave back something else")

    monkeypatch.setattr(checkpoints, "verify_directory", find_damage)
    with pytest.raises(CheckpointError, match="something else"):
        write_small(tmp_path, 11)
    assert [path.name for path in list_checkpoints(tmp_path)][:2] == ["checkpoint-2", "checkpoint-10"]


def die_in_second_write(tmp_path, event) -> bool:
    """Write a second checkpoint in a process that dies at its `event`-th touch of the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        counted = [0]

        def count():
            counted[0] += 1
            if counted[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

        def wrap(original):
            return lambda *arguments, **options: (count(), original(*arguments, **options), count())[1]

        for name in ("fsync_path", "write_manifest", "verify_directory", "describe_file"):
            setattr(checkpoints, name, wrap(getattr(checkpoints, name)))
        for name in ("rename", "mkdir"):
            setattr(Path, name, wrap(getattr(Path, name)))
        checkpoints.shutil = SimpleNamespace(rmtree=wrap(shutil.rmtree), disk_usage=shutil.disk_usage)
        write_small(tmp_path, 3, content=b"new" * 1000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_death_at_any_point_of_a_save_leaves_whole_checkpoints_alone(tmp_path):
    """Before and behind everything that reaches the disk; with two checkpoints there, the oldest of which is to go."""
    event, outcomes = 1, set()
    while True:
        folder = tmp_path / str(event)
        folder.mkdir()
        for step in (1, 2):
            write_small(folder, step)
        died = die_in_second_write(folder, event)
        names = [path.name for path in list_checkpoints(folder)]
        for path in list_checkpoints(folder):
            verify_directory(path)
        assert len(names) >= 2 and "checkpoint-2" in names
        newest = find_newest(folder)
        outcomes.add(newest.name)
        # The same again goes well, whatever lies about, and nothing but checkpoints is left.
        write_small(folder, 3 if newest.name == "checkpoint-2" else 4)
        assert not list(folder.glob(".*"))
        if not died:
            break
        event += 1
    assert event > 20 and outcomes == {"checkpoint-2", "checkpoint-3"}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_small(tmp_path, 1)

    def write_files(folder):
        (folder / "weights").write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match=r"No space left on device; it takes 5.0 MB, .* checkpoint-1 and older"):
        write_checkpoint(tmp_path, 2, 5_000_000, write_files, dict, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_disk_that_fills_under_what_libraries_write_is_full(world, tmp_path, what):
    """A limit of the size of files stands in for it."""
    model, processing = load_prepared(world), load_processing(world.base)

    def write_files(folder):
        if what == "weights":
            save_trained_weights(model, folder)
        prepared_run.write_sidecars(folder, processing, {})
        return []

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"could not be written \(File too large"):
            write_checkpoint(tmp_path, 1, 50_000, write_files, dict, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_before_the_first_byte(tmp_path):
    with pytest.raises(DiskFullError, match="no room for a checkpoint: .*There is no older checkpoint"):
        write_checkpoint(tmp_path, 1, 10**18, lambda folder: pytest.fail("it wrote"), dict, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("there", "saves", "keep", "checkpoints_of_room"),
    # Beside those that are there: a new one before the oldest goes, and the result, which is at most half of one.
    [
        *[(0, 1, 2, 1.5), (0, 2, 2, 2.5), (0, 3, 2, 3), (0, 99, 2, 3), (0, 99, 5, 6)],
        *[(2, 99, 2, 1), (1, 1, 2, 1.5), (4, 9, 2, 1)],
    ],
)
def test_a_run_asks_for_the_room_of_all_its_checkpoints(tmp_path, monkeypatch, there, saves, keep, checkpoints_of_room):
    for step in range(there):
        (tmp_path / f"checkpoint-{step}").mkdir()
    needed = int(checkpoints_of_room * 10**9) + 50_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    check_room(tmp_path, 10**9, saves, keep)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DiskFullError, match=rf"no room for the run: \d checkpoints? of 1.0 GB .*, {there} of them now"):
        check_room(tmp_path, 10**9, saves, keep)


def test_a_run_without_room_for_its_end_does_not_begin(world, tmp_path, monkeypatch, capsys):
    """Six checkpoints are to be written, of which two stay; there is room for the sidecars and for no tensor."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    flags = {"resume_from_checkpoint": None, "save_steps": 1, "save_total_limit": 2}
    error = fail(capsys, world, tmp_path / "out", 7, **flags)
    assert "\nerror: no room for the run: 3 checkpoints of 85.2 KB are there at one time, 0 of them now" in error
    assert list_checkpoints(tmp_path / "out") == []


def test_a_real_full_disk(world, tmp_path):
    """A file system of 64 MiB, filled by somebody else."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=64m tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        write_small(disk, 1, content=b"x" * 1000)
        (disk / "other").write_bytes(b"x" * (60 << 20))
        with pytest.raises(DiskFullError, match="no room for a checkpoint"):
            write_small(disk, 2)
        tensor_writer_check = tensor_writer.check_free_space
        checkpoints.check_free_space = lambda folder, needed: None
        try:
            with pytest.raises(DiskFullError, match="No space left on device"):
                write_small(disk, 2, content=b"x" * (8 << 20))
        finally:
            checkpoints.check_free_space = tensor_writer_check
        assert sorted(path.name for path in disk.iterdir()) == ["checkpoint-1", "other"]
        verify_directory(disk / "checkpoint-1")
    finally:
        os.system(f"umount {disk}")


def test_two_runs_do_not_write_one_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_PATIENCE_SECONDS", 0.5)
    with hold_output_dir(tmp_path):
        with pytest.raises(UserError, match="is being written by another process"), hold_output_dir(tmp_path):
            pass
    with hold_output_dir(tmp_path):
        pass


@pytest.mark.parametrize("resumes", [False, True])
def test_what_another_run_wrote_before_the_lock_was_free_stays(world, finished, tmp_path, monkeypatch, capsys, resumes):
    output_dir, hold = tmp_path / "out", checkpoints.hold_output_dir
    if resumes:
        interrupt(finished, output_dir)

    @contextlib.contextmanager
    def hold_later(folder):
        shutil.copytree(finished, output_dir, dirs_exist_ok=True)
        with hold(folder):
            yield

    monkeypatch.setattr(checkpoints, "hold_output_dir", hold_later)
    error = fail(capsys, world, output_dir, 2, **({} if resumes else {"resume_from_checkpoint": None}))
    assert f"{output_dir}: another run wrote there while this one was being prepared" in error
    assert read_tree(output_dir) == read_tree(finished)


def read_tree(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_result_that_was_not_put_in_place_whole_is_put_there_without_training(world, finished, tmp_path, monkeypatch):
    output_dir = interrupt(finished, tmp_path / "out")
    shutil.copytree(finished / "checkpoint-6", output_dir / "checkpoint-6")
    (output_dir / "adapter_config.json").write_text("half")
    monkeypatch.setattr(prepared_run, "load_packed_llava", lambda *_: pytest.fail("the model was loaded"))
    resume(world, output_dir)
    verify_directory(output_dir)
    assert json.loads((output_dir / "run_record.json").read_text())["finished"] is True


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "run_record.json"])
def test_merge_and_infer_refuse_a_damaged_adapter(world, finished, tmp_path, capsys, name):
    adapter = tmp_path / "adapter"
    shutil.copytree(finished, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = (adapter / name).read_text(encoding="latin-1")
    (adapter / name).write_text(content.replace("0", "1"), encoding="latin-1")
    commands = [
        (merge_lora.main, ["--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]),
        (infer.main, ["--model", str(adapter), "--image", str(world.image_folder / "p0.png")]),
    ]
    for main, flags in commands:
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code in (2, 4)
        assert str(adapter / name) in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_lr": 1e-3}, "low_lr was 0.005, is 0.001"),
        ({"global_batch_size": 2, "device_batch_size": 2}, "global_batch_size was 4, is 2"),
        ({"shared_images": None}, "shared_images was True, is False"),
    ],
)
def test_what_changed_is_refused_or_allowed_by_name(world, finished, tmp_path, capsys, changes, message):
    output_dir = interrupt(finished, tmp_path / "out")
    flags = {name: value for name, value in changes.items() if value is not None}
    extra = ["--no_shared_images"] if "shared_images" in changes else []
    base = {"max_steps": 6, "save_steps": 2, "lora_dropout": 0.1, "resume_from_checkpoint": "latest", **flags}
    with pytest.raises(SystemExit) as stop:
        train.main([*train_flags(world, output_dir, **base), *extra])
    assert stop.value.code == 4
    error = capsys.readouterr().err
    assert message in error and "pass --allow_changes to go on with it" in error
    train.main([*train_flags(world, output_dir, **base), *extra, "--allow_changes"])
    assert f"changed since, as allowed: {message}" in capsys.readouterr().out
    record = json.loads((output_dir / "run_record.json").read_text())
    records = 16 + 2 * changes.get("global_batch_size", 4)
    assert record["position"] == {"step": 6, "records": records}
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["epoch"] == records / 8


def test_a_finished_run_is_trained_longer_only_when_that_is_allowed(world, finished, tmp_path, capsys):
    output_dir = tmp_path / "out"
    shutil.copytree(finished, output_dir)
    assert "max_steps was 6, is 8" in fail(capsys, world, output_dir, 4, max_steps=8)
    train.main([*resume_flags(world, output_dir, max_steps=8), "--allow_changes"])
    assert len(read_losses(output_dir)) == 8
    assert json.loads((output_dir / "run_record.json").read_text())["step"] == 8
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*resume_flags(world, interrupt(finished, tmp_path / "cut"), max_steps=3), "--allow_changes"])
    assert stop.value.code == 4
    assert "checkpoint-4 has done 4 steps, and this run is to have 3; raise" in capsys.readouterr().err


def test_another_base_is_refused(world, finished, tmp_path, capsys):
    """Of equal shapes, only drawn otherwise."""
    other = tmp_path / "base"
    shutil.copytree(world.base, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one value somewhere
    weights.write_bytes(content)
    output_dir = interrupt(finished, tmp_path / "out")
    assert "its weights are not those that it was written with" in fail(capsys, world, output_dir, 4, model=other)
    (other / "run_record.json").unlink()  # which says what it was written with
    assert "the base model is another one" in fail(capsys, world, output_dir, 4, model=other)


def test_one_process_decides_for_all_whether_anything_is_left(monkeypatch):
    """Where a node saw another folder, it would train while the others leave, and wait for them."""
    monkeypatch.setattr(run_plan, "broadcast_from_main", lambda look: "as the main process found")
    plan = SimpleNamespace(start=SimpleNamespace(checkpoint=Path("not on this node")))
    assert run_plan.is_nothing_left(plan) == "as the main process found"


def make_record(**settings):
    data, base = {"sha256": "d", "records": 4}, {"fingerprint": "b"}
    return {"settings": settings, "data": data, "base": base, "step": 1, "finished": False}


def test_a_run_record_that_names_no_projector_had_none():
    ours = {**make_record(), "projector": None, "schedule": {"steps": 2}}
    start = StartPoint(Path("checkpoint-1"), 1, 4, make_record())
    assert check_continues(start, ours, allow_changes=False) == []
    with pytest.raises(CheckpointError, match="the projector of --projector_from is another one"):
        check_continues(start, ours | {"projector": {"weights": "w"}}, allow_changes=False)


def test_a_setting_that_is_gone_matters_where_it_was_given():
    ours = {**make_record(), "schedule": {"steps": 2}}
    without, given = (StartPoint(Path("checkpoint-1"), 1, 4, make_record(gone=value)) for value in (None, 0.1))
    assert check_continues(without, ours, allow_changes=False) == []
    with pytest.raises(CheckpointError, match="gone was 0.1, is None"):
        check_continues(given, ours, allow_changes=False)


def test_steps_are_counted_from_the_records_behind_a_checkpoint(world):
    arguments = parse_train_arguments(train_flags(world, Path("out"), num_train_epochs=5, global_batch_size=4), "")
    assert count_steps(arguments, 24)[0] == 30  # 120 records, 4 a step
    # 10 steps of 4, and the 80 that are left by 8.
    larger = parse_train_arguments(train_flags(world, Path("out"), num_train_epochs=5, global_batch_size=8), "")
    assert count_steps(larger, 24, first_step=10, first_record=40)[0] == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_epochs": "1e9"}, "--num_train_epochs 1e+09: trains on 2.4e+10 records, expected at most"),
        ({"num_train_epochs": "1e308"}, "--num_train_epochs 1e+308: trains on inf records"),
        ({"max_steps": 10**23}, "--max_steps 100000000000000000000000: trains on 4e+23 records"),
        ({"max_steps": 25_000_001}, "--max_steps 25000001: trains on 1e+08 records"),
        ({"global_batch_size": 10**9, "max_steps": 1}, "--global_batch_size 1000000000: trains on 1e+09 records"),
        ({"global_batch_size": 10**9}, "--global_batch_size 1000000000: trains on 1e+09 records"),
    ],
)  # fmt: skip
def test_a_run_without_end_is_refused(world, changes, message):
    arguments = parse_train_arguments(train_flags(world, Path("out"), **changes), "")
    with pytest.raises(UserError) as caught:
        count_steps(arguments, 24)
    assert str(caught.value).startswith(message)
    longest = parse_train_arguments(train_flags(world, Path("out"), max_steps=25_000_000), "")
    assert count_steps(longest, 24)[0] == 25_000_000


@pytest.mark.parametrize(
    ("records", "steps", "changes", "expected"),
    [
        (64, 20, {}, []),
        (64, 2, {"max_steps": 2}, []),
        (63, 20, {}, ["warning: a step takes 64 records, and the run has 63, so it takes some of them "]),
        (64, 1, {}, ["warning: the whole run has 1 step, and a new projector needs a few hundred; "]),
        (63, 19, {}, ["warning: a step takes 64 records", "warning: the whole run has 19 steps"]),
    ],
)  # fmt: skip
def test_what_can_hardly_be_meant_is_said(world, records, steps, changes, expected):
    arguments = parse_train_arguments(train_flags(world, Path("out"), global_batch_size=64, **changes), "")
    said = list_warnings(arguments, records, steps)
    assert len(said) == len(expected) and all(map(str.startswith, said, expected))


@pytest.mark.parametrize(
    ("records", "steps", "expected"),
    [
        (24, 30, "is a trained model; it is shown 24 records about 10 times each, and may forget what it knows;"),
        (24, 9, ""),  # a trained model needs no few hundred steps
        (100, 125, ""),
    ],
)
def test_few_records_over_a_trained_model_are_said(world, tmp_path, records, steps, expected):
    (tmp_path / "run_record.json").write_text('{"stage": "merge"}')
    arguments = parse_train_arguments(train_flags(world, Path("out"), global_batch_size=8, model=tmp_path), "")
    said = list_warnings(arguments, records, steps)
    assert len(said) == bool(expected) and all(expected in line for line in said)


def test_an_empty_manifest_lists_nothing_and_still_verifies(tmp_path):
    write_manifest(tmp_path, {}, {"fact": "事实"})
    assert verify_directory(tmp_path) == {"fact": "事实", "files": {}}
