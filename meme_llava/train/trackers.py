"""The trackers a run can be reported to, and whether each can be used here, before anything is loaded.

What they are given is in meme_llava/train/tracker_runs.py. Nothing about models.
"""

import contextlib
import importlib.util
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence

from meme_llava.errors import UserError

TENSORBOARD, WANDB, SWANLAB, MLFLOW = "tensorboard", "wandb", "swanlab", "mlflow"
NONE = "none"
# What has to be importable for each.
MODULES = {TENSORBOARD: ("tensorboard",), WANDB: ("wandb",), SWANLAB: ("swanlab",), MLFLOW: ("mlflow", "sqlalchemy")}
REQUIREMENTS = "configs/requirements/trackers.txt"
REACH_SECONDS = 10
OFFLINE_MODES = ("offline", "local", "disabled", "dryrun")


def check_tracker_names(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that does not exist, one given twice, or others beside none."""
    unknown = [name for name in names if name not in (*MODULES, NONE)]
    if unknown:
        raise UserError(f"--report_to {unknown[0]}: no such tracker; there are {', '.join(MODULES)}, or none")
    if len(set(names)) < len(names) or (NONE in names and len(names) > 1):
        raise UserError(f"--report_to is {' '.join(names)}; expected each tracker once, or none alone")


def list_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that --report_to asks for; none is not a tracker."""
    return [name for name in names if name != NONE]


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker is installed, and one with a server logged in and to be reached.

    Raises:
        UserError: one cannot be used, with what to do.
    """
    for name in list_trackers(names):
        missing = [module for module in MODULES[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(
                f"--report_to {name}: the package {missing[0]} is not installed; pip install -r {REQUIREMENTS} (or "
                f"only the lines of {name}), or leave {name} out"
            )
    if WANDB in names:
        _check_wandb()
    if SWANLAB in names:
        _check_swanlab()
    if MLFLOW in names and os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://")):
        _check_reachable(MLFLOW, os.environ["MLFLOW_TRACKING_URI"], "set another MLFLOW_TRACKING_URI, or unset it")


def _check_wandb() -> None:
    import wandb

    with explain_failure(WANDB):
        settings = wandb.setup().settings
        if (settings.mode or "online") in OFFLINE_MODES:
            return
    # A login asks the server, too, and takes long to say that there is none.
    _check_reachable(WANDB, settings.base_url, "set WANDB_MODE=offline and upload later with wandb sync")
    with explain_failure(WANDB):
        wandb.login()


def _check_swanlab() -> None:
    import swanlab

    with explain_failure(SWANLAB):
        settings = swanlab.Settings()
    if settings.mode in OFFLINE_MODES:
        return
    if not settings.api_key:
        raise UserError(
            f"--report_to {SWANLAB}: nobody is logged in; swanlab login, or set SWANLAB_MODE=offline, or leave it out"
        )
    _check_reachable(SWANLAB, settings.api_host, "set SWANLAB_MODE=offline and upload later with swanlab sync")


def _check_reachable(name: str, address: str, remedy: str) -> None:
    """Raise UserError unless something answers there, whatever it says."""
    address = _drop_login(address)
    try:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(address, timeout=REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--report_to {name}: {address} does not answer ({reason}); fix the connection, {remedy}, "
            f"or leave {name} out"
        ) from error


def _drop_login(address: str) -> str:
    """The address without a user's name and password in it."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Turn whatever a tracker's library raises into a UserError, and let it ask no question on the terminal.

    With several processes nobody would see the question, and all would wait for the answer.
    """
    login = {WANDB: "wandb login, or set WANDB_MODE=offline", SWANLAB: "swanlab login, or set SWANLAB_MODE=offline"}
    stdin = sys.stdin
    try:
        with open(os.devnull) as sys.stdin:
            yield
    except UserError:
        raise
    except Exception as error:
        words = str(error).strip().splitlines()
        reason = words[0] if words else type(error).__name__
        remedy = login.get(name, "check MLFLOW_TRACKING_URI and the other MLFLOW_ variables")
        raise UserError(f"--report_to {name}: cannot be used here ({reason}); {remedy}, or leave {name} out") from error
    finally:
        sys.stdin = stdin
