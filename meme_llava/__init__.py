"""Meme-LLaVA: build, train, merge and ask vision-language models that read Chinese memes."""

import sys
import warnings

# peft reads a property that transformers has renamed; a user can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

_report_before = sys.excepthook


def _report(kind, error, traceback) -> None:
    """Ctrl-C while libraries load, which takes seconds, is not a fault and has no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr, flush=True)
    else:
        _report_before(kind, error, traceback)


sys.excepthook = _report
