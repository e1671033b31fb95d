"""Serve a model with vLLM on this machine's CPU, and hold its answers against evaluate.py's; see serve_with_vllm.sh.

The model is one of `merge_lora.py --export clip` or `--export vllm_lora`, or one with a CLIP or SigLIP tower. Both are
asked by evaluate.py, vLLM through the client of openai at temperature 0.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from local_server import find_free_port, wait_until_listening  # noqa: E402

from meme_llava.convert import export_clip  # noqa: E402
from meme_llava.convert.export_vllm_lora import choose_rank  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.evaluate.results_folder import read_predictions  # noqa: E402
from meme_llava.storage.fingerprint import check_weights  # noqa: E402
from meme_llava.storage.json_files import read_json  # noqa: E402
from meme_llava.storage.run_record import ADAPTER_CONFIG, LANGUAGE_LORA  # noqa: E402

START_SECONDS, STOP_SECONDS = 900, 30
ADAPTER_NAME = "memes"
SHARE_THE_SAME = 398 / 400  # rounding in other places turns a close choice now and then
MAX_SHOWN = 5


def list_flags(model: Path, dtype: str, port: int) -> list[str]:
    """What follows `vllm serve`. The last two are for CPUs: a share of memory, of which the cache takes its own, and no
    compiling, which takes minutes."""
    flags = [str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "4096"]
    adapter = model / LANGUAGE_LORA
    if adapter.is_dir():
        rank = choose_rank(read_json(adapter / ADAPTER_CONFIG)["r"])
        flags += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{ADAPTER_NAME}={adapter}"]
    return [*flags, "--gpu-memory-utilization", "0.1", "--enforce-eager"]


@contextlib.contextmanager
def serve(vllm: Path, model: Path, log: Path, dtype: str = "auto") -> Iterator[tuple[str, str]]:
    """The address of a server of `model` and the name to ask for. Raises UserError where it does not start; what it
    said is in `log`."""
    port = find_free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # It starts programs of its environment, such as ninja.
    environment["PATH"] = f"{vllm.parent}{os.pathsep}{os.environ['PATH']}"
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    command = [str(vllm), "serve", *list_flags(model, dtype, port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_listening(process, port, log, START_SECONDS)
        yield f"http://127.0.0.1:{port}/v1", ADAPTER_NAME if "--enable-lora" in command else str(model)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        # The processes that it started, if it could not stop them itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def evaluate(output_dir: Path, arguments: argparse.Namespace, *flags: str) -> float:
    """Ask everything by evaluate.py. Returns seconds, its start among them."""
    data = [f"--annotations={arguments.annotations}", f"--image_folder={arguments.annotations.parent}"]
    command = [sys.executable, ROOT / "evaluate.py", f"--output_dir={output_dir}", "--overwrite", *data, *flags]
    start = time.monotonic()
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"evaluate.py failed: {' '.join(map(str, command))}")
    return time.monotonic() - start


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="its folder answers gets answers and vllm.log")
    parser.add_argument("--model", type=Path, required=True, help="the folder that is served")
    parser.add_argument("--compare_with", type=Path, help="the model that evaluate.py loads, if another folder")
    parser.add_argument("--dtype", default="auto", help="vLLM's; auto is the one that the model is stored in")
    unseen = ROOT / "data" / "unseen" / "annotations.json"
    parser.add_argument("--annotations", type=Path, default=unseen, help="their images are relative to their folder")
    parser.add_argument("--vllm", type=Path, help="the program, if not vllm/bin/vllm of work_dir")
    parser.add_argument("--check", action="store_true", help="only look at the other flags")
    return parser.parse_args(argv)


def check_model(arguments: argparse.Namespace) -> None:
    """Raise UserError unless it can be served and compared."""
    if not arguments.model.is_dir():
        raise UserError(f"{arguments.model}: no such model folder; merge_lora.py --export clip makes one")
    if (arguments.model / LANGUAGE_LORA).is_dir() and arguments.compare_with is None:
        raise UserError(f"{arguments.model}: answers by its adapter; give the model that learned it as --compare_with")
    if export_clip.is_needed(arguments.model):
        raise UserError(f"{arguments.model}: vLLM refuses its vision tower by name; merge with --export clip")
    check_weights(arguments.model)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    vllm, answers = arguments.vllm or arguments.work_dir / "vllm" / "bin" / "vllm", arguments.work_dir / "answers"
    check_model(arguments)
    if arguments.check:
        return
    if not vllm.is_file():
        raise UserError(f"{vllm}: no such program; serve_with_vllm.sh installs vLLM")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # else the server would outlive this
    answers.mkdir(parents=True, exist_ok=True)
    ours, theirs = answers / "ours", answers / "vllm"
    with serve(vllm.absolute(), arguments.model, answers / "vllm.log", arguments.dtype) as (url, name):
        asked = [f"--base_url={url}", f"--model={name}", "--batch_size=64", "--timeout=600"]
        # The first questions make it ready.
        evaluate(theirs, arguments, "--answer_with=endpoint", *asked, "--limit=8")
        seconds = {"vllm": evaluate(theirs, arguments, "--answer_with=endpoint", *asked)}
    seconds["ours"] = evaluate(ours, arguments, f"--model={arguments.compare_with or arguments.model}")
    pairs = list(zip(*(read_predictions(folder).values() for folder in (ours, theirs)), strict=True))
    different = [pair for pair in pairs if pair[0].text != pair[1].text]
    for our, their in different[:MAX_SHOWN]:
        print(f"{our.question.image}, {our.question.text}: {our.text!r}, vLLM {their.text!r}")
    same = len(pairs) - len(different)
    rates = {who: round(len(pairs) / taken, 1) for who, taken in seconds.items()}
    print(json.dumps({"questions": len(pairs), "the_same": same, "questions_per_second_with_start": rates}))
    if same < SHARE_THE_SAME * len(pairs):
        raise UserError(f"{same} of {len(pairs)} answers are the same, expected {SHARE_THE_SAME:.1%}")


if __name__ == "__main__":
    main()
