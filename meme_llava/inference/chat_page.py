"""The chat page, made with gradio, and its server.

Nothing is fetched from elsewhere, nothing is reported to anybody, and no text of a visitor or a model becomes HTML.
"""

import base64
import io
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import gradio
from PIL import Image

from meme_llava import DATA
from meme_llava.errors import UserError
from meme_llava.inference.chat import Chat, ChatProblem, Conversation, Reply
from meme_llava.inference.settings import DEFAULT_QUESTION

EXAMPLE_FOLDER = DATA / "unseen" / "images"
EXAMPLES = 6
SUGGESTED_QUESTIONS = (
    DEFAULT_QUESTION,
    "请读出图中的文字。",
    "这张表情包是什么心情？",
    "请描述一下这张表情包。",
)
TITLE = "Meme-LLaVA 表情包问答"
MAX_UPLOAD_BYTES = 64 * 1024 * 1024
TOO_BIG = f"文件超过 {MAX_UPLOAD_BYTES >> 20} MB，请换一张。The file is larger than {MAX_UPLOAD_BYTES >> 20} MB."
EMPTY_PANEL = "把图片拖到页面上，或按 Ctrl+V 粘贴，<br>或点这里选择<br>Drop, paste or choose an image"
# Names of fonts that systems have; gradio's own themes would ask Google for theirs.
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
DAY = 24 * 60 * 60  # seconds


def build_page(chat: Chat, names: list[str], examples: list[Path]) -> gradio.Blocks:
    """The page, with a column for each model.

    Args:
        names: what stands above the columns.
        examples: images to begin with.
    """
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        conversation = gradio.State(Conversation())
        gradio.HTML(
            f"<h1>{TITLE}</h1><p>放一张图，问一个问题。回答只看这张图和这次对话。"
            "<br>Ask about an image, in several turns.</p>",
            elem_id="title",
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                panel = gradio.HTML(show_image(None), elem_id="image")
                upload = gradio.UploadButton("选择图片 Choose an image", elem_id="upload", size="md")
                image_notice = gradio.HTML(show_notice(""), elem_classes="notices")
                too_big = f'<div id="too_big" class="notice" role="alert" hidden>{TOO_BIG}</div>'
                gradio.HTML(too_big, elem_classes="notices")
                gallery = gradio.Gallery(
                    [str(path) for path in examples],
                    label="示例 Examples",
                    show_label=False,
                    elem_id="examples",
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=bool(examples),
                )
            with gradio.Column(scale=5, min_width=280):
                with gradio.Row():
                    chatbots = [
                        gradio.Chatbot(
                            label=name,
                            elem_id=f"answers_{number}",
                            height=420,
                            min_width=280,
                            render_markdown=False,
                            feedback_options=None,
                            buttons=[],
                            elem_classes="answers",
                        )
                        for number, name in enumerate(names)
                    ]
                with gradio.Row(elem_id="suggestions"):
                    suggestions = [gradio.Button(text, size="sm") for text in SUGGESTED_QUESTIONS]
                question_notice = gradio.HTML(show_notice(""), elem_classes="notices")
                question = gradio.Textbox(
                    show_label=False,
                    container=False,
                    placeholder="写下问题，按回车发送 Write a question",
                    max_lines=4,
                    elem_id="question",
                )
                with gradio.Row():
                    send = gradio.Button("发送 Send", variant="primary", elem_id="send", min_width=100)
                    stop = gradio.Button("停止 Stop", variant="stop", elem_id="stop", min_width=100, visible=False)
                    restart = gradio.Button("新对话 New chat", elem_id="restart", min_width=100)

        actions = _Actions(chat, examples, len(names))
        shown = [image_notice, question_notice, *chatbots, send, stop]
        private = {"api_visibility": "private"}
        # One visitor's question at a time, whichever button sends it; the others wait in a queue.
        asking = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress_on": chatbots, **private}
        gradio.on([send.click, question.submit], actions.ask, [question, conversation], [question, *shown], **asking)
        for button in suggestions:
            button.click(actions.ask, [button, conversation], [question, *shown], **asking)
        stop.click(actions.stop, conversation, None, queue=False, **private)
        upload.upload(actions.take_upload, [upload, conversation], [panel, *shown], **private)
        gallery.select(actions.take_example, conversation, [panel, *shown], **private)
        restart.click(actions.restart, conversation, [panel, *shown], **private)
    return page


class _Actions:
    """What the page's buttons do. Each returns the new contents of the components that were named beside it."""

    def __init__(self, chat: Chat, examples: list[Path], models: int):
        self._chat = chat
        self._examples = examples
        self._models = models

    def ask(self, question: str, conversation: Conversation) -> Iterator[list]:
        try:
            for _ in self._chat.ask(conversation, question):
                yield ["", *self._show(conversation, is_answering=True)]
            yield ["", *self._show(conversation)]
        except ChatProblem as problem:
            yield [question, *self._show(conversation, question_problem=str(problem))]

    @staticmethod
    def stop(conversation: Conversation) -> None:
        conversation.stop_asked = True

    def take_upload(self, path: str, conversation: Conversation) -> list:
        return self._take(Path(path), conversation)

    def take_example(self, conversation: Conversation, chosen: gradio.SelectData) -> list:
        return self._take(self._examples[chosen.index], conversation)

    def restart(self, conversation: Conversation) -> list:
        conversation.begin(conversation.image)
        return [gradio.skip(), *self._show(conversation)]

    def _take(self, path: Path, conversation: Conversation) -> list:
        try:
            image = self._chat.take_image(conversation, path)
        except ChatProblem as problem:
            return [gradio.skip(), *self._show(conversation, image_problem=str(problem))]
        return [show_image(image), *self._show(conversation)]

    def _show(
        self,
        conversation: Conversation,
        image_problem: str = "",
        question_problem: str = "",
        is_answering: bool = False,
    ) -> list:
        """Contents of both notices, the columns, send button and stop button."""
        columns = conversation.columns or [[] for _ in range(self._models)]
        return [
            show_notice(image_problem),
            show_notice(question_problem),
            *([message for reply in column for message in show_reply(reply)] for column in columns),
            gradio.update(visible=not is_answering),
            gradio.update(visible=is_answering),
        ]


def show_reply(reply: Reply) -> list[dict]:
    """A question and its answer as messages of a column."""
    remark = f"（{reply.remark}）" if reply.remark else ""
    answer = "\n".join(part for part in (reply.text, remark) if part)
    return [{"role": "user", "content": reply.question}, {"role": "assistant", "content": answer or "…"}]


def show_image(image: Image.Image | None) -> str:
    """HTML of the image, or of the place where one may be dropped."""
    if image is None:
        return f'<div class="panel" role="button" tabindex="0">{EMPTY_PANEL}</div>'
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    element = f'<img src="{source}" alt="现在的图片 the present image">'
    return f'<div class="panel filled" role="button" tabindex="0">{element}</div>'


def show_notice(problem: str) -> str:
    """HTML of what a visitor should know, or of nothing."""
    return f'<div class="notice" role="alert">{escape(problem)}</div>' if problem else ""


def list_examples() -> list[Path]:
    """Sample memes that no model of the first run was trained on."""
    return sorted(EXAMPLE_FOLDER.glob("*"))[:EXAMPLES]


def serve_until_stopped(page: gradio.Blocks, host: str, port: int, on_stop: Callable[[], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then call `on_stop` and end the server.

    Raises:
        UserError: nothing can listen at that host and port.
    """
    check_address(host, port)
    # gradio asks its own server whether it runs; a proxy of the user's could not reach it.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", host]))
    is_stopping = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            signal.signal(number, lambda *_: is_stopping.set())
        folder = Path(__file__).parent
        script = (folder / "chat_page.js").read_text(encoding="utf-8")
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=MAX_UPLOAD_BYTES,
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=(folder / "chat_page.css").read_text(encoding="utf-8"),
            js=script.replace("MAX_BYTES", str(MAX_UPLOAD_BYTES)),
        )
        print(f"chat page: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        is_stopping.wait()
    finally:
        # A second Ctrl-C ends the program whatever it waits for.
        for number, handler in handlers.items():
            signal.signal(number, handler)
        on_stop()
        if page.is_running:
            # An open tab keeps its connection for as long as it may.
            page.server.config.timeout_graceful_shutdown = 1
        page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raise UserError unless something could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}). Another program may have "
            "the port; choose another --port."
        ) from error
