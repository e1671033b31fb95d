"""One process of a run: its place among the others, its engine, its sign of life, its end. Without torch.

An engine is one word: `single`, `ddp`, or the name of a file in configs/deepspeed or configs/fsdp.
"""

import atexit
import contextlib
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from meme_llava import CONFIGS, errors
from meme_llava.distributed.launchers import settle_environment
from meme_llava.errors import PEER_FAILED, UserError, stop_on_user_error
from meme_llava.storage.json_files import check_fields, read_json

AUTO, SINGLE, DDP = "auto", "single", "ddp"
DEEPSPEED, FSDP = "deepspeed", "fsdp"
ENGINE_ADVICE = "Correct it, or choose another --engine."
# A scheduler's signal comes by several ways at once; one that comes later is another.
REPEATED_SIGNAL_SECONDS = 2
# Before the first step a file of many gigabytes may be read in one go.
START_PATIENCE = 6
STANDARD_ERROR = 2
PEER_SECONDS = 2  # the process that failed is to be gone, and known by its own exit code, before the others
_SIGNS_OF_LOSS = ("/gloo/transport/", "NCCL communicator was aborted", "remote process exited", "Watchdog caught")


def count_processes() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_rank() -> int:
    """The number of this process in the run."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process prints and writes for all."""
    return find_rank() == 0


def find_local_rank() -> int:
    """The number of this process on its node, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_local_main_process() -> bool:
    """Whether this process does what once on each node is enough."""
    return find_local_rank() == 0


@dataclass(frozen=True)
class Engine:
    """What holds weights, gradients and optimizer state of a run, and on how many devices.

    Args:
        kind: whose code it is.
        config: the content of its file; empty where there is none.
    """

    name: str
    kind: Literal["single", "ddp", "deepspeed", "fsdp"]
    path: Path | None = None
    config: Mapping = field(default_factory=dict)

    @property
    def zero_options(self) -> Mapping:
        """The "zero_optimization" part of a DeepSpeed file."""
        return self.config.get("zero_optimization", {})

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None without DeepSpeed."""
        return self.zero_options.get("stage", 0) if self.kind == DEEPSPEED else None

    @property
    def shards_weights(self) -> bool:
        """Whether a forward pass gathers weights from all processes, so that all must make it."""
        return self.kind == FSDP or self.zero_stage == 3


def list_engines() -> dict[str, Path | None]:
    """Every engine's name with its file, None where it has none."""
    files = [path for kind in (DEEPSPEED, FSDP) for path in sorted((CONFIGS / kind).glob("*.json"))]
    return {SINGLE: None, DDP: None, **{path.stem: path for path in files}}


def check_engine_name(name: str) -> None:
    """Raise UserError unless there is an engine of that name."""
    known = (AUTO, *list_engines())
    if name not in known:
        raise UserError(f"--engine {name}: no such engine; there are {', '.join(known)}")


def choose_engine(name: str, processes: int, on_gpu: bool) -> Engine:
    """The engine of that name; `auto` is one process where there is one, ZeRO-2 on several GPUs, else DDP.

    Raises:
        UserError: there is none of that name, it does not go with that many processes, or its file is wrong.
    """
    if name == AUTO:
        name = SINGLE if processes == 1 else "zero2" if on_gpu else DDP
    engine = read_engine(name)
    if name == SINGLE and processes > 1:
        raise UserError(f"--engine {SINGLE} is for one process, and there are {processes}; choose another")
    if engine.path is None:
        # Copies on one device are one copy.
        return Engine(SINGLE, SINGLE) if processes == 1 else engine
    if engine.kind == FSDP and processes == 1:
        raise UserError(f"--engine {name} divides state among several processes, and there is one; choose {SINGLE}")
    return engine


def read_engine(name: str) -> Engine:
    """The engine of that name, which is not auto. Raises UserError where there is none, or its file is wrong."""
    check_engine_name(name)
    path = list_engines()[name]
    if path is None:
        return Engine(name, name)
    config = read_json(path, ENGINE_ADVICE)
    engine = Engine(name, path.parent.name, path, config)
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"{path}: remove its key {key!r}, which would replace the two learning rates")
    if engine.kind == FSDP:
        if config.get("version") != 2:
            raise UserError(f'{path}: expected "version": 2; FSDP1 flattens what learns together with what does not')
        return engine
    check_fields(path, config, {"zero_optimization.stage": int}, ENGINE_ADVICE)
    options = config["zero_optimization"]
    if options["stage"] not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {options['stage']}, expected 1, 2 or 3. {ENGINE_ADVICE}")
    offloaded = [name for name in ("offload_optimizer", "offload_param") if options.get(name) is not None]
    check_fields(path, options, dict.fromkeys(offloaded, dict), ENGINE_ADVICE)
    return engine


class Heartbeat:
    """Ends this process when too much time passes without a beat; every thread's stack is printed then.

    The processes of a run wait for each other, so one that is stuck ends them all. It watches inside a `with` block.

    Args:
        hang_timeout: seconds; before training begins, and while a checkpoint is written, six times as many.
    """

    def __init__(self, hang_timeout: float):
        self._hang_timeout = hang_timeout
        self.patience = START_PATIENCE * hang_timeout
        self.trains = False

    def __enter__(self) -> "Heartbeat":
        self.beat()
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def wait_longer(self) -> Iterator[None]:
        """Within a training run, be as patient as before its first step: files of many gigabytes are written."""
        before, self.trains = self.trains, False
        self.beat()
        yield
        self.trains = before
        self.beat()

    def beat(self) -> None:
        """Say that something was reached."""
        seconds = self._hang_timeout if self.trains else self.patience
        faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end this process with its exit code.

    Where several processes trained, torch's communication threads can abort one whose interpreter is taken down, after
    all its work was done; so what Python has to see to at exit is seen to, and the rest left out.
    """
    stop_on_user_error(lambda _: settle_environment())()
    errors.rank = find_rank()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 1
        if _is_peer_failure(error):
            # The launcher knows which; a traceback of this one would only hide what that one said.
            print(f"[process {find_rank()}] lost another process", file=sys.stderr, flush=True)
            time.sleep(PEER_SECONDS)
            code = PEER_FAILED
        else:
            traceback.print_exc()
    if count_processes() == 1:
        sys.exit(code)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _is_peer_failure(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the run is gone or does not answer."""
    # Torch's own error for it cannot have been raised where torch was never loaded.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS)
