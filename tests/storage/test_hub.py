"""Where models come from: a folder, a hub that a small server on this machine stands in for, or ModelScope."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

from meme_llava.errors import UserError
from meme_llava.storage.folders import resolve_model_folder

REPOSITORY = ROOT
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the hub holds. Chinese-CLIP is published as pytorch_model.bin only, Qwen2 as safetensors only, CLIP as both.
MODELS = {
    "OFA-Sys/bin-only": {
        "config.json": b'{"model_type": "chinese_clip"}',
        "vocab.txt": "图\n".encode(),
        "pytorch_model.bin": b"pickled weights",
        "README.md": b"# long text",
        "onnx/model.onnx": b"another format",
        "onnx/config.json": b"{}",
    },
    "openai/both": {
        "config.json": b'{"model_type": "clip"}',
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"the same weights, pickled",
        "tf_model.h5": b"the same weights again",
    },
    "Qwen/sharded": {
        "config.json": b'{"model_type": "qwen2"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"pieces",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
    },
}
# Resolves every name it is given in turn; runs in a process of its own, since huggingface_hub reads its environment
# variables when it is imported.
PROGRAM = """
import json, sys
from meme_llava.errors import UserError
from meme_llava.storage.folders import resolve_model_folder
results = {}
for name in sys.argv[1:]:
    try:
        folder = resolve_model_folder(name)
        files = [path for path in folder.rglob("*") if path.is_file()]
        results[name] = {str(path.relative_to(folder)): path.read_text() for path in files}
    except UserError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    """The four requests of huggingface_hub's snapshot_download: revision, file tree, a file's head and its bytes."""

    def do_GET(self):  # noqa: N802
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if "Qwen/dropped" in path:
            # A line that breaks, as long downloads meet it.
            return self.connection.shutdown(socket.SHUT_RDWR)
        if "Qwen/portal" in path:
            # A hotel's or company's network that answers every request with its log-in page.
            return self.answer(200, b"<html>Please log in.</html>", {"Content-Type": "text/html"})
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/(revision/main|tree/\w+)", path):
            if match[1] not in MODELS:
                return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            if match[2] == "revision/main":
                return self.answer_json({"id": match[1], "sha": COMMIT, "siblings": []})
            files = MODELS[match[1]].items()
            return self.answer_json(
                [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
            )
        if match := re.fullmatch(rf"/([\w-]+/[\w-]+)/resolve/{COMMIT}/(.+)", path):
            content = MODELS[match[1]][match[2]]
            return self.answer(
                200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            )
        return self.answer(404, b"{}", {})

    do_HEAD = do_GET  # noqa: N815

    def do_CONNECT(self):  # noqa: N802
        # What a company's proxy says to a host it does not let through.
        self.answer(403, b"", {})

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def resolve(names: list[str], home: Path, endpoint: str, **environment: str) -> dict:
    """Resolve names in a new process: the files of each, or the message that came instead."""
    inherited = {name: value for name, value in os.environ.items() if not re.match(r"(?i)hf_|.*proxy|hugging", name)}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=REPOSITORY,
        env={
            **inherited,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def endpoint(hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


@pytest.fixture(scope="module")
def unreachable() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def downloaded(endpoint, home) -> dict:
    """What a first run with a connection finds."""
    return resolve([*MODELS, "Qwen/mis-spelt"], home, endpoint)


# ---- Folders ----


def test_a_folder_is_used_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model_folder(str(tmp_path / "org" / "model")) == tmp_path / "org" / "model"
    # A folder that looks like a hub id is the folder.
    monkeypatch.chdir(tmp_path)
    assert resolve_model_folder("org/model") == Path("org/model")
    assert resolve_model_folder("org") == Path("org")


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./org/model",
        "../org/model",
        "~/model",
        "models/org/model",
        "model",
        "a file/weights",
    ],
)
def test_a_misspelt_folder_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "a file/weights":
        (tmp_path / "a file").mkdir()
        (tmp_path / name).write_bytes(b"")
    # Nothing is looked up: a hub that was asked would answer for half a minute, and with another message.
    with pytest.raises(UserError) as caught:
        resolve_model_folder(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert "modelscope:qwen/Qwen2-7B-Instruct" in str(caught.value)


# ---- The hub ----


def test_a_model_with_only_a_pickle_is_downloaded_with_it(downloaded):
    assert downloaded["OFA-Sys/bin-only"] == {
        "config.json": '{"model_type": "chinese_clip"}',
        "vocab.txt": "图\n",
        "pytorch_model.bin": "pickled weights",
    }


def test_of_a_model_with_both_forms_the_pickle_is_left_where_it_is(downloaded, hub):
    assert downloaded["openai/both"] == {"config.json": '{"model_type": "clip"}', "model.safetensors": "weights"}
    fetched = {request.rpartition("/")[2] for request in hub.requests if "openai/both/resolve" in request}
    assert fetched == {"config.json", "model.safetensors"}


def test_a_model_in_several_files_is_downloaded_with_all_that_reading_it_needs(downloaded):
    assert set(downloaded["Qwen/sharded"]) == set(MODELS["Qwen/sharded"])


def test_a_model_the_hub_does_not_know_is_named_with_the_hub(downloaded, endpoint):
    message = downloaded["Qwen/mis-spelt"]
    assert message.startswith(f"Qwen/mis-spelt: is not a local folder, and downloading it from {endpoint} failed: ")
    assert "404" in message
    assert "modelscope:Qwen/mis-spelt" in message and "HF_ENDPOINT" in message


def test_without_a_connection_the_cache_serves_what_was_downloaded(downloaded, home, endpoint, hub):
    before = len(hub.requests)
    offline = resolve([*MODELS, "Qwen/never-seen"], home, endpoint, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    assert {name: offline[name] for name in MODELS} == {name: downloaded[name] for name in MODELS}
    assert offline["Qwen/never-seen"].startswith("Qwen/never-seen: is not a local folder, HF_HUB_OFFLINE is set, and")


def test_an_unreachable_hub_is_named_and_the_cache_still_serves(downloaded, home, unreachable):
    found = resolve(["openai/both", "Qwen/never-seen"], home, unreachable)
    assert found["openai/both"] == downloaded["openai/both"]
    message = found["Qwen/never-seen"]
    assert message.startswith(f"Qwen/never-seen: is not a local folder, and downloading it from {unreachable} failed: ")
    assert "ConnectError" in message
    assert "set HF_ENDPOINT to a mirror" in message


def test_a_proxy_that_refuses_is_a_message_and_no_traceback(tmp_path, endpoint):
    found = resolve(["Qwen/sharded"], tmp_path, "https://hub.invalid", HTTPS_PROXY=endpoint)
    assert found["Qwen/sharded"].startswith(
        "Qwen/sharded: is not a local folder, and downloading it from https://hub.invalid failed: "
    )


@pytest.mark.parametrize("name", ["Qwen/dropped", "Qwen/portal"])
def test_a_hub_that_breaks_off_or_talks_of_something_else_is_a_message_and_no_traceback(tmp_path, endpoint, name):
    message = resolve([name], tmp_path, endpoint)[name]
    assert message.startswith(f"{name}: is not a local folder, and downloading it from {endpoint} failed: ")


def test_a_name_that_no_hub_could_hold_is_a_message(tmp_path, endpoint, hub):
    before = len(hub.requests)
    for name, message in resolve(["Qwen/two words", "Qwen/a--b", "Qwen/"], tmp_path, endpoint).items():
        assert message.startswith(f"{name}: is not a local folder, and downloading it from")
    assert len(hub.requests) == before


# ---- ModelScope ----


def test_a_missing_modelscope_package_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it was not installed
    with pytest.raises(UserError, match="^modelscope:qwen/Qwen2 needs the modelscope package: pip install modelscope$"):
        resolve_model_folder("modelscope:qwen/Qwen2")


FAKE_MODELSCOPE = """
from pathlib import Path

def snapshot_download(model_id):
    if model_id == "qwen/unknown":
        raise RuntimeError("The request model: qwen/unknown does not exist!")
    folder = Path(__file__).parent / "cache" / model_id
    folder.mkdir(parents=True)
    return str(folder)
"""


@pytest.fixture
def modelscope(tmp_path, monkeypatch) -> Path:
    """A package in place of the real one; returns where it keeps its downloads."""
    (tmp_path / "modelscope.py").write_text(FAKE_MODELSCOPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    yield tmp_path / "cache"
    sys.modules.pop("modelscope", None)


def test_modelscope_gets_the_id_without_the_prefix(modelscope):
    assert resolve_model_folder("modelscope:qwen/Qwen2-7B-Instruct") == modelscope / "qwen" / "Qwen2-7B-Instruct"
    assert (modelscope / "qwen" / "Qwen2-7B-Instruct").is_dir()


def test_what_modelscope_reports_reaches_the_user(modelscope):
    with pytest.raises(
        UserError, match="^modelscope:qwen/unknown: downloading it from ModelScope failed: .*not exist!$"
    ):
        resolve_model_folder("modelscope:qwen/unknown")
