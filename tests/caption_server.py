"""A stand-in for an OpenAI-compatible vision endpoint on 127.0.0.1 that misbehaves image by image, as told.

An image is known by its width: `script[width]` lists what its requests get, one after the other; the last one stays,
and images without a script are described. It records what every request got and how many were open at once.
"""

import base64
import io
import json
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

CAPTION = "图中写着“{width}号鸭”，一只鸭子很开心。"
REFUSAL = "抱歉，我无法描述这张图片。"
LOOP = "哈哈哈哈" * 60
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 10


@dataclass(frozen=True)
class Step:
    """What one request gets. `body` is text, or an answer's fields, or None for a connection cut in the middle."""

    body: object
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    content_type: str = "application/json"


def answer(text=CAPTION, finish_reason="stop", usage=True, delay=0.0, **message) -> Step:
    """A completion, by default a good caption."""
    body = {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}]}
    if usage:
        body["usage"] = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    return Step(body, delay=delay)


def fail(status, message="something is wrong", retry_after=None, code=None) -> Step:
    """An error of the server; `retry_after` in seconds, or a string as it is."""
    headers = () if retry_after is None else (("Retry-After", str(retry_after)),)
    return Step({"error": {"message": message, "code": code}}, status, headers)


REFUSE, REPEAT, CUT_CONNECTION = answer(REFUSAL), answer(LOOP), Step(None)
HTML = Step("<!DOCTYPE html><title>Log in</title>", content_type="text/html")
BROKEN_JSON = Step('{"choices": [{"mess')
NO_CHOICES, NULL_CONTENT = Step({"choices": []}), answer(None)


class CaptionServer:
    """Use it with `with`; `url` is the base URL.

    Attributes:
        requests: (width, what it got, when) of every request in the order of arrival.
        bodies: the parsed requests; `headers` theirs, names in lower case.
        most_open: how many requests were open at once, at most.
    """

    def __init__(self, script: dict[int, list[Step]] | None = None, default: Step | None = None):
        self.script = dict(script or {})
        self.default = default or answer()
        self.requests: list[tuple[int, Step, float]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.most_open = 0
        self.on_request: Callable[[int], None] | None = None  # called with how many requests came so far
        self.answered: Counter[int] = Counter()  # completions sent to their end, by width
        self._open = 0
        self._asked: defaultdict[int, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), _make_handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "CaptionServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, width: int) -> int:
        """How many requests came for an image."""
        return sum(requested == width for requested, _, _ in self.requests)

    def open_request(self, body: dict, headers: dict[str, str]) -> tuple[int, Step]:
        width = find_width(body)
        with self._lock:
            steps = self.script.get(width, [self.default])
            step = steps[min(self._asked[width], len(steps) - 1)]
            self._asked[width] += 1
            self.requests.append((width, step, time.monotonic()))
            self.bodies.append(body)
            self.headers.append(headers)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
            count = len(self.requests)
        if self.on_request is not None:
            self.on_request(count)
        return width, step

    def close_request(self) -> None:
        with self._lock:
            self._open -= 1

    def note_answer(self, width: int) -> None:
        with self._lock:
            self.answered[width] += 1


def find_image(body: dict) -> Image.Image:
    """The image of a request."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def find_width(body: dict) -> int:
    return find_image(body).width


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        # A client that was killed leaves its connections behind; that is what is tested.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _make_handler(server: CaptionServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            width, step = server.open_request(body, {name.lower(): value for name, value in self.headers.items()})
            try:
                time.sleep(step.delay)
                self.send(width, step)
            except OSError:
                self.close_connection = True  # the client did not wait
            finally:
                server.close_request()

        def send(self, width: int, step: Step) -> None:
            text = step.body if isinstance(step.body, str) else json.dumps(step.body)
            content = text.replace("{width}", str(width)).encode()
            self.send_response(step.status)
            for name, value in step.headers:
                self.send_header(name, value)
            self.send_header("Content-Type", step.content_type)
            self.send_header("Content-Length", str(len(content) if step.body is not None else 1000))
            self.end_headers()
            if step.body is None:
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
                return
            if step.status == 200:
                # Before the last byte: once the client has it, the test may look.
                server.note_answer(width)
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    return Handler
