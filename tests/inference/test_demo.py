"""The chat in the browser: infer.py's answers in several turns, a sentence for what cannot be done, and a clean end."""

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from conftest import ROOT, find_free_port, wait_until_listening
from PIL import Image

import demo
import infer
from meme_llava.cli import parse_arguments
from meme_llava.dataset.images import open_image
from meme_llava.inference import chat as chat_module
from meme_llava.inference.chat import CUT_OFF, STOPPED, TOO_LONG, Chat, ChatProblem, Conversation
from meme_llava.inference.generation import load_answerer
from meme_llava.inference.settings import DemoArguments

NEW_TOKENS = 12  # a model of two training steps never stops by itself
LONG = 3000
QUESTION = "图里写了什么？"
NEXT_QUESTION = "什么意思？"
WAIT = 30_000  # milliseconds that a browser waits for a page


@pytest.fixture(scope="module")
def base_answerer(world):
    return load_answerer(world.base, device="cpu", dtype="float32")


@pytest.fixture
def chat(answerer, base_answerer):
    return Chat([answerer, base_answerer], None, NEW_TOKENS)


def begin(chat: Chat, path: Path) -> Conversation:
    conversation = Conversation()
    chat.take_image(conversation, path)
    return conversation


def write_corrupt(folder: Path, world) -> Path:
    """A PNG that ends in its middle."""
    path = folder / "corrupt.png"
    path.write_bytes((world.image_folder / "p1.png").read_bytes()[:60])
    return path


# ---- Conversations ----


def test_every_model_gives_its_own_answer_in_every_turn(chat, answerer, base_answerer, world):
    path = world.image_folder / "p0.png"
    image = open_image(path)
    conversation = begin(chat, path)
    for question in (QUESTION, NEXT_QUESTION):
        list(chat.ask(conversation, f" {question}\n"))
    first_texts = set()
    for model, column in zip((answerer, base_answerer), conversation.columns, strict=True):
        first = model.answer(image, QUESTION, max_new_tokens=NEW_TOKENS)
        earlier = [(QUESTION, first.text)]
        second = model.answer(image, NEXT_QUESTION, max_new_tokens=NEW_TOKENS, earlier=earlier)
        assert [(reply.question, reply.text) for reply in column] == [
            (QUESTION, first.text),
            (NEXT_QUESTION, second.text),
        ]
        assert {reply.remark for reply in column} == {CUT_OFF}
        first_texts.add(first.text)
    assert len(first_texts) == 2, "the models must differ, or this test shows nothing"


def test_another_image_begins_anew_and_a_bad_one_changes_nothing(chat, world, tmp_path):
    conversation = begin(chat, world.image_folder / "p0.png")
    list(chat.ask(conversation, QUESTION))
    with pytest.raises(ChatProblem):
        chat.take_image(conversation, write_corrupt(tmp_path, world))
    assert conversation.image == world.image_folder / "p0.png" and len(conversation.columns[0]) == 1
    chat.take_image(conversation, world.image_folder / "p4.png")
    assert conversation.image == world.image_folder / "p4.png" and conversation.columns == []


def test_what_is_no_image_gets_a_sentence_in_two_languages_without_a_path(chat, world, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "old.tiff").write_bytes(b"II*\x00" + bytes(60))
    Image.new("1", (8_000, 8_000)).save(tmp_path / "huge.png")
    write_corrupt(tmp_path, world)
    told = {}
    for name in ("text.png", "empty.jpg", "old.tiff", "huge.png", "corrupt.png", "gone.png"):
        with pytest.raises(ChatProblem) as caught:
            chat.take_image(Conversation(), tmp_path / name)
        told[name] = str(caught.value)
    assert told["text.png"] == "这个文件不是图片。The file is not an image."
    assert told["corrupt.png"] == "图片已损坏或不完整，请换一张。The image is damaged; try another."
    assert told["huge.png"] == "图片太大，最多 50 百万像素。The image has more than 50 million pixels."
    assert len(set(told.values())) == 6
    assert not any(str(tmp_path) in text for text in told.values())


@pytest.mark.parametrize(
    ("image", "question", "words"),
    [
        (None, QUESTION, "请先放一张图片"),
        ("p0.png", " \n", "请先写一个问题"),
        ("p0.png", "看<image>", "不能有 <image>"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(chat, world, image, question, words):
    conversation = Conversation() if image is None else begin(chat, world.image_folder / image)
    with pytest.raises(ChatProblem, match=words):
        list(chat.ask(conversation, question))
    assert conversation.columns == []


def test_stopping_ends_the_answer_and_the_next_question_is_answered(answerer, base_answerer, world):
    chat = Chat([answerer, base_answerer], None, LONG)
    conversation = begin(chat, world.image_folder / "p0.png")
    growing = chat.ask(conversation, QUESTION)
    next(growing)
    while not conversation.columns[0][0].text:
        next(growing)
    conversation.stop_asked = True
    list(growing)
    first, second = (column[0] for column in conversation.columns)
    assert first.text and first.remark == STOPPED
    assert len(answerer.processing.encoder.encode_text(first.text)) < LONG
    # The model whose turn had not come does not begin.
    assert second.text == "" and second.remark == STOPPED
    chat._max_new_tokens = NEW_TOKENS
    list(chat.ask(conversation, NEXT_QUESTION))
    earlier = [(QUESTION, first.text)]
    image = open_image(world.image_folder / "p0.png")
    wanted = answerer.answer(image, NEXT_QUESTION, max_new_tokens=NEW_TOKENS, earlier=earlier)
    assert conversation.columns[0][1].text == wanted.text
    # An answer that never began is not a turn of the conversation.
    wanted = base_answerer.answer(image, NEXT_QUESTION, max_new_tokens=NEW_TOKENS)
    assert conversation.columns[1][1].text == wanted.text


def test_closing_ends_the_answer(answerer, world):
    chat = Chat([answerer], None, LONG)
    conversation = begin(chat, world.image_folder / "p0.png")
    growing = chat.ask(conversation, QUESTION)
    next(growing)
    chat.close()
    list(growing)
    assert conversation.columns[0][0].remark == STOPPED


def test_a_conversation_without_room_says_so_and_the_others_go_on(chat, world):
    conversation = begin(chat, world.image_folder / "p0.png")
    list(chat.ask(conversation, "困" * 5000))
    assert [column[0].remark for column in conversation.columns] == [TOO_LONG, TOO_LONG]
    list(chat.ask(conversation, QUESTION))
    assert conversation.columns[0][1].text


def test_too_little_memory_is_told_in_the_column(chat, world, monkeypatch):
    conversation = begin(chat, world.image_folder / "p0.png")

    def fail(*arguments):
        raise chat_module.torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(chat_module, "stream_answer", fail)
    list(chat.ask(conversation, QUESTION))
    assert conversation.columns[0][0].remark.startswith("内存或显存不足")


# ---- The script ----


def fail_demo(capsys, *flags, code=2) -> str:
    with pytest.raises(SystemExit) as stop:
        demo.main([str(flag) for flag in flags])
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize("found", ["none", "3.36.1"])
def test_without_a_gradio_of_today_it_says_what_to_install(found, monkeypatch, capsys):
    def find_version(package: str) -> str:
        assert package == "gradio"
        if found == "none":
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(demo, "version", find_version)
    error = fail_demo(capsys, "--model", "output/merged")
    assert error.startswith(f"error: demo.py needs gradio 6, found {found}: pip install") and error.count("\n") == 1
    (named,) = re.findall(r"-r (configs/\S+)", error)
    assert "gradio>=6" in (ROOT / named).read_text()


def test_wrong_settings_stop_with_a_sentence(world, served_model, capsys):
    pytest.importorskip("gradio", reason="needs the packages of configs/requirements/demo.txt")
    assert "--port is 70000" in fail_demo(capsys, "--model", served_model, "--port", 70000)
    assert "--max_new_tokens is 0" in fail_demo(capsys, "--model", served_model, "--max_new_tokens", 0)
    assert "no such model folder" in fail_demo(capsys, "--model", "gone")
    assert "--base_model has no use" in fail_demo(capsys, "--model", served_model, "--base_model", world.base)


def test_a_taken_port_is_named(served_model):
    page = load_page_module()
    port = find_free_port()
    with page.socket.create_server(("127.0.0.1", port)):
        with pytest.raises(page.UserError, match=f"--port {port}: cannot be listened on"):
            page.check_address("127.0.0.1", port)
    page.check_address("127.0.0.1", port)


def test_base_model_is_for_the_adapter_beside_a_merged_model(world, served_model, trained):
    flags = ["--model", str(served_model), "--compare_with", str(trained), "--base_model", str(world.base)]
    arguments = parse_arguments(DemoArguments, [*flags, "--device", "cpu"], "")
    assert len(demo.load_answerers(arguments, [served_model, trained])) == 2


# ---- The page ----


def load_page_module():
    pytest.importorskip("gradio", reason="needs the packages of configs/requirements/demo.txt")
    return importlib.import_module("meme_llava.inference.chat_page")


def test_the_page_reports_nothing_and_shows_texts_as_texts(chat):
    page_module = load_page_module()
    assert len(page_module.list_examples()) == page_module.EXAMPLES
    page = page_module.build_page(chat, ["one", "two"], page_module.list_examples())
    assert page.analytics_enabled is False
    columns = [block for block in page.blocks.values() if block.get_block_name() == "chatbot"]
    assert [column.label for column in columns] == ["one", "two"]
    assert not any(column.render_markdown for column in columns)
    assert page_module.show_notice("<b>") == '<div class="notice" role="alert">&lt;b&gt;</div>'


def test_ctrl_c_ends_the_server(chat, tmp_path, monkeypatch):
    page_module = load_page_module()
    for name, value in (("GRADIO_TEMP_DIR", str(tmp_path)), ("NO_PROXY", ""), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    port = find_free_port()
    ended = []

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    page = page_module.build_page(chat, ["one", "two"], [])
    page_module.serve_until_stopped(page, "127.0.0.1", port, on_stop=lambda: ended.append(True))
    interrupter.join()
    assert ended == [True]
    assert signal.getsignal(signal.SIGINT) is handler
    page_module.check_address("127.0.0.1", port)  # it is free again


@dataclass(frozen=True)
class RunningDemo:
    process: subprocess.Popen
    address: str
    log: Path
    temporary: Path


@pytest.fixture(scope="module")
def running(served_model, world, tmp_path_factory):
    """demo.py as a user starts it, with two models."""
    pytest.importorskip("gradio", reason="needs the packages of configs/requirements/demo.txt")
    folder = tmp_path_factory.mktemp("demo")
    port = find_free_port()
    command = [sys.executable, str(ROOT / "demo.py"), "--model", str(served_model), "--compare_with", str(world.base)]
    command += ["--port", str(port), "--device", "cpu", "--max_new_tokens", str(NEW_TOKENS)]
    (folder / "temporary").mkdir()
    # A proxy that the user set for the rest of the world must not stand between gradio and its own server.
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    for name in ("NO_PROXY", "no_proxy"):
        environment.pop(name, None)
    with (folder / "log.txt").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        wait_until_listening(process, port, folder / "log.txt")
        yield RunningDemo(process, f"http://127.0.0.1:{port}/", folder / "log.txt", folder / "temporary")
    finally:
        process.kill()
        process.wait(timeout=10)


@pytest.fixture
def open_tab(browser, running):
    """Open the page in a browser of its own; at the end nothing may have gone wrong, nor been asked for elsewhere."""
    contexts, complaints, requests = [], [], []

    def open_it(width: int = 1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, locale="zh-CN"))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(running.address)
        tab.locator("#question textarea").wait_for()
        return tab

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) > 10
    assert [url for url in requests if not url.startswith((running.address, "data:", "blob:"))] == []


@contextlib.contextmanager
def another_image(tab) -> Iterator[None]:
    """Wait, at the end of the block, until the page shows another image than before."""
    before = tab.evaluate("document.querySelector('#image img')?.src")
    yield
    tab.wait_for_function(
        "before => ![undefined, before].includes(document.querySelector('#image img')?.src)", arg=before
    )


def give_image(tab, path: Path) -> None:
    with another_image(tab):
        tab.set_input_files("input[type=file]", path)


def ask(tab, question: str) -> None:
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")


def read_columns(tab, answers: int) -> list[list[str]]:
    """What each model said, once there are so many answers and no more is coming."""
    remark = f"（{CUT_OFF}）"
    tab.wait_for_function(
        "([number, remark]) => [0, 1].every(column => [...document.querySelectorAll(`#answers_${column} .bot.message`)]"
        ".filter(message => message.textContent.includes(remark)).length == number)",
        arg=[answers, remark],
    )
    return [
        [text.replace(remark, "").strip() for text in tab.locator(f"#answers_{column} .bot.message").all_inner_texts()]
        for column in (0, 1)
    ]


def infer_answer(capsys, model: Path, image: Path) -> str:
    capsys.readouterr()
    flags = ["--model", model, "--image", image, "--question", QUESTION, "--max_new_tokens", NEW_TOKENS]
    infer.main([str(flag) for flag in [*flags, "--device", "cpu"]])
    return capsys.readouterr().out.strip()


def test_a_visitor_asks_both_models_in_several_turns(
    open_tab, world, served_model, answerer, base_answerer, tmp_path, capsys
):
    path = world.image_folder / "p0.png"
    tab = open_tab()
    ask(tab, QUESTION)
    tab.get_by_text("请先放一张图片").wait_for()
    give_image(tab, path)
    ask(tab, QUESTION)
    firsts = [infer_answer(capsys, model, path) for model in (served_model, world.base)]
    assert read_columns(tab, 1) == [[first] for first in firsts]

    tab.set_input_files("input[type=file]", write_corrupt(tmp_path, world))
    tab.get_by_text("图片已损坏或不完整").wait_for()
    (tmp_path / "notes.txt").write_text("no image")
    tab.set_input_files("input[type=file]", tmp_path / "notes.txt")
    tab.get_by_text("这个文件不是图片").wait_for()

    # The page goes on with the image that it had.
    ask(tab, NEXT_QUESTION)
    image = open_image(path)
    seconds = [
        model.answer(image, NEXT_QUESTION, max_new_tokens=NEW_TOKENS, earlier=[(QUESTION, first)]).text
        for model, first in zip((answerer, base_answerer), firsts, strict=True)
    ]
    assert read_columns(tab, 2) == [list(texts) for texts in zip(firsts, seconds, strict=True)]
    assert not tab.get_by_text("这个文件不是图片").is_visible()

    tab.get_by_role("button", name="新对话").click()
    tab.wait_for_function("() => !document.querySelector('#answers_0 .message')")
    tab.get_by_role("button", name="请读出图中的文字。").click()
    assert [len(column) for column in read_columns(tab, 1)] == [1, 1]


@pytest.mark.long
def test_two_visitors_at_once_get_their_own_answers(open_tab, world, answerer, base_answerer):
    paths = [world.image_folder / name for name in ("p0.png", "p7.png")]
    tabs = [open_tab(), open_tab()]
    for tab, path in zip(tabs, paths, strict=True):
        give_image(tab, path)
    for tab in tabs:
        ask(tab, QUESTION)
    wanted = [
        [
            [model.answer(open_image(path), QUESTION, max_new_tokens=NEW_TOKENS).text]
            for model in (answerer, base_answerer)
        ]
        for path in paths
    ]
    assert wanted[0] != wanted[1]
    assert [read_columns(tab, 1) for tab in tabs] == wanted


@pytest.mark.long
def test_images_may_be_pasted_dropped_or_chosen_from_the_examples(open_tab, world):
    tab = open_tab(width=390)
    give = """([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "meme.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind == "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: transfer })
            : new DragEvent(kind, { ...options, dataTransfer: transfer });
        document.querySelector("#question textarea").dispatchEvent(event);
    }"""
    for kind, name in (("paste", "p2.png"), ("drop", "p5.png")):
        with another_image(tab):
            tab.evaluate(give, [kind, list((world.image_folder / name).read_bytes())])
    with another_image(tab):
        tab.locator("#examples button").nth(1).click()
    # On a telephone nothing is wider than the screen, and the second model stands below the first.
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (tab.locator(f"#answers_{column}").bounding_box() for column in (0, 1))
    assert second["y"] >= first["y"] + first["height"] and second["x"] == first["x"]


@pytest.mark.long
def test_a_file_that_is_too_big_is_not_sent(open_tab):
    tab = open_tab()
    # Made in the page, since playwright hands over 50 MB at most.
    tab.evaluate(
        """() => {
        const input = document.querySelector("input[type=file]");
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(64 * 1024 * 1024 + 1)], "big.png", { type: "image/png" }));
        input.files = transfer.files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
    }"""
    )
    tab.get_by_text("文件超过 64 MB").wait_for()
    assert tab.locator("#image img").count() == 0


def test_sigterm_ends_it_cleanly_and_no_upload_stays(open_tab, running, world):
    tab = open_tab()
    given = (world.image_folder / "p0.png").read_bytes()
    give_image(tab, world.image_folder / "p0.png")
    assert given in [path.read_bytes() for path in list_files(running.temporary)]
    running.process.terminate()
    assert running.process.wait(timeout=20) == 0
    # Nothing stays, neither there nor where it was started.
    assert list_files(running.temporary.parent) == [running.log]
    assert running.log.read_text() == f"chat page: {running.address.rstrip('/')}  (Ctrl-C ends it)\nstopped\n"


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
