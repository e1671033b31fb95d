"""How a script ends: one sentence for what the user can mend, silence for a closed pipe, a traceback for our faults."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, train_flags

from meme_llava.errors import UserError, count, printable, stop_on_user_error


def run_main(body: str, command: str = '"$0" -c "$1"', **environment) -> subprocess.CompletedProcess:
    """A script whose main is `body`, in a shell of its own."""
    code = "import os\nfrom pathlib import Path\nfrom meme_llava.errors import stop_on_user_error\n"
    code += f"@stop_on_user_error\ndef main(argv=None):\n    {body}\nmain()"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_letter_that_the_console_lacks_is_a_question_mark():
    done = run_main("print('好')", PYTHONIOENCODING="latin-1:strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\n", b"")


def test_an_error_is_printed_on_such_a_console_too():
    done = run_main("raise __import__('meme_llava.errors').errors.UserError('好')", PYTHONIOENCODING="latin-1:strict")
    assert (done.returncode, done.stderr) == (2, b"error: ?\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_a_script_in_silence(lines):
    wait = "import time; time.sleep(0.2); "  # for the reader to go
    done = run_main(f"{wait}[print(line) for line in range({lines})]", '"$0" -c "$1" | true')
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_connection_keeps_its_traceback():
    ours, theirs = socket.socketpair()
    theirs.close()

    @stop_on_user_error
    def main(argv):
        ours.sendall(b"x")

    with ours, pytest.raises(BrokenPipeError):
        main([])


def write_below_a_file(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file" / "output").mkdir(parents=True)


def follow_a_circle(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    (folder / "circle").open()


def resolve_a_circle(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    (folder / "circle").resolve(strict=True)


def write_at_a_dangling_link(folder: Path) -> None:
    (folder / "link").symlink_to("nothing")
    (folder / "link").mkdir(exist_ok=True)


def refuse(number: int):
    # Root, as which tests often run, may write everywhere.
    def write(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder / "output"))

    return write


@pytest.mark.parametrize(
    ("work", "sentence", "code"),
    [
        (write_below_a_file, "file/output: a part of this path is a file, expected a folder", 2),
        (follow_a_circle, "circle: its links lead back to themselves; remove one of them", 2),
        (resolve_a_circle, "circle: its links lead back to themselves; remove one of them", 2),
        (
            write_at_a_dangling_link,
            "link: a file or a link to nothing has this name; remove it, or choose another place",
            2,
        ),
        (lambda folder: (folder / ("x" * 300)).mkdir(), "a name has at most 255 bytes; choose a shorter one", 2),
        (refuse(13), "output: this user may not read or write it; see `ls -ld`, or choose another place", 2),
        (refuse(1), "output: this user may not read or write it; see `ls -ld`, or choose another place", 2),
        (refuse(30), "output: its disk can only be read; choose another place", 2),
        (refuse(28), "output: the disk is full; free some room, or choose another place", 7),
    ],
)
def test_what_the_operating_system_refuses_is_one_sentence(work, sentence, code, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        stop_on_user_error(lambda argv: work(tmp_path))([])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == code
    assert line.startswith(f"error: {tmp_path}") and line.endswith(sentence)


def test_a_deleted_current_folder_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        stop_on_user_error(lambda argv: Path("x").resolve())([])
    assert capsys.readouterr().err == "error: the current folder was deleted; cd to another one\n"


def test_a_missing_file_of_ours_keeps_its_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        stop_on_user_error(lambda argv: (tmp_path / "missing").read_text())([])


def test_control_characters_do_not_reach_the_terminal(capsys):
    def main(argv):
        raise UserError("the server said \x1b[2J\x9b0m\a\r\n\tfine")

    with pytest.raises(SystemExit):
        stop_on_user_error(main)([])
    assert capsys.readouterr().err == "error: the server said \\x1b[2J\\x9b0m\\x07\\x0d\n\tfine\n"
    assert printable("哈哈😂é") == "哈哈😂é"


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [(0, ["image"], "0 images"), (1, ["image"], "1 image"), (1024, ["image"], "1,024 images")]
    + [(1, ["copy", "copies"], "1 copy"), (2, ["copy", "copies"], "2 copies")],
)
def test_a_number_agrees_with_its_noun(number, words, text):
    assert count(number, *words) == text


def test_a_word_that_is_not_utf8_is_named():
    done = run_main(
        "__import__('infer').main()", r'"$0" -c "$1" --model m --image $(printf "\xba\xc3.jpg")', PYTHONUTF8="1"
    )
    sentence = (
        r"'\udcba\udcc3.jpg' is not UTF-8; rename the file (convmv -f gbk -t utf-8), or set the terminal to UTF-8"
    )
    assert done.returncode == 2 and sentence in done.stderr.decode()


OUTPUTS = {
    "build_base_model": ["--language_model", "{language_model}", "--vision_model", "{vision_tower}"],
    "merge_lora": ["--adapter", "{trained}"],
    "check": ["--annotations", "{annotations}", "--image_folder", "{image_folder}"],
    "evaluate": ["--model", "{base}", "--annotations", "{annotations}", "--image_folder", "{image_folder}"],
    "train": [],
}


@pytest.mark.parametrize("script", OUTPUTS)
def test_an_output_below_a_file_is_one_sentence(world, trained, tmp_path, capsys, script):
    (tmp_path / "file").touch()
    output_dir = tmp_path / "file" / "output"
    places = {**vars(world), "trained": trained}
    flags = [flag.format(**places) for flag in OUTPUTS[script]] or train_flags(world, output_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main([*flags, "--output_dir", str(output_dir)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(said) == 1
    assert said[0].endswith(": a part of this path is a file, expected a folder")
