"""A server that was started on this machine: which port it may take, and when it answers."""

import contextlib
import socket
import subprocess
import time
from pathlib import Path

from meme_llava.errors import UserError


def find_free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_listening(process: subprocess.Popen, port: int, log: Path, seconds: float = 180) -> None:
    """Return when the port is open, which it is once the model is loaded. Raises UserError where that does not come."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.2)
    found = f"exit code {process.poll()}" if process.poll() is not None else f"not ready after {seconds} s"
    end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise UserError(f"the server does not listen ({found}); all it said is in {log}, at the end:\n{end}")
