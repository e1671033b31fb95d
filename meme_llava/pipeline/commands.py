"""Commands of run.sh: run to their end, and told of signals."""

import signal
import subprocess
import sys
import time

from meme_llava.distributed.environment import REPEATED_SIGNAL_SECONDS, die_with_parent
from meme_llava.distributed.launch import describe_end

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_command(*command: str) -> None:
    """Run `python …` to its end; a signal to this process reaches it, a later one ends it at once. Exits with its code
    unless that is 0."""
    signals, running = [], []  # (number, seconds) and the process

    def hand_on(number: int, frame: object) -> None:
        signals.append((number, time.monotonic()))
        # A scheduler's signal comes by several ways; one that comes later says that there is no time to save.
        is_late = signals[-1][1] - signals[0][1] > REPEATED_SIGNAL_SECONDS
        for process in running:
            (process.kill if is_late else process.terminate)()

    # Under nohup, whoever hangs up is not heard.
    heard = (number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
    handlers = {number: signal.signal(number, hand_on) for number in heard}

    def prepare() -> None:
        # Ctrl-C reaches every process of a terminal; the command is to hear of it once, from here.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent()

    running.append(subprocess.Popen([sys.executable, *command[1:]], stdin=subprocess.DEVNULL, preexec_fn=prepare))
    if signals:
        running[0].terminate()
    code = running[0].wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code in (-signal.SIGTERM, -signal.SIGKILL) and signals:
        sys.exit(128 + signals[0][0])
    if code < 0:
        print(f"error: {describe_end(command[1], code)}", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)
