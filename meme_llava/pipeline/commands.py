"""Commands of run.sh: run to their end, and told of signals."""

import os
import signal
import subprocess
import sys
import time

from meme_llava.distributed.environment import REPEATED_SIGNAL_SECONDS
from meme_llava.distributed.launch import choose_stop, describe_end
from meme_llava.distributed.launchers import die_with_parent

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
            process.send_signal(signal.SIGKILL if is_late else choose_stop(number))

    def pause(number: int, frame: object) -> None:
        for process in running:
            process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell's fg or bg
        for process in running:
            process.send_signal(signal.SIGCONT)

    # What is ignored stays so: SIGHUP under nohup.
    heard = [number for number in (*STOP_SIGNALS, signal.SIGTSTP) if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, pause if number == signal.SIGTSTP else hand_on) for number in heard}

    def prepare() -> None:
        # Ctrl-C and Ctrl-Z reach every process of a terminal's group; the command is to hear of them once, from here.
        os.setpgid(0, 0)
        die_with_parent()

    running.append(subprocess.Popen([sys.executable, *command[1:]], stdin=subprocess.DEVNULL, preexec_fn=prepare))
    if signals:
        running[0].send_signal(choose_stop(signals[0][0]))
    code = running[0].wait()
    script = next((word for word in command if word.endswith(".py")), command[1])  # behind a launcher's flags
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if code < 0 and signals:
        print(f"stopped by {signal.Signals(signals[0][0]).name}: {script}", file=sys.stderr)
        sys.exit(128 + signals[0][0])
    if code < 0:
        print(f"error: {describe_end(script, code)}", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)
