"""The chat in the browser: infer.py's answers in several turns, a sentence for what cannot be done, and a clean end."""

import contextlib
import http.client
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from conftest import ROOT
from local_server import find_free_port, wait_until_listening
from PIL import Image

import demo
import infer
from meme_llava.cli import parse_arguments
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.inference import chat as chat_module
from meme_llava.inference.chat import (
    CUT_OFF,
    FAILED,
    IMAGE_PROBLEMS,
    OUT_OF_MEMORY,
    TOO_LONG,
    WAITING,
    Chat,
)
from meme_llava.inference.generation import load_answerer
from meme_llava.inference.settings import DEFAULT_QUESTION, DemoArguments

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


def is_answering() -> bool:
    return any(thread.name.startswith("answer") for thread in threading.enumerate())


def write_corrupt(folder: Path, world) -> Path:
    """A PNG that ends in its middle."""
    path = folder / "corrupt.png"
    path.write_bytes((world.image_folder / "p1.png").read_bytes()[:60])
    return path


# ---- Conversations ----


class Visitor:
    """A conversation as the page has it: messages come back as gradio gives them."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.history: list[dict] = []
        self.shown: list[str] = []  # the replies to the last question

    def ask(self, text: str, image: Path | None = None) -> Iterator[list[str]]:
        """The replies as they grow; they are history when the last one is there or the iterator is closed."""
        message = {"text": text, "files": [] if image is None else [str(image)]}
        try:
            with contextlib.closing(self.chat.reply(message, list(self.history))) as replies:
                for reply in replies:
                    self.shown = [one["content"] for one in reply]
                    yield self.shown
        finally:
            files = [{"type": "file", "file": {"path": path}} for path in message["files"]]
            self.history.append({"role": "user", "content": [*files, {"type": "text", "text": text}]})
            for text in self.shown:
                self.history.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    def hear(self, text: str, image: Path | None = None) -> list[str]:
        list(self.ask(text, image))
        return self.shown


def cut(texts: Iterable[str]) -> list[str]:
    """Answers as they are shown: a model of two training steps never ends one by itself."""
    return [f"{text}\n{CUT_OFF}" for text in texts]


def answer(model, path: Path, question: str, *earlier: tuple[str, str]) -> str:
    return model.answer(open_image(path), question, max_new_tokens=NEW_TOKENS, earlier=earlier).text


def test_every_model_gives_its_own_answer_in_every_turn(chat, answerer, base_answerer, world):
    path = world.image_folder / "p0.png"
    models = (answerer, base_answerer)
    visitor = Visitor(chat)
    firsts = [answer(model, path, QUESTION) for model in models]
    assert len(set(firsts)) == 2, "the models must differ, or this test shows nothing"
    assert visitor.hear(f" {QUESTION}\n", path) == cut(firsts)
    seconds = [
        answer(model, path, NEXT_QUESTION, (QUESTION, first)) for model, first in zip(models, firsts, strict=True)
    ]
    assert visitor.hear(NEXT_QUESTION) == cut(seconds)


def test_another_image_begins_anew_and_a_bad_one_changes_nothing(answerer, world, tmp_path):
    visitor = Visitor(Chat([answerer], None, NEW_TOKENS))
    first, other = (world.image_folder / name for name in ("p0.png", "p4.png"))
    (text,) = visitor.hear(QUESTION, first)
    assert visitor.hear(QUESTION, write_corrupt(tmp_path, world)) == [IMAGE_PROBLEMS["damaged_image"]]
    earlier = (QUESTION, text.removesuffix(f"\n{CUT_OFF}"))
    assert visitor.hear(NEXT_QUESTION) == cut([answer(answerer, first, NEXT_QUESTION, earlier)])
    # Without words, the question of infer.py is asked.
    assert visitor.hear("", other) == cut([answer(answerer, other, DEFAULT_QUESTION)])


def test_what_is_no_image_gets_a_sentence_in_two_languages_without_a_path(chat, world, tmp_path):
    (tmp_path / "text.png").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "old.tiff").write_bytes(b"II*\x00" + bytes(60))
    Image.new("1", (8_000, 8_000)).save(tmp_path / "huge.png")
    write_corrupt(tmp_path, world)
    names = ("text.png", "empty.jpg", "old.tiff", "huge.png", "corrupt.png", "gone.png")
    told = {name: Visitor(chat).hear(QUESTION, tmp_path / name)[0] for name in names}
    assert told["text.png"] == "这个文件不是图片。The file is not an image."
    assert told["corrupt.png"] == "图片已损坏或不完整，请换一张。The image is damaged; try another."
    assert told["huge.png"] == "图片太大，最多 50 百万像素。The image has more than 50 million pixels."
    assert len(set(told.values())) == 6
    assert not any(str(tmp_path) in text for text in told.values())


def test_what_cannot_be_asked_gets_a_sentence(chat, world):
    assert Visitor(chat).hear(QUESTION) == ["请先放一张图片。Add an image first."]
    (told,) = Visitor(chat).hear("看<image>", world.image_folder / "p0.png")
    assert told.startswith("问题里不能有 <image>")


def test_stopping_ends_the_answer_and_the_next_question_is_answered(answerer, base_answerer, world):
    path = world.image_folder / "p0.png"
    visitor = Visitor(Chat([answerer, base_answerer], None, LONG))
    growing = visitor.ask(QUESTION, path)
    while next(growing)[0] == WAITING:
        pass
    growing.close()
    first, second = visitor.shown
    # The model whose turn had not come does not begin.
    assert first and second == WAITING and not is_answering()
    visitor.chat = Chat([answerer, base_answerer], None, NEW_TOKENS)
    wanted = [answer(answerer, path, NEXT_QUESTION, (QUESTION, first)), answer(base_answerer, path, NEXT_QUESTION)]
    # An answer that never began is not a turn of the conversation.
    assert visitor.hear(NEXT_QUESTION) == cut(wanted)


def test_closing_ends_the_answer(answerer, world):
    chat = Chat([answerer], None, LONG)
    growing = Visitor(chat).ask(QUESTION, world.image_folder / "p0.png")
    next(growing)
    chat.close()
    *_, (text,) = growing
    assert len(answerer.processing.encoder.encode_text(text)) < LONG and not is_answering()


def test_a_conversation_without_room_says_so_and_the_others_go_on(chat, world):
    visitor = Visitor(chat)
    assert visitor.hear("困" * 5000, world.image_folder / "p0.png") == [TOO_LONG, TOO_LONG]
    assert all(text.endswith(CUT_OFF) for text in visitor.hear(QUESTION))


@pytest.mark.parametrize(
    ("error", "sentence"), [(chat_module.torch.OutOfMemoryError("CUDA"), OUT_OF_MEMORY), (RuntimeError("x"), FAILED)]
)
def test_what_goes_wrong_is_told_in_place_of_the_answer(chat, world, monkeypatch, error, sentence):
    def fail(*arguments):
        raise error
        yield

    monkeypatch.setattr(chat_module, "stream_answer", fail)
    assert Visitor(chat).hear(QUESTION, world.image_folder / "p0.png") == [sentence] * 2


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


def test_base_model_is_for_the_adapter_beside_a_merged_model(world, served_model, trained):
    flags = ["--model", str(served_model), "--compare_with", str(trained), "--base_model", str(world.base)]
    arguments = parse_arguments(DemoArguments, [*flags, "--device", "cpu"], "")
    assert len(demo.load_answerers(arguments, [served_model, trained])) == 2


# ---- The page ----


def load_page_module():
    pytest.importorskip("gradio", reason="needs the packages of configs/requirements/demo.txt")
    return importlib.import_module("meme_llava.inference.chat_page")


def test_the_page_reports_nothing_and_shows_texts_as_texts(chat, world):
    page_module = load_page_module()
    page = page_module.build_page(chat, ["one", "two"])
    assert len(page.examples) == page_module.EXAMPLES
    assert page.analytics_enabled is False and not page.chatbot.render_markdown
    assert 'content: "a\\"\\3c /style>"' in page_module.make_css(['a"</style>', "two"])
    text, image = "<b>&amp;\n\tone\n    two\n  three", str(world.image_folder / "p0.png")
    asked = [{"role": "user", "content": [{"path": image}, text]}, {"role": "assistant", "content": text}]
    sent = page.chatbot.postprocess(asked)
    shown = [part.text for message in sent.root for part in message.content if part.type == "text"]
    assert shown == [escape(text)] * 2
    came = page.chatbot.preprocess(sent)
    assert [message["content"][-1]["text"] for message in came] == [text] * 2
    assert came[0]["content"][0]["file"]["path"] == image


def test_ctrl_c_ends_the_server_and_a_taken_port_is_named(chat, tmp_path, monkeypatch):
    page_module = load_page_module()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    port = find_free_port()
    ended = []

    def serve() -> None:
        page = page_module.build_page(chat, ["one", "two"])
        page_module.serve_until_stopped(page, "", "127.0.0.1", port, on_stop=lambda: ended.append(True))

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UserError, match=f"--port {port}: cannot be listened"),
    ):
        serve()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    serve()
    interrupter.join()
    assert ended == [True, True]
    assert signal.getsignal(signal.SIGINT) is handler
    with socket.create_server(("127.0.0.1", port)):  # it is free again
        pass


@dataclass(frozen=True)
class RunningDemo:
    process: subprocess.Popen
    address: str
    log: Path
    temporary: Path


@pytest.fixture(scope="module")
def running(request, served_model, world, tmp_path_factory):
    """demo.py as a user starts it, with two models; a test may ask for longer answers."""
    pytest.importorskip("gradio", reason="needs the packages of configs/requirements/demo.txt")
    folder = tmp_path_factory.mktemp("demo")
    port = find_free_port()
    command = [sys.executable, str(ROOT / "demo.py"), "--model", str(served_model), "--compare_with", str(world.base)]
    command += ["--port", str(port), "--device", "cpu", "--max_new_tokens", str(getattr(request, "param", NEW_TOKENS))]
    (folder / "temporary").mkdir()
    # A proxy that the user set for the rest of the world must not stand between gradio and its own server.
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    environment |= {"ALL_PROXY": "socks://127.0.0.1:9", "all_proxy": "socks://127.0.0.1:9"}
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
        tab.locator("textarea").wait_for()
        return tab

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) > 10
    assert [url for url in requests if not url.startswith((running.address, "data:", "blob:"))] == []


def give_image(tab, path: Path) -> None:
    tab.locator("textarea:enabled").wait_for()
    tab.set_input_files("input[type=file]", path)
    tab.locator("#question img").wait_for()


def ask(tab, question: str) -> None:
    tab.locator("textarea:enabled").fill(question)
    tab.press("textarea", "Enter")


def read_columns(tab, answers: int) -> list[list[str]]:
    """What each model said, once there are so many answers and no more is coming."""
    replies = "#chat .bot.message > .message"
    tab.wait_for_function(
        "([replies, remark, count]) => "
        "[...document.querySelectorAll(replies)].filter(one => one.textContent.includes(remark)).length == count",
        arg=[replies, CUT_OFF, 2 * answers],
    )
    tab.locator("textarea:enabled").wait_for()
    texts = [text.replace(CUT_OFF, "").strip() for text in tab.locator(replies).all_inner_texts() if CUT_OFF in text]
    return [texts[0::2], texts[1::2]]


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
    tab.get_by_role("button", name="请读出图中的文字。").last.click()
    tab.wait_for_function("() => document.querySelector('textarea').value == '请读出图中的文字。'")
    ask(tab, QUESTION)
    firsts = [infer_answer(capsys, model, path) for model in (served_model, world.base)]
    assert read_columns(tab, 1) == [[first] for first in firsts]
    names = tab.locator("#chat .bot.message > .message").evaluate_all(
        "all => all.map(one => getComputedStyle(one, '::before').content)"
    )
    assert names[-2:] == [f'"{served_model}"', f'"{world.base}"']

    (tmp_path / "notes.txt").write_text("no image")
    tab.set_input_files("input[type=file]", tmp_path / "notes.txt")
    tab.get_by_text("Invalid file type: notes.txt").wait_for()
    give_image(tab, write_corrupt(tmp_path, world))
    ask(tab, QUESTION)
    tab.get_by_text("图片已损坏或不完整").wait_for()

    # The page goes on with the image that it had.
    ask(tab, NEXT_QUESTION)
    seconds = [
        answer(model, path, NEXT_QUESTION, (QUESTION, first))
        for model, first in zip((answerer, base_answerer), firsts, strict=True)
    ]
    wanted = [list(texts) for texts in zip(firsts, seconds, strict=True)]
    assert read_columns(tab, 2) == wanted
    tab.get_by_label("重试").last.click()
    tab.wait_for_function("() => document.querySelector('textarea').disabled")
    assert read_columns(tab, 2) == wanted

    tab.get_by_label("清空对话").click()
    tab.wait_for_function("() => !document.querySelector('#chat .bot.message')")
    tab.locator("#chat button.example").first.click()
    assert [len(column) for column in read_columns(tab, 1)] == [1, 1]


def test_html_is_shown_as_text_and_loads_nothing(open_tab, world, answerer, base_answerer):
    path = world.image_folder / "p0.png"
    question = '<img src="http://127.0.0.1:9/x.png" onerror="document.title=1"><b>好</b>\n  &amp;\t困'
    tab = open_tab()
    give_image(tab, path)
    ask(tab, question)
    assert read_columns(tab, 1) == [[answer(model, path, question)] for model in (answerer, base_answerer)]
    assert question in tab.locator("#chat .user.message").all_inner_texts()[-1]
    assert tab.locator("#chat b").count() == 0
    tab.get_by_label("撤销").click()
    tab.wait_for_function("text => document.querySelector('textarea').value == text", arg=question)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:80", 200), ("evil.example", 400), ("localhost.evil.example", 400)],
)
def test_only_this_machines_own_names_are_answered(running, host, status):
    connection = http.client.HTTPConnection(running.address.removeprefix("http://").rstrip("/"))
    with contextlib.closing(connection):
        connection.request("GET", "/config", headers={"Host": host})
        assert connection.getresponse().status == status


@pytest.mark.long
def test_two_visitors_at_once_get_their_own_answers(open_tab, world, answerer, base_answerer):
    paths = [world.image_folder / name for name in ("p0.png", "p7.png")]
    tabs = [open_tab(), open_tab()]
    for tab, path in zip(tabs, paths, strict=True):
        give_image(tab, path)
    for tab in tabs:
        ask(tab, QUESTION)
    wanted = [[[answer(model, path, QUESTION)] for model in (answerer, base_answerer)] for path in paths]
    assert wanted[0] != wanted[1]
    assert [read_columns(tab, 1) for tab in tabs] == wanted


@pytest.mark.long
def test_images_may_be_pasted_or_dropped_and_a_telephone_has_room(open_tab, world):
    give = """([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "meme.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind == "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: transfer })
            : new DragEvent(kind, { ...options, dataTransfer: transfer });
        document.querySelector("textarea").dispatchEvent(event);
    }"""
    for kind, name in (("paste", "p2.png"), ("drop", "p5.png")):
        tab = open_tab(width=390)
        tab.evaluate(give, [kind, list((world.image_folder / name).read_bytes())])
        tab.locator("#question img").wait_for()
        ask(tab, QUESTION)
        read_columns(tab, 1)
        # Nothing is wider than the screen, and the second model stands below the first.
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        first, second = (tab.locator("#chat .bot.message > .message").nth(place).bounding_box() for place in (0, 1))
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
    tab.get_by_text("exceed the maximum allowed size of 64").wait_for()
    assert tab.locator("#question img").count() == 0


@pytest.mark.long
@pytest.mark.parametrize("running", [300], indirect=True)  # an answer that lasts until the button is found
def test_stop_ends_an_answer_in_the_page(open_tab, running, world):
    tab = open_tab()
    give_image(tab, world.image_folder / "p0.png")
    ask(tab, QUESTION)
    tab.locator("#question button.stop-button").click()
    tab.locator("textarea:enabled").wait_for()
    ask(tab, QUESTION)
    tab.wait_for_function(
        "remark => document.querySelector('#chat').textContent.endsWith(remark) || "
        "[...document.querySelectorAll('#chat .bot.message')].at(-1)?.textContent.includes(remark)",
        arg=CUT_OFF,
    )


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
