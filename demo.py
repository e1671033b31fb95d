"""Chat with a model about memes, in the browser.

python demo.py --model output/merged
python demo.py --model output/merged --compare_with output/base

opens a page on this machine, http://127.0.0.1:7860: drop or paste an image and ask, in several turns. With a second
model each question goes to both, and the answers stand beside each other.
"""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from meme_llava.cli import parse_arguments
from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.inference.settings import LOOPBACK, DemoArguments
from meme_llava.storage.run_record import holds_trained_weights

if TYPE_CHECKING:
    from meme_llava.inference.generation import Answerer


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DemoArguments, argv, description=__doc__)
    check_gradio()
    folders = [folder for folder in (arguments.model, arguments.compare_with) if folder is not None]
    # Torch takes seconds to load; a wrong flag is answered before.
    from meme_llava.inference.chat import Chat

    chat = Chat(load_answerers(arguments, folders), arguments.system, arguments.max_new_tokens)
    if arguments.host not in LOOPBACK:
        print(f"warning: --host {arguments.host}: whoever reaches this machine can ask; there is no password")
    with tempfile.TemporaryDirectory(prefix="meme_llava_demo_") as folder:
        settle_gradio(folder)
        from meme_llava.inference.chat_page import build_page, make_css, serve_until_stopped

        names = [str(folder) for folder in folders]
        page = build_page(chat, names)
        serve_until_stopped(page, make_css(names), arguments.host, arguments.port, on_stop=chat.close)
    print("stopped")


def check_gradio() -> None:
    """Raise UserError where no gradio is installed that we ran; nothing else needs it."""
    try:
        found = version("gradio")
    except PackageNotFoundError:
        found = "none"
    # pip alone takes one of 2023 where Pillow 13 is installed, and that one cannot be imported.
    if not found.startswith("6."):
        raise UserError(
            f"demo.py needs gradio 6, found {found}: pip install -r requirements.txt -r configs/requirements/demo.txt"
        )


def load_answerers(arguments: DemoArguments, folders: list[Path]) -> "list[Answerer]":
    """The models, each as infer.py would load it; --base_model is for those that are adapters."""
    from meme_llava.inference.generation import load_answerer

    adapters = [folder for folder in folders if holds_trained_weights(folder)]
    # Where no model is an adapter, loading the first says that --base_model has no use.
    bases = [arguments.base_model if folder in adapters or not adapters else None for folder in folders]
    return [
        load_answerer(folder, base, arguments.device, arguments.dtype)
        for folder, base in zip(folders, bases, strict=True)
    ]


def settle_gradio(folder: str) -> None:
    """Have gradio put its files, and what visitors upload, into a folder, and ask nobody but its own server, which no
    proxy of the user's could reach. It reads this while it is imported."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"
    tempfile.tempdir = folder


if __name__ == "__main__":
    main()
