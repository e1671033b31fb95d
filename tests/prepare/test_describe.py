"""data/describe.py before a server that misbehaves: what is asked again, what is kept, when it stops, what it costs."""

import base64
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("openai", reason="describe.py asks through it")

from caption_server import (  # noqa: E402
    BROKEN_JSON,
    CAPTION,
    COMPLETION_TOKENS,
    CUT_CONNECTION,
    HTML,
    LOOP,
    NO_CHOICES,
    NULL_CONTENT,
    PROMPT_TOKENS,
    REFUSAL,
    REFUSE,
    REPEAT,
    CaptionServer,
    Step,
    answer,
    fail,
    find_image,
)

from meme_llava.dataset.images import open_image  # noqa: E402
from meme_llava.errors import UserError  # noqa: E402
from meme_llava.inference import asking  # noqa: E402
from meme_llava.inference.endpoints import PRESETS, find_endpoint  # noqa: E402
from meme_llava.prepare.describing import DEFAULT_PROMPT, Prompt  # noqa: E402
from meme_llava.storage import files  # noqa: E402

SCRIPT = ROOT / "data" / "describe.py"
CANARY = "sk-canary-0123456789abcdef"
KEY_VARIABLE = "CAPTION_TEST_KEY"
NEW_TOKENS = 16  # a model of two training steps never stops by itself
TOKENS = PROMPT_TOKENS + COMPLETION_TOKENS

_spec = importlib.util.spec_from_file_location("describe_script", SCRIPT)
describe_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(describe_script)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits and a key whose value must never be seen."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv(KEY_VARIABLE, CANARY)


@pytest.fixture
def folder(tmp_path):
    """Four images of widths 40 to 43, by which the server knows them."""
    return make_images(tmp_path / "memes", range(40, 44))


def make_images(folder: Path, widths) -> Path:
    folder.mkdir()
    for width in widths:
        Image.new("RGB", (width, 30), (width, 100, 200)).save(folder / f"{width}.png")
    return folder


def make_flags(server, folder, output, *flags) -> list[str]:
    return [
        *("--images", str(folder), "--output", str(output), "--base_url", server.url, "--model", "eyes"),
        *("--key_variable", KEY_VARIABLE, "--timeout", "5", *flags),
    ]


def describe(server, folder, output, *flags) -> int:
    """Run the script and return its exit code."""
    try:
        describe_script.main(make_flags(server, folder, output, *flags))
    except SystemExit as stop:
        return stop.code
    return 0


def read_lines(output: Path) -> dict[str, dict]:
    """The last line of every image."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {line["picName"]: line for line in lines}


def describe_one(tmp_path, steps, *flags, width=40) -> tuple[int, dict | None, CaptionServer]:
    """Exit code, line and server of a run over one image that gets `steps`."""
    folder = make_images(tmp_path / "memes", [width])
    output = tmp_path / "captions.jsonl"
    with CaptionServer({width: steps}) as server:
        code = describe(server, folder, output, *flags)
    return code, read_lines(output).get(f"{width}.png"), server


# What is asked, and what a line holds


def test_every_image_gets_one_line(folder, tmp_path, capsys):
    (folder / "猫").mkdir()
    Image.new("RGB", (50, 30)).save(folder / "猫" / "无语 [1].jpg")
    (folder / "notes.txt").write_text("no image")
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        assert describe(server, folder, output) == 0
    lines = read_lines(output)
    assert len(output.read_text().splitlines()) == 5
    assert sorted(lines) == ["40.png", "41.png", "42.png", "43.png", "猫/无语 [1].jpg"]
    line = lines["41.png"]
    assert line.pop("seconds") >= 0
    assert len(line.pop("sha256")) == 64
    assert line == {
        "picName": "41.png",
        "description": "图中写着“41号鸭”，一只鸭子很开心。",
        "model": "eyes",
        "endpoint": server.url.removeprefix("http://").removesuffix("/v1"),
        "prompt": Prompt(DEFAULT_PROMPT, False).fingerprint,
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "attempts": 1,
    }
    shown = capsys.readouterr()
    assert "left out: 1 not an image, e.g. notes.txt\n" in shown.out
    assert "5 captions" in shown.out
    assert "5/5" in shown.err
    assert "tokens: 550 in this run" in shown.out


def test_request_holds_image_prompt_model_and_limit(tmp_path):
    _, _, server = describe_one(tmp_path, [answer()], "--max_new_tokens", "77")
    [body] = server.bodies
    assert "temperature" not in body
    assert body["model"] == "eyes"
    assert body["max_tokens"] == 77
    [message] = body["messages"]
    assert message["role"] == "user"
    assert message["content"][1] == {"type": "text", "text": DEFAULT_PROMPT}
    assert find_image(body).size == (40, 30)
    assert server.headers[0]["authorization"] == f"Bearer {CANARY}"


def test_a_temperature_is_sent_and_noted_if_given(tmp_path):
    _, line, server = describe_one(tmp_path, [answer()], "--temperature", "0.7")
    assert server.bodies[0]["temperature"] == line["temperature"] == 0.7


def test_default_prompt_asks_for_words_image_and_meaning():
    for words in ("一字不差", "画面", "含义", "不要编造"):
        assert words in DEFAULT_PROMPT


def test_prompt_of_a_file_and_file_name_as_hint(tmp_path):
    folder = tmp_path / "memes"
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(folder / "00016鸽子-当鸽的怎么能骗你呢.jpg")
    Image.new("RGB", (41, 30)).save(folder / "00017.jpg")
    (tmp_path / "prompt.txt").write_text("写了什么？\n", encoding="utf-8")
    with CaptionServer() as server:
        flags = ("--prompt_file", str(tmp_path / "prompt.txt"), "--use_file_name", "--concurrency", "1")
        assert describe(server, folder, tmp_path / "captions.jsonl", *flags) == 0
    first, second = (body["messages"][0]["content"][1]["text"] for body in server.bodies)
    assert first.startswith("写了什么？\n")
    assert "“鸽子-当鸽的怎么能骗你呢”" in first
    assert second == "写了什么？"


def test_images_are_sent_as_training_sees_them_and_scaled_down(tmp_path):
    folder = tmp_path / "memes"
    folder.mkdir()
    Image.new("RGB", (1200, 600), "red").save(folder / "big.jpg")
    Image.new("RGBA", (60, 30), (0, 0, 0, 0)).save(folder / "clear.png")
    turned = Image.new("RGB", (30, 61))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    with CaptionServer() as server:
        assert describe(server, folder, tmp_path / "captions.jsonl", "--max_side", "300", "--concurrency", "1") == 0
    big, clear, turned = (find_image(body) for body in server.bodies)
    assert big.size == (300, 150)
    assert clear.getpixel((5, 5)) == (255, 255, 255)
    assert turned.size == (61, 30)


def test_unreadable_images_are_set_aside_unasked(tmp_path, folder):
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (77, 30)).save(secret)
    (folder / "outside.png").symlink_to(secret)
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        assert describe(server, folder, output) == 0
        assert len(server.requests) == 4
        assert server.count(77) == 0
        assert describe(server, folder, output) == 0
        assert len(server.requests) == 4
    lines = read_lines(output)
    bad = ("page.jpg", "empty.png", "gone.png", "outside.png")
    assert [lines[name]["set_aside"] for name in bad] == ["unreadable"] * 4
    assert lines["page.jpg"]["attempts"] == 0
    assert str(tmp_path) not in lines["page.jpg"]["detail"]


# What is asked again


@pytest.mark.parametrize(
    "step",
    [
        fail(429),
        fail(500),
        fail(503, "overloaded"),
        fail(408),
        answer(delay=1.0),
        CUT_CONNECTION,
        HTML,
        BROKEN_JSON,
        NO_CHOICES,
        NULL_CONTENT,
        answer("  \n"),
        Step([1, 2]),
        Step({"choices": [{"message": {"content": "\ud83d"}}]}),
        answer(REFUSAL),
        answer(LOOP),
        answer("我先看看", refusal="I can't help with that."),
        answer("半句", finish_reason="content_filter"),
    ],
    ids=lambda step: f"{step.status} {str(step.body)[:50]}",
)
def test_faults_and_bad_answers_are_asked_again(tmp_path, step):
    timeout = "0.5" if step.delay else "5"
    code, line, server = describe_one(tmp_path, [step, answer()], "--timeout", timeout)
    assert code == 0
    assert line["description"] == CAPTION.format(width=40)
    assert line["attempts"] == 2 == len(server.requests)


def test_no_request_is_repeated_sooner_than_the_server_asks(tmp_path):
    code, line, server = describe_one(tmp_path, [fail(429, retry_after=0.7), answer()])
    assert (code, line["attempts"]) == (0, 2)
    assert server.requests[1][2] - server.requests[0][2] >= 0.7


# What is given up


@pytest.mark.parametrize(
    ("step", "reason", "requests", "tokens"),
    [
        (REFUSE, "refusal", 3, 3 * TOKENS),
        (REPEAT, "loop", 3, 3 * TOKENS),
        (answer(LOOP, finish_reason="length"), "loop", 3, 3 * TOKENS),
        (NULL_CONTENT, "empty", 3, 3 * TOKENS),
        (answer("哈" * 1_000_001), "loop", 3, 3 * TOKENS),
        (answer("半句话", finish_reason="length"), "cut", 1, TOKENS),
        (fail(400, "image too small"), "rejected", 1, 0),
        (fail(413), "rejected", 1, 0),
        (fail(422), "rejected", 1, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hopeless_images_are_set_aside_and_paid_answers_kept(tmp_path, step, reason, requests, tokens):
    code, line, server = describe_one(tmp_path, [step], "--attempts_on_refusal", "3")
    assert code == 2, "no image has a caption"
    assert "description" not in line
    assert line["set_aside"] == reason
    assert line["attempts"] == requests == len(server.requests)
    assert (line["prompt_tokens"] or 0) + (line["completion_tokens"] or 0) == tokens
    if tokens:
        assert line["answer"] == (step.body["choices"][0]["message"]["content"] or "")[: len(line["answer"]) or None]
    else:
        assert line["answer"] is None
        assert line["detail"].startswith(f"HTTP {step.status}: ")


def test_a_paid_refusal_is_kept_when_later_requests_fail(tmp_path):
    code, line, _ = describe_one(tmp_path, [REFUSE, fail(500)], "--attempts", "2")
    assert code == 2
    assert (line["set_aside"], line["answer"], line["attempts"]) == ("refusal", REFUSAL, 3)
    assert line["prompt_tokens"] == PROMPT_TOKENS


def test_unanswered_images_are_asked_again_by_the_next_run(tmp_path, folder, capsys):
    output = tmp_path / "captions.jsonl"
    with CaptionServer({41: [fail(500)]}) as server:
        assert describe(server, folder, output, "--attempts", "3") == 2
        assert server.count(41) == 3
        assert "without an answer: 1; start the same command again" in capsys.readouterr().err
        server.script[41] = [answer()]
        assert describe(server, folder, output) == 0
        assert len(server.requests) == 3 + 3 + 1
    assert read_lines(output)["41.png"]["description"]
    assert len(output.read_text().splitlines()) == 5


def test_other_images_set_aside_are_asked_again_only_when_told(tmp_path, folder):
    output = tmp_path / "captions.jsonl"
    with CaptionServer({41: [REFUSE], 42: [fail(400)]}) as server:
        assert describe(server, folder, output) == 0
        assert describe(server, folder, output) == 0
        assert len(server.requests) == 2 + 2 + 1
        server.script.clear()
        assert describe(server, folder, output, "--retry_set_aside") == 0
        assert len(server.requests) == 2 + 2 + 1 + 2
    assert all("description" in line for line in read_lines(output).values())


def test_statuses_add_up_whatever_happens(tmp_path, capsys):
    folder = make_images(tmp_path / "memes", range(40, 60))
    (folder / "bad.png").write_bytes(b"no")
    script = {
        41: [REFUSE],
        43: [REPEAT],
        45: [answer("半句", finish_reason="length")],
        47: [fail(400)],
        49: [fail(500)],
        51: [HTML],
        53: [NULL_CONTENT],
        55: [REFUSE, CUT_CONNECTION, answer()],
    }
    output = tmp_path / "captions.jsonl"
    with CaptionServer(script) as server:
        assert describe(server, folder, output) == 2
    lines = read_lines(output)
    assert len(lines) == 21 == len(output.read_text().splitlines())
    statuses = Counter(line.get("set_aside", "described") for line in lines.values())
    assert statuses == {
        **{"described": 13, "refusal": 1, "loop": 1, "cut": 1, "rejected": 1, "unanswered": 2, "empty": 1},
        "unreadable": 1,
    }
    table = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert {name: int(table[name]) for name in statuses} == statuses
    assert table["all"] == "21"
    assert lines["55.png"]["prompt_tokens"] == 2 * PROMPT_TOKENS


def test_without_a_caption_the_run_fails_and_no_server_writes_to_the_terminal(tmp_path, folder, capsys):
    output = tmp_path / "captions.jsonl"
    with CaptionServer(default=answer("看", refusal="no \x1b[2J")) as server:
        for _ in range(2):
            assert describe(server, folder, output) == 2
    shown = capsys.readouterr()
    assert "set aside 40.png: refusal (no \\x1b[2J)" in shown.err and "\x1b" not in shown.out + shown.err
    assert shown.err.splitlines()[-1].startswith(f"error: no image has a caption; {output} says of each why. Fix the")


# When the run stops


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (fail(401, "Incorrect API key"), "the key is not accepted"),
        (fail(402), "the account has no credit"),
        (fail(403), "not allowed"),
        (fail(404, "no model eyes"), "no such model or address"),
        (fail(429, "You exceeded your current quota", code="insufficient_quota"), "the account has no credit"),
        (fail(429, "daily limit", retry_after=7200), "asks to wait (Retry-After: 7200)"),
    ],
)
def test_what_no_image_can_pass_stops_the_run(tmp_path, folder, capsys, step, words):
    output = tmp_path / "captions.jsonl"
    with CaptionServer(default=step) as server:
        assert describe(server, folder, output, "--concurrency", "2") == 2
        assert len(server.requests) <= 2 * (5 if step.body["error"]["code"] else 1)
    assert output.read_text() == ""
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


@pytest.mark.parametrize("step", [fail(500), fail(400, "max_tokens is not supported"), REFUSE])
def test_ten_images_in_a_row_set_aside_stop_the_run(tmp_path, capsys, step):
    folder = make_images(tmp_path / "memes", range(40, 80))
    output = tmp_path / "captions.jsonl"
    with CaptionServer(default=step) as server:
        assert describe(server, folder, output, "--attempts", "2", "--concurrency", "3") == 2
    assert 10 <= len(read_lines(output)) <= 12
    assert "10 images in a row were set aside, the last as" in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_is_not_there_is_named(tmp_path, folder, capsys):
    with CaptionServer() as server:
        pass
    assert describe(server, folder, tmp_path / "captions.jsonl", "--attempts", "2") == 2
    assert "the connection failed" in capsys.readouterr().err


def test_a_signal_lets_answers_arrive_and_the_next_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(asking, "GRACE_SECONDS", 2.5)
    folder = make_images(tmp_path / "memes", range(40, 52))
    output = tmp_path / "captions.jsonl"
    with CaptionServer({42: [fail(500, retry_after=60)]}, default=answer(delay=0.2)) as server:
        server.on_request = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None
        assert describe(server, folder, output, "--concurrency", "4") == 130
        asked = len(server.requests)
        assert asked == 4, "nothing starts after the signal"
        lines = read_lines(output)
        assert len(lines) == 3, "answers on their way are kept, the image that waits is dropped"
        shown = capsys.readouterr()
        assert "the same command goes on with the 9 that are left" in shown.out
        server.on_request = None
        server.script.clear()
        assert describe(server, folder, output) == 0
        assert len(server.requests) == asked + 9
    assert len(read_lines(output)) == 12 == len(output.read_text().splitlines())


def test_a_signal_drops_answers_that_take_too_long(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(asking, "GRACE_SECONDS", 1.5)
    output = tmp_path / "captions.jsonl"
    slow = answer(delay=8)
    with CaptionServer({40: [slow]}) as server:
        server.on_request = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 3 else None
        start = time.monotonic()
        assert describe(server, folder, output, "--concurrency", "2") == 130
        assert time.monotonic() - start < 6
    assert set(read_lines(output)) == {"41.png", "42.png"}


# What it may cost


def test_max_images_means_the_first_images_in_all_runs_together(tmp_path, folder):
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        for _ in range(2):
            assert describe(server, folder, output, "--max_images", "2") == 0
            assert sorted(read_lines(output)) == ["40.png", "41.png"]
        assert len(server.requests) == 2


def test_token_budget_counts_refusals_and_earlier_runs(tmp_path, capsys):
    folder = make_images(tmp_path / "memes", range(40, 50))
    output = tmp_path / "captions.jsonl"
    with CaptionServer({40: [REFUSE]}) as server:
        flags = ("--concurrency", "1", "--max_tokens_total", str(4 * TOKENS))
        assert describe(server, folder, output, *flags) == 0
        assert len(server.requests) == 4, "two for the refusal, two captions"
        assert "440 tokens reach --max_tokens_total 440" in capsys.readouterr().out
        assert describe(server, folder, output, *flags) == 0
        assert len(server.requests) == 4, "a second run does not spend the budget again"
        assert describe(server, folder, output, "--max_tokens_total", "100000") == 0
    assert len(read_lines(output)) == 10


def test_a_budget_needs_a_server_that_counts(tmp_path, folder, capsys):
    output = tmp_path / "captions.jsonl"
    with CaptionServer(default=answer(usage=False)) as server:
        assert describe(server, folder, output, "--max_tokens_total", "1000", "--concurrency", "1") == 2
        assert len(read_lines(output)) == 1
        assert "does not say how many tokens" in capsys.readouterr().err
        assert describe(server, folder, output) == 0
    assert {line["prompt_tokens"] for line in read_lines(output).values()} == {None}


@pytest.mark.parametrize("limit", [1, 3])
def test_never_more_requests_at_once_than_allowed(tmp_path, limit):
    folder = make_images(tmp_path / "memes", range(40, 52))
    with CaptionServer({41: [fail(500), answer(delay=0.05)]}, default=answer(delay=0.05)) as server:
        assert describe(server, folder, tmp_path / "captions.jsonl", "--concurrency", str(limit)) == 0
    assert server.most_open == limit


# The captions file


def test_a_changed_image_is_asked_again(tmp_path, folder):
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        assert describe(server, folder, output) == 0
        Image.new("RGB", (49, 30)).save(folder / "42.png")
        assert describe(server, folder, output) == 0
        assert [width for width, _, _ in server.requests[4:]] == [49]
    assert "49号" in read_lines(output)["42.png"]["description"]


def test_other_settings_need_another_file(tmp_path, folder, capsys):
    output = tmp_path / "captions.jsonl"
    (tmp_path / "prompt.txt").write_text("写了什么？", encoding="utf-8")
    with CaptionServer() as server:
        assert describe(server, folder, output, "--max_images", "1") == 0
        before = output.read_bytes()
        for name, flags in {
            "model": ["--model", "other"],
            "prompt": ["--prompt_file", str(tmp_path / "prompt.txt")],
            "prompt ": ["--use_file_name"],
            "temperature": ["--temperature", "0.5"],
        }.items():
            assert describe(server, folder, output, *flags) == 2
            assert f"was made with {name.strip()} " in capsys.readouterr().err
        assert len(server.requests) == 1
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("my notes", "not a captions file"),
        ('{"picName": "a.png", "description": "别人的"}\n', "line 1 was not written by this script"),
        ("[]\n", "line 1 was not written by this script"),
        ("torn in the middle\n{}\n", "not a captions file (line 1 is not JSON"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path, folder, capsys, content, words):
    output = tmp_path / "captions.jsonl"
    output.write_text(content, encoding="utf-8")
    with CaptionServer() as server:
        assert describe(server, folder, output) == 2
        assert not server.requests
    assert words in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("kept", [1, 40, -30, -2])
def test_a_torn_last_line_is_cut_off_noted_and_bought_again(tmp_path, folder, capsys, kept):
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        assert describe(server, folder, output, "--concurrency", "1") == 0
        *lines, last = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(lines) + last[:kept])
        capsys.readouterr()
        assert describe(server, folder, output) == 0
        assert [width for width, _, _ in server.requests[4:]] == [43]
    assert "its last line was not finished; the image is asked about again" in capsys.readouterr().out
    assert sorted(read_lines(output)) == ["40.png", "41.png", "42.png", "43.png"]


def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path, folder):
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server:
        assert describe(server, folder, output) == 0
        before = output.read_bytes()
        output.write_bytes(before[:-1])
        assert describe(server, folder, output) == 0
        assert len(server.requests) == 4
    assert output.read_bytes() == before


def test_a_second_process_is_kept_off(tmp_path, folder, capsys):
    output = tmp_path / "captions.jsonl"
    with CaptionServer() as server, output.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert describe(server, folder, output) == 2
        assert not server.requests
    assert "is being written by another process" in capsys.readouterr().err


def test_a_full_disk_leaves_whole_lines_only(tmp_path, folder, capsys, monkeypatch):
    output = tmp_path / "captions.jsonl"

    def fill_disk(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CaptionServer() as server:
        assert describe(server, folder, output, "--max_images", "2") == 0
        before = output.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fill_disk)
            assert describe(server, folder, output, "--concurrency", "1") == 7
        assert "the disk is full" in capsys.readouterr().err
        assert output.read_bytes() == before
        assert describe(server, folder, output) == 0
    assert len(read_lines(output)) == 4


def test_a_killed_run_goes_on_without_paying_twice(tmp_path):
    """No image with a line is asked again; of the answers, at most one for each open request has no line."""
    concurrency = 3
    folder = make_images(tmp_path / "memes", range(40, 80))
    output = tmp_path / "captions.jsonl"
    with CaptionServer(default=answer(delay=0.05)) as server:
        command = [
            *(sys.executable, str(SCRIPT)),
            *make_flags(server, folder, output, "--concurrency", str(concurrency)),
        ]
        with (tmp_path / "log.txt").open("wb") as log:
            environment = {**os.environ, "OPENAI_LOG": "debug"}  # the client itself then says all it does
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        server.on_request = lambda count: process.kill() if count == 17 else None
        assert process.wait(timeout=120) == -signal.SIGKILL
        time.sleep(0.2)  # the server notices that its clients are gone
        whole = output.read_bytes().count(b"\n")
        named = {json.loads(line)["picName"] for line in output.read_bytes().splitlines(keepends=True)[:whole]}
        assert len(named) == whole >= 5
        assert 0 <= server.answered.total() - whole <= concurrency
        before = Counter(width for width, _, _ in server.requests)
        server.on_request = None
        assert describe(server, folder, output) == 0
        again = Counter(width for width, _, _ in server.requests) - before
    assert not {f"{width}.png" for width in again} & named
    assert set(again.values()) == {1}
    lines = output.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40 == len(read_lines(output))
    assert server.answered.total() - len(lines) <= concurrency
    log = (tmp_path / "log.txt").read_text()
    assert "api_key" in log or "HTTP" in log
    assert CANARY not in log


# Keys


def test_the_key_is_never_shown(tmp_path, folder, capfd):
    output = tmp_path / "captions.jsonl"
    echo = f"your key {CANARY} is no good"
    script = {
        40: [fail(500, echo), fail(400, echo)],
        41: [answer(f"图中写着“{CANARY}”。")],
        42: [Step(f"<html>{CANARY}</html>", content_type="text/html")],
        43: [answer(f"抱歉，我无法描述{CANARY}。")],
    }
    with CaptionServer(script) as server:
        assert describe(server, folder, output, "--attempts", "2") == 2
        assert any(header["authorization"] == f"Bearer {CANARY}" for header in server.headers)
        for status in (401, 404):
            server.default, server.script = fail(status, echo), {}
            assert describe(server, folder, tmp_path / f"{status}.jsonl") == 2
    shown = capfd.readouterr()
    files = "".join(path.read_text() for path in tmp_path.glob("*.jsonl*"))
    assert "your key [key] is no good" in shown.err
    assert "your key [key] is no good" in files
    assert CANARY not in shown.out + shown.err + files


def test_a_missing_key_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    output = tmp_path / "captions.jsonl"
    with pytest.raises(SystemExit):
        describe_script.main(["--images", str(tmp_path / "no"), "--output", str(output), "--preset", "gemini"])
    error = capsys.readouterr().err
    assert error == ("error: the environment variable GEMINI_API_KEY is not set; export GEMINI_API_KEY with your key\n")
    assert not output.exists()


def choose(environment, preset=None, base_url=None, model=None, key_variable=None):
    settings = SimpleNamespace(preset=preset, base_url=base_url, model=model, key_variable=key_variable)
    with mock.patch.dict(os.environ, environment, clear=True):
        return find_endpoint(settings)


def test_presets_and_overrides():
    environment = {preset.key_variable: f"key-of-{name}" for name, preset in PRESETS.items() if preset.key_variable}
    assert sorted(PRESETS) == ["claude", "gemini", "glm", "gpt-4o", "local", "yi-vision"]
    for name, preset in PRESETS.items():
        endpoint = choose(environment, name, model="eyes" if name == "local" else None)
        assert endpoint.base_url == preset.base_url
        assert endpoint.key == ("none" if name == "local" else f"key-of-{name}")
        assert endpoint.key == "none" or endpoint.key not in repr(endpoint)
    claude = choose(environment, "claude")
    assert (claude.host, claude.key_variable) == ("api.anthropic.com", "ANTHROPIC_API_KEY")
    changed = choose({"MY_KEY": " k \n"}, "gpt-4o", "https://proxy.example/v1", "gpt-9", "MY_KEY")
    assert (changed.host, changed.model, changed.key, changed.limit_name) == (
        *("proxy.example", "gpt-9", "k"),
        "max_completion_tokens",
    )
    assert choose({"ALL_PROXY": "socks://127.0.0.1:9"}, None, "http://127.0.0.1:9/v1", "m").key == "none"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, None, None), "give --preset"),
        (("local", None, None, None), "give --model"),
        ((None, "https://a.example/v1", "m", None), "give --key_variable"),
        ((None, "a.example/v1", "m", None), "not an address"),
        ((None, "http://[", "m", None), "not an address"),
        ((None, f"https://user:{CANARY}@a.example/v1", "m", "K"), "keys come from the environment only"),
        ((None, f"https://a.example/v1?key={CANARY}", "m", "K"), "keys come from the environment only"),
        ((None, "https://a.example/v1", "m", "K"), "variable K holds characters that no key has"),
        ((None, "https://a.example/v1", "m", "K", "socks://127.0.0.1:9"), "write socks5://127.0.0.1:9"),
    ],
)
def test_endpoints_that_cannot_be_meant(arguments, words):
    *settings, proxy = arguments if len(arguments) == 5 else (*arguments, "")
    with pytest.raises(UserError) as error:
        choose({"K": f"{CANARY} 钥匙", "ALL_PROXY": proxy}, *settings)
    assert words in str(error.value)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--max_tokens_total", "0"], "--max_tokens_total is 0"),
        (["--timeout", "0"], "--timeout is 0.0"),
        (["--images", "nowhere"], "no such folder"),
        (["--prompt_file", "nowhere"], "nowhere: No such file or directory. Is the path right?"),
        (["--api_key", "x"], "unknown setting --api_key"),
    ],
)
def test_wrong_settings_are_named(tmp_path, folder, capsys, flags, words):
    with CaptionServer() as server:
        assert describe(server, folder, tmp_path / "captions.jsonl", *flags) == 2
    assert words in capsys.readouterr().err


def test_names_that_are_not_utf8_are_named(tmp_path, folder, capsys):
    try:
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + "表情".encode("gbk") + b".png"))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with CaptionServer() as server:
        assert describe(server, folder, tmp_path / "captions.jsonl") == 2
    assert "1 file name is not UTF-8" in capsys.readouterr().err


# A real server


@pytest.mark.long
def test_a_real_server_gives_the_captions_of_infer(world, server, served_model, answerer, tmp_path, monkeypatch):
    """transformers serve, asked by describe.py, says what infer.py says about the same JPEG bytes."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not come between us and our own machine
    names = ["p0.png", "p7.png"]
    folder = tmp_path / "memes"
    folder.mkdir()
    for name in names:
        shutil.copy(world.image_folder / name, folder)
    output = tmp_path / "captions.jsonl"
    flags = ["--images", str(folder), "--output", str(output), "--preset", "local", "--base_url", server]
    # A model of two training steps never ends an answer by itself, so that no image has a caption.
    with pytest.raises(SystemExit):
        describe_script.main([*flags, "--model", str(served_model), "--max_new_tokens", str(NEW_TOKENS)])
    lines = read_lines(output)
    assert sorted(lines) == names
    answers = []
    for name in names:
        jpeg = tmp_path / "sent.jpg"
        jpeg.write_bytes(base64.b64decode(asking.encode_image(folder / name, 1024).partition(",")[2]))
        ours = answerer.answer(open_image(jpeg), DEFAULT_PROMPT, max_new_tokens=NEW_TOKENS)
        line = lines[name]
        answers.append(line["description"] if "description" in line else line["answer"])
        assert answers[-1] == ours.text
        assert line.get("set_aside") == (None if ours.stopped else "cut")
        assert line["completion_tokens"] == ours.tokens
        assert line["prompt_tokens"] > 0
    assert answers[0] != answers[1] and all(answers)
