"""A file is whole or what it was before, and of lines that are added one by one only whole ones stay."""

import errno
import os

import pytest

from meme_llava.errors import DiskFullError, UserError
from meme_llava.storage import files
from meme_llava.storage.files import (
    append_line,
    cut_torn_line,
    explain_full_disk,
    read_lines,
    write_json,
    write_lines,
    write_whole,
)

VALUE = {"text": "一行\u2028两行", "half": "\ud83d"}


def raise_disk_full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [write_whole, write_json, lambda path, text: write_lines(path, [text])])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch, write):
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with (
        pytest.raises(DiskFullError, match=r"a\.json: the disk is full\. Free some\."),
        explain_full_disk(path, "Free some."),
    ):
        write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_mode_of_the_umask_and_its_bytes_unchanged(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a.html", "表\r\n")
    finally:
        os.umask(before)
    assert (tmp_path / "a.html").read_bytes() == "表\r\n".encode()
    assert (tmp_path / "a.html").stat().st_mode & 0o777 == mode


def test_lines_are_read_as_they_were_added(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"n": 1}])
    append_line(tmp_path / "a.jsonl", VALUE)
    assert read_lines(tmp_path / "a.jsonl") == [{"n": 1}, VALUE]
    (tmp_path / "b.jsonl").write_text('{"n": 1}\n{"n":\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_lines(tmp_path / "b.jsonl")


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    append_line(path, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, {"n": 2})
    append_line(path, {"n": 3})
    assert read_lines(path) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize(
    "end, torn, values",
    [
        ("", "", [1]),
        ('{"n": 2', '{"n": 2', [1]),
        ('{"n": 2}', "", [1, 2]),  # only the line break is missing
    ],
)
def test_a_torn_last_line_is_cut_off(tmp_path, end, torn, values):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' + end)
    assert cut_torn_line(path).decode() == torn
    assert read_lines(path) == [{"n": value} for value in values]


def test_a_file_of_someone_else_is_not_cut(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(ValueError, match="holds no lines of JSON"):
        cut_torn_line(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes"


def test_a_file_that_got_its_final_name_meanwhile_is_left_alone(tmp_path, monkeypatch):
    unfinished, final = tmp_path / ".a.incomplete", tmp_path / "a"
    try_lock = files._try_lock

    def finish_it_first(descriptor):
        if not final.exists():
            unfinished.write_bytes(b"whole")
            unfinished.replace(final)
        return try_lock(descriptor)

    monkeypatch.setattr(files, "_try_lock", finish_it_first)
    with files.open_alone(unfinished, final) as file:
        file.write(b"another")
        with pytest.raises(UserError, match="is being written by another process"):
            files.open_alone(unfinished, final)
    assert final.read_bytes() == b"whole" and unfinished.read_bytes() == b"another"
