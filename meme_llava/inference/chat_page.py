"""The chat page, a gradio.ChatInterface, and its server.

Nothing is fetched from elsewhere, nothing is reported to anybody, and no text of a visitor or a model becomes HTML.
"""

import itertools
import json
import signal
import threading
from collections.abc import Callable, Sequence
from html import escape, unescape
from pathlib import Path

import gradio
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from meme_llava import DATA
from meme_llava.errors import UserError
from meme_llava.inference.chat import Chat
from meme_llava.inference.settings import DEFAULT_QUESTION, LOOPBACK

EXAMPLE_FOLDER = DATA / "unseen" / "images"
EXAMPLES = 6
SUGGESTED_QUESTIONS = (DEFAULT_QUESTION, "请读出图中的文字。", "这张表情包是什么心情？", "请描述一下这张表情包。")
TITLE = "Meme-LLaVA 表情包问答"
ABOUT = "放一张图，问一个问题；另放一张，就开始新对话。Ask about an image, in several turns; another image begins anew."
MAX_UPLOAD_BYTES = 64 * 1024 * 1024
# Names of fonts that systems have; gradio's own themes would ask Google for theirs.
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
DAY = 24 * 60 * 60  # seconds
# An image that is dropped beside the question would have the browser leave the page and show it.
STAY = "() => ['dragover', 'drop'].forEach(kind => document.addEventListener(kind, event => event.preventDefault()))"


def build_page(chat: Chat, names: Sequence[str]) -> gradio.ChatInterface:
    """The page; the names of two models stand above their answers, side by side where there is room (`make_css`)."""
    # Sample memes that no model of the first run was trained on.
    examples = zip(itertools.cycle(SUGGESTED_QUESTIONS), sorted(EXAMPLE_FOLDER.glob("*"))[:EXAMPLES], strict=False)
    chatbot = gradio.Chatbot(
        elem_id="chat", height="68vh", show_label=False, render_markdown=False, feedback_options=None, buttons=[]
    )
    show_texts_as_texts(chatbot)
    page = gradio.ChatInterface(
        chat.reply,
        multimodal=True,
        title=TITLE,
        description=ABOUT if len(names) > 1 else f"{ABOUT} `{names[0]}`",
        chatbot=chatbot,
        textbox=gradio.MultimodalTextbox(
            elem_id="question",
            file_types=["image"],
            sources=["upload"],
            stop_btn=True,
            max_lines=4,
            placeholder="写下问题，按回车发送；图片可拖到这里或粘贴。Write a question; drop or paste an image here",
        ),
        examples=[{"text": question, "files": [str(path)]} for question, path in examples],
        analytics_enabled=False,
        api_visibility="private",
        delete_cache=(3600, DAY),
    )
    with page, gradio.Row(elem_id="suggestions"):
        for text in SUGGESTED_QUESTIONS:
            button = gradio.Button(text, size="sm", min_width=0)
            # In the browser, where what was typed and attached is.
            fill = f"typed => ({{...typed, text: {json.dumps(text)}}})"
            button.click(None, page.textbox, page.textbox, js=fill)
    return page


def show_texts_as_texts(chatbot: gradio.Chatbot) -> None:
    """Escape what goes to the page, which takes texts for HTML, and undo it with what comes back.

    The methods of the object are replaced: for a subclass gradio would write a file beside this module.
    """
    to_page, from_page = chatbot.postprocess, chatbot.preprocess

    def postprocess(messages: Sequence[dict] | None):
        return to_page([_change_texts(message, escape) for message in messages or []])

    def preprocess(payload) -> list[dict]:
        return [_change_texts(message, unescape) for message in from_page(payload)]

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess


def _change_texts(message: dict, change: Callable[[str], str]) -> dict:
    """The message with its texts changed, each as a part of its own: of a plain string gradio strips indentation."""
    content = message["content"]
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else part
        for part in (content if isinstance(content, list) else [content])
    ]
    return message | {
        "content": [part | {"text": change(part["text"])} if part.get("type") == "text" else part for part in parts]
    }


def make_css(names: Sequence[str]) -> str:
    """The page's look; the names of two models head their answers."""
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    for number, name in enumerate(names if len(names) > 1 else [], start=1):
        text = json.dumps(name, ensure_ascii=False).replace("<", "\\3c ")
        css += f".bot.message:has(> :nth-child(2)) > :nth-child({number})::before {{ content: {text}; }}\n"
    return css


def list_hosts(host: str) -> list[str]:
    """The names by which a browser may call the page. A page of this machine has no others: through a name of its own
    a foreign web site could have the visitor's browser ask here."""
    return [*LOOPBACK] if host in LOOPBACK else ["*"]


def serve_until_stopped(
    page: gradio.ChatInterface, css: str, host: str, port: int, on_stop: Callable[[], None]
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then call `on_stop` and end the server.

    Raises UserError where nothing can listen at that host and port.
    """
    is_stopping = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            signal.signal(number, lambda *_: is_stopping.set())
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            max_file_size=MAX_UPLOAD_BYTES,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=list_hosts(host))]},
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=css,
            js=STAY,
        )
        print(f"chat page: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        is_stopping.wait()
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on. Another program may have the port; choose another "
            "--port."
        ) from error
    finally:
        # A second Ctrl-C ends the program whatever it waits for.
        for number, handler in handlers.items():
            signal.signal(number, handler)
        on_stop()
        if page.is_running:
            # An open tab keeps its connection for as long as it may.
            page.server.config.timeout_graceful_shutdown = 1
        page.close(verbose=False)
