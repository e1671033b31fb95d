"""Shows that transformers 4.57 reads a directory of ours as the installed transformers does.

    python benchmarks/older_reader.py --model output/merged
    python benchmarks/older_reader.py --model output/merged --transformers 4.57 --environment FOLDER

Both versions load the directory in float32 on the CPU, one after the other (4 bytes a parameter), and answer the same
question about the same drawn image. No key may be missing, unexpected or of another shape; input ids and greedy
answer must be equal, pixels and logits equal but for rounding. The exit code is 0 if so, 1 if not, and 2 for a wrong
setting.

The older version gets an environment of its own, in the user's cache unless --environment names a folder. It is made
once (1.2 GB with the CPU wheel of torch) and never changed; to make it anew, delete it. pip's configuration applies,
so where the CPU wheel came from an extra index, name that index again (PIP_EXTRA_INDEX_URL).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.model.llava import check_llava_folder  # noqa: E402
from meme_llava.terminal import print_table  # noqa: E402

READER = Path(__file__).resolve().parent / "read_logits.py"
LOADING_FAULTS = {
    "missing keys": "missing_keys",
    "unexpected keys": "unexpected_keys",
    "keys of another shape": "mismatched_keys",
    "other errors": "error_msgs",
}
# In float32 two implementations of a model of any size stay far below.
LARGEST_DIFFERENCES = {"pixel_values": ("pixels", 1e-6), "logits": ("logits", 1e-4)}


@dataclass(frozen=True)
class Reading:
    """What read_logits.py noted under one version of transformers."""

    facts: dict
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return f"transformers {self.facts['transformers']}"


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    finding: str


class ReadingFailed(Exception):
    """A version of transformers cannot read the directory at all."""


def prepare_environment(folder: Path, transformers: str) -> Path:
    """The Python of an environment with that transformers; an existing folder is used as it is or refused."""
    wanted = {
        "transformers": f"{transformers}.*",
        # With its local part (+cpu) a CPU wheel never becomes gigabytes of CUDA.
        "torch": version("torch"),
        "pillow": version("pillow"),
    }
    python = folder / "bin" / "python"
    if folder.exists():
        found = {
            distribution.name.lower(): distribution.version
            for distribution in distributions(path=[str(path) for path in folder.glob("lib/python*/site-packages")])
        }
        for name, number in wanted.items():
            if not _matches(found.get(name), number):
                raise UserError(
                    f"{folder}: has {f'{name} {found[name]}' if name in found else f'no {name}'}, expected {number}; "
                    "name another folder with --environment, or delete this one if nothing else uses it"
                )
        print(f"environment: {folder}, made earlier")
        return python
    print(f"environment: {folder}, made now: {', '.join(f'{name} {number}' for name, number in wanted.items())}")
    # Without protobuf, transformers 4 hides any error of a tokenizer behind a call for protobuf.
    requirements = [*(f"{name}=={number}" for name, number in wanted.items()), "safetensors", "protobuf"]
    try:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-I", "-m", "pip", "install", "-qq", *requirements], check=True)
    except BaseException as error:
        # Half an environment would stand in the way of the next run.
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            raise UserError(f"{folder}: not made, this failed: {shlex.join(map(str, error.cmd))}") from error
        if isinstance(error, OSError):
            raise UserError(f"{folder}: not made: {error}") from error
        raise
    return python


def read(python: str | Path, model: Path) -> Reading:
    """Run read_logits.py.

    Raises:
        ReadingFailed: it stopped with an error, which has been printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "reading.safetensors"
        # -I: PYTHONPATH and the user's own packages would bring the installed transformers along.
        result = subprocess.run(
            [python, "-I", READER, model.resolve(), output],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if result.returncode:
            print(result.stderr, file=sys.stderr)
            # Only Python's own exit ends in the error; a reader that is killed for memory leaves a warning at most.
            is_exception = result.returncode == 1 and result.stderr.strip()
            raise ReadingFailed(result.stderr.splitlines()[-1] if is_exception else f"exit code {result.returncode}")
        with safe_open(output, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return Reading(facts, {name: file.get_tensor(name) for name in file.keys()})


def compare(new: Reading, old: Reading) -> list[Check]:
    """What both found, check by check."""
    checks = []
    for name, fault in LOADING_FAULTS.items():
        found = new.facts[fault], old.facts[fault]
        checks.append(Check(name, found == ([], []), _describe_pair(*map(_describe_faults, found))))
    towers = new.facts["vision_tower"], old.facts["vision_tower"]
    checks.append(Check("vision tower", towers[0] == towers[1], _describe_pair(*towers)))
    ids = new.tensors["input_ids"], old.tensors["input_ids"]
    same = torch.equal(*ids)
    lengths = _describe_pair(*(x.shape[1] for x in ids))
    checks.append(Check("input ids", same, f"{lengths} tokens" if same else f"{lengths} tokens, not the same"))
    for key, (name, limit) in LARGEST_DIFFERENCES.items():
        first, second = new.tensors[key], old.tensors[key]
        difference = (first - second).abs().max().item() if first.shape == second.shape else float("inf")
        checks.append(Check(name, difference <= limit, f"differ by {difference:.1e}, limit {limit:.0e}"))
    same = torch.equal(new.tensors["answer_ids"], old.tensors["answer_ids"])
    checks.append(Check("greedy answer", same, _describe_pair(new.facts["answer"], old.facts["answer"])))
    return checks


def _matches(found: str | None, wanted: str) -> bool:
    return found is not None and (found == wanted or wanted.endswith(".*") and f"{found}.".startswith(wanted[:-1]))


def _describe_pair(new: object, old: object) -> str:
    return str(new) if new == old else f"{new} / {old}"


def _describe_faults(found: list[str]) -> str:
    return f"{len(found)}, e.g. {found[0]}" if found else "none"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of build_base_model.py or merge_lora.py")
    parser.add_argument("--transformers", default="4.57", help="the older version, 4.56 or newer (default: 4.57)")
    parser.add_argument("--environment", type=Path, help="folder of its environment")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(\.\d+)+", arguments.transformers):
        raise UserError(f"--transformers is {arguments.transformers!r}, expected a version such as 4.57")
    if arguments.environment is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        arguments.environment = cache / "meme-llava" / f"older_reader-{arguments.transformers}"
    return arguments


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_llava_folder(arguments.model)
    python = prepare_environment(arguments.environment.absolute(), arguments.transformers)
    readings = []
    for name, interpreter in ((version("transformers"), sys.executable), (arguments.transformers, python)):
        try:
            readings.append(read(interpreter, arguments.model))
        except ReadingFailed as error:
            sys.exit(f"transformers {name} cannot read {arguments.model}: {error}")
    new, old = readings
    checks = compare(new, old)
    print_table(
        f"{arguments.model}: {new.name} / {old.name}",
        ("check", "finding", "verdict"),
        [(check.name, check.finding, "ok" if check.passed else "WRONG") for check in checks],
    )
    failed = [f"{check.name} ({check.finding})" for check in checks if not check.passed]
    if failed:
        sys.exit(f"{old.name} reads {arguments.model} differently: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
