"""One fault a row: what the run says, how it ends, what is on the disk, and what the same command does next."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from conftest import ROOT, read_losses, train_flags
from launching import RECIPE, find_processes, go_on, list_whole_checkpoints, run, strip_settings, weights_equal

import train

TERM_1 = {"kind": "signal_self", "rank": 1, "step": 3, "number": "SIGTERM"}


@dataclass(frozen=True)
class Fault:
    """A row of a fault table in docs/troubleshooting.md, by its name.

    Args:
        faults: for inject.py.
        code: how the run ends: the launcher where there are several processes, below 0 a signal.
        message: a regular expression found in what it says.
        left: the steps of the checkpoints on the disk.
        exact: whether the run, continued, ends with the weights of the uninterrupted one.
        fast: whether the default test run takes it.
    """

    name: str
    faults: list[dict]
    code: int
    message: str
    left: list[int]
    processes: int = 2
    engine: str = "ddp"
    changes: dict = field(default_factory=dict)
    exact: bool = True
    fast: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.engine}"


def signals(number, rank, step=3):
    return [{"kind": "signal_self", "rank": rank, "step": step, "number": number}]


TERMINATED, INTERRUPTED = (
    f"stopped: by {name} after step 3 of 6; .*checkpoint-3 is whole. Start the same command again"
    for name in ("SIGTERM", "SIGINT")
)
FAULTS = [
    Fault("SIGTERM to one process", signals("SIGTERM", 1), 75, TERMINATED, [2, 3]),
    Fault("SIGTERM to one process", signals("SIGTERM", 0), 75, TERMINATED, [2, 3], engine="zero2"),
    Fault("SIGTERM to one process", signals("SIGTERM", 1), 75, TERMINATED, [2, 3], engine="zero3"),
    Fault("SIGTERM to one process", signals("SIGTERM", 0), 75, TERMINATED, [2, 3], engine="fsdp2"),
    Fault("SIGINT to one process", signals("SIGINT", 0), 75, INTERRUPTED, [2, 3], engine="zero2"),
    Fault("SIGINT to one process", signals("SIGINT", 0), 75, INTERRUPTED, [2, 3], 1, "single"),
    Fault("SIGTERM to a process and its data workers", [{**TERM_1, "kind": "signal_job"}], 75,
          TERMINATED, [2, 3], changes={"dataloader_workers": 1}),
    Fault("SIGTERM to a process and its data workers", [{**TERM_1, "rank": 0, "kind": "signal_job"}], 75,
          TERMINATED, [2, 3], 1, "single", {"dataloader_workers": 1}, fast=True),
    Fault("a process is killed", signals("SIGKILL", 1), 8,
          r"process 1 was killed by SIGKILL .*; all processes were ended", [2], engine="zero2"),
    Fault("a process is killed", signals("SIGKILL", 0), -9, "", [2], 1, "single"),
    Fault("a process is killed", signals("SIGKILL", 0), 8, "process 0 was killed by SIGKILL", [2], engine="zero3"),
    Fault("a process crashes (SIGSEGV)", signals("SIGSEGV", 1), 8, "process 1 was killed by SIGSEGV", [2]),
    Fault("a process is halted (SIGSTOP)", signals("SIGSTOP", 1), 1,
          "process 0 made no progress for --hang_timeout seconds", [2], engine="zero2", changes={"hang_timeout": 4}),
    Fault("a process hangs", [{"kind": "hang", "rank": 0, "step": 3}], 1,
          r"inject.py.*\n[\s\S]*process 0 made no progress for --hang_timeout seconds", [2],
          changes={"hang_timeout": 4}),
    Fault("the only process hangs", [{"kind": "hang", "step": 3}], 1, r"Timeout \(0:00:04\)!\n[\s\S]*inject.py", [2], 1,
          "single", {"hang_timeout": 4}),
    Fault("a process hangs before the first step", [{"kind": "hang_before_start", "rank": 1}], 1,
          "process [01] made no progress for --hang_timeout seconds", [], changes={"hang_timeout": 4}),
    Fault("an unexpected error in one process", [{"kind": "fail", "rank": 1, "step": 3, "message": "no such luck"}], 1,
          r"Last words of process 1:\n[\s\S]*RuntimeError: no such luck", [2], engine="zero2"),
    Fault("one device has less memory than the others", [{"kind": "report_memory", "rank": 1, "size": 1}], 0,
          "2 language and 2 vision layers computed twice", [4, 6], engine="fsdp2"),
    Fault("one loss is NaN on one process", [{"kind": "spoil_loss", "rank": 1, "steps": [3], "value": "nan"}], 0,
          r"step 3 is skipped, no weight changed: the loss of these records is not finite: 'r\d'", [4, 6], exact=False,
          engine="zero2"),
    Fault("one loss is NaN on one process", [{"kind": "spoil_loss", "rank": 0, "steps": [3], "value": "inf"}], 0,
          "step 3 is skipped", [4, 6], exact=False, engine="fsdp2"),
    Fault("three losses in a row are infinite", [{"kind": "spoil_loss", "rank": 1, "steps": [3, 4, 5], "value": "inf"}],
          5, "3 steps in a row, up to step 5, were not finite", [2, 4], exact=False),
    Fault("three losses in a row are infinite", [{"kind": "spoil_loss", "steps": [3, 4, 5], "value": "inf"}], 5,
          "3 steps in a row, up to step 5, were not finite", [2, 4], 1, "single", exact=False),
    Fault("gradients are infinite, losses are not", [{"kind": "spoil_gradient", "rank": 0, "steps": [3, 4, 5]}], 5,
          "the gradient of these records is not finite", [2, 4], exact=False, engine="zero3"),
    Fault("gradients are infinite, losses are not", [{"kind": "spoil_gradient", "rank": 0, "steps": [3, 4, 5]}], 5,
          "the gradient of these records is not finite", [2, 4], exact=False, engine="zero2"),
    Fault("a weight becomes infinite before a save", [{"kind": "spoil_weight", "step": 4}], 5,
          "1 weights are not finite, e.g. .*; nothing was saved", [2]),
    Fault("the disk is full at a save", [{"kind": "fail_to_write", "rank": 1, "save": 2}], 7,
          r"could not be written \(No space left on device; it takes .* MB, .* MB are free\)", [2], engine="zero2"),
    Fault("the disk is full at a save", [{"kind": "fail_to_write", "rank": 0, "save": 1}], 7,
          "There is no older checkpoint", [], 1, "single"),
    Fault("the disk has too little room for a save", [{"kind": "report_little_room", "save": 2}], 7,
          r"no room for a checkpoint: .*needs [0-9.,]+ MB, the disk has 1.0 KB free.*checkpoint-2 and older ones", [2]),
    Fault("a save takes longer than the hang timeout", [{"kind": "save_slowly", "rank": 0, "save": 2, "seconds": 6}], 0,
          "", [4, 6], engine="zero2", changes={"hang_timeout": 4}),
    Fault("killed during a save", [{"kind": "kill_in_save", "rank": 0, "save": 2, "event": 9}], 8,
          "process 0 was killed by SIGKILL", [2], engine="zero2"),
    Fault("killed during a save", [{"kind": "kill_in_save", "rank": 1, "save": 2, "event": 1}], 8,
          "process 1 was killed by SIGKILL", [2]),
    Fault("killed after a save, before it has its name", [{"kind": "kill_in_save", "rank": 0, "save": 2, "event": 20}],
          -9, "", [2], 1, "single"),
    Fault("killed while the result is put in place", [{"kind": "kill_in_final", "rank": 0}], -9, "", [4, 6], 1,
          "single"),
    Fault("the GPU runs out of memory", [{"kind": "run_out_of_memory", "rank": 1, "step": 3}], 6,
          r"a step does not fit into memory[\s\S]*keeps the global batch of 4[\s\S]*1. --device_batch_size 1 "
          r"[\s\S]*2. --gradient_checkpointing full[\s\S]*ENGINE=zero2", [2],
          changes={"device_batch_size": 2}),
    Fault("the kernel kills a data worker", [{"kind": "kill_worker", "step": 3}], 6,
          "Lower --dataloader_workers", [2], 1, "single", {"dataloader_workers": 1}),
    Fault("an image is damaged after the check", [{"kind": "damage_image", "rank": 1, "step": 3}], 2,
          "the image is damaged|cannot be read|no image", [2], exact=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Outputs of uninterrupted runs, by processes, engine and settings."""
    outputs = {}

    def get(fault: Fault):
        changes = {name: value for name, value in fault.changes.items() if name != "hang_timeout"}
        key = (fault.processes, fault.engine, str(changes))
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("whole") / "out"
            if fault.processes == 1:  # here, without the seconds in which another process loads its libraries
                train.main(train_flags(world, outputs[key], **{**RECIPE, **changes}, engine=fault.engine))
            else:
                result = run(world, outputs[key], fault.processes, engine=fault.engine, **changes)
                assert result.code == 0, result.output
        return outputs[key]

    return get


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault.fast else pytest.mark.long, id=str(fault)) for fault in FAULTS]
)
def test_a_fault_ends_as_it_should(world, whole, tmp_path, capfd, fault):
    out = tmp_path / "out"
    result = run(world, out, fault.processes, fault.faults, engine=fault.engine, **fault.changes)

    assert result.code == fault.code, result.output
    assert re.search(fault.message, strip_settings(result.output)), result.output
    assert find_processes(out) == []
    assert list_whole_checkpoints(out) == fault.left
    if fault.code == 0:
        # Of six steps; one that is skipped has none.
        assert len(read_losses(out)) == 6 - ("is skipped" in fault.message)
        return

    if fault.processes == 1:  # as in `whole`
        start = {"resume_from_checkpoint": "latest"} if fault.left else {}
        train.main(train_flags(world, out, **{**RECIPE, **fault.changes}, engine=fault.engine, **start))
        said = capfd.readouterr().out
    else:
        again = go_on(world, out, fault.processes, engine=fault.engine, **fault.changes)
        assert again.code == 0, again.output
        said = again.output
    if fault.left:
        assert f"continuing from {out}/checkpoint-{fault.left[-1]}" in said
    assert list_whole_checkpoints(out) == [4, 6] and not list(out.glob(".*"))
    if fault.exact:
        assert weights_equal(out, whole(fault))
        assert len(read_losses(out)) == 6


def test_the_catalogue_is_as_large_as_was_promised():
    assert len({fault.name for fault in FAULTS}) >= 20 and len(FAULTS) >= 30


def test_the_documents_list_every_fault():
    documented = {
        line.split("|")[1].strip()
        for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
        if "|" in line
    }
    assert {fault.name for fault in FAULTS} <= documented


def test_no_secret_is_said_or_written(world, tmp_path, monkeypatch, capfd):
    """Tokens stand in the environment of a run that trains, and of one that goes on from its checkpoint."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"CANARY_{name}")
    out = tmp_path / "out"
    flags = train_flags(world, out, **RECIPE, engine="single", report_to="tensorboard")
    train.main(flags)
    (out / "run_record.json").unlink()
    train.main([*flags, "--resume_from_checkpoint", "latest"])
    output = "".join(capfd.readouterr())
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(b"CANARY" in path.read_bytes() for path in written)
    assert "continuing from" in output and "CANARY" not in output


def test_our_code_never_runs_what_it_loads():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
    files += [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("configs/**/*.*")]
    assert len(files) > 100
    forbidden = ["weights_only" + "=False", "trust_remote_code" + "=True"]
    assert [path for path in files for text in forbidden if text in path.read_text(encoding="utf-8")] == []


def test_no_folder_is_loaded_without_a_word_about_its_code():
    """Without one transformers asks on a terminal, and runs it after a `y`."""
    files = [path for pattern in ("*.py", "[!.t]*/**/*.py") for path in ROOT.glob(pattern)]
    calls = [
        (path.name, ast.unparse(call))
        for path in files
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(call.func))
    ]
    assert len(calls) > 10
    said = re.compile(r"\*\*(LOCALLY|NO_CODE)|trust_remote_code=False")
    assert [call for call in calls if not said.search(call[1])] == []


def test_no_library_fetches_code_from_a_hub(tmp_path):
    """bitsandbytes does as it is imported, on CPUs that have bf16, where the package kernels is installed."""
    (tmp_path / "kernels.py").write_text("print('fetched')\n")
    program = "import meme_llava, peft\ntry:\n    import kernels\nexcept ImportError:\n    print('none')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("none\n", "")
