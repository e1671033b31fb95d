"""The run record of an output folder, on machines that lack what it asks."""

import subprocess

from meme_llava.storage import run_record
from meme_llava.storage.run_record import describe_environment, read_run_record, write_run_record


def test_a_machine_without_git_writes_its_results_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_run_record(tmp_path, "check")
    environment = read_run_record(tmp_path)["environment"]
    assert environment["git_commit"] is None and environment["git_changed_files"] is None


def test_code_that_is_no_checkout_has_no_commit_and_no_count_of_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    environment = describe_environment()
    assert environment["git_commit"] is None and environment["git_changed_files"] is None


def test_the_commit_and_the_changed_files_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    (tmp_path / "new.txt").touch()
    environment = describe_environment()
    assert len(environment["git_commit"]) == 40 and environment["git_changed_files"] == 1
