"""train.py with a fault: python tests/faults/inject.py <flags of train.py>, or the same under a launcher

FAULTS in the environment is a JSON list of {"kind": a function of this file, "rank": the process that it strikes, …}.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402

import train  # noqa: E402
from meme_llava.distributed.environment import (
    find_rank,  # noqa: E402
    run_and_leave,  # noqa: E402
)
from meme_llava.storage import tensor_writer  # noqa: E402
from meme_llava.train import (
    checkpoints,  # noqa: E402
    optimizer_state,  # noqa: E402
    prepared_run,  # noqa: E402
    run_plan,  # noqa: E402
)
from meme_llava.train.loop import TrainingLoop  # noqa: E402
from meme_llava.train.session import StepGuard  # noqa: E402


def before_step(step: int, act, every: bool = False) -> None:
    """Call `act(loop)` when the computation of an optimizer step begins, or of every device batch."""
    original = TrainingLoop._compute_loss
    waiting = [step]

    def compute_loss(self, *arguments):
        if every or [self.step + 1] == waiting:
            waiting.clear()
            act(self)
        return original(self, *arguments)

    TrainingLoop._compute_loss = compute_loss


def slow(seconds: float) -> None:
    """Every device batch takes longer."""
    before_step(0, lambda loop: time.sleep(seconds), every=True)


def signal_self(step: int, number: str) -> None:
    """A signal reaches this process alone; SIGKILL is a process that dies, SIGSTOP one that halts."""
    before_step(step, lambda loop: os.kill(os.getpid(), getattr(signal, number)))


def signal_job(step: int, number: str) -> None:
    """A signal reaches this process and all that it started, as a scheduler sends it: from outside, for torch's data
    workers end without an error when it comes from their parent."""
    command = ["kill", "-s", number, "--", f"-{os.getpgid(0)}"]
    before_step(step, lambda loop: subprocess.run(command, check=True, start_new_session=True))


def hang(step: int) -> None:
    """This process waits for something that never comes."""
    before_step(step, lambda loop: time.sleep(100_000))


def fail(step: int, message: str) -> None:
    """An error that nobody expected."""

    def act(loop):
        raise RuntimeError(message)

    before_step(step, act)


def run_out_of_memory(step: int) -> None:
    """The device has no room for the step."""

    def act(loop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")

    before_step(step, act)


def spoil_loss(steps: list[int], value: str) -> None:
    """The loss of some steps is not finite."""
    original, running = StepGuard.mark_loss, [0]
    before_step(0, lambda loop: running.__setitem__(0, loop.step + 1), every=True)

    def mark_loss(self, loss):
        return original(self, loss * float(value) if running[0] in steps else loss)

    StepGuard.mark_loss = mark_loss


def spoil_gradient(steps: list[int]) -> None:
    """Losses are finite, a gradient is not."""

    def act(loop):
        if loop.step + 1 in steps:
            name, parameter = next((n, p) for n, p in loop._model.named_parameters() if p.requires_grad)
            handles = [parameter.register_hook(lambda gradient: handles.pop().remove() or gradient * float("inf"))]

    before_step(0, act, every=True)


def spoil_weight(step: int) -> None:
    """A weight becomes infinite in memory, as a broken device makes it."""

    def act(loop):
        next(p for p in loop._model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")

    before_step(step, act)


def kill_in_save(save: int, event: int) -> None:
    """This process dies while it writes its `save`-th checkpoint, when the `event`-th thing reaches the disk.

    A save of one process brings to the disk: 9 files, the folder, the parent; before and behind each, for the manifest
    comes to the disk by itself.
    """
    saves, events = [0], [0]
    original_write, original_sync = checkpoints.write_checkpoint, checkpoints.fsync_path

    def write_checkpoint(*arguments):
        saves[0] += 1
        events[0] = 0
        return original_write(*arguments)

    def count():
        if saves[0] == save:
            events[0] += 1
            if events[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    def fsync_path(path):
        count()
        original_sync(path)
        count()

    checkpoints.fsync_path = fsync_path
    sys.modules["meme_llava.train.loop"].write_checkpoint = write_checkpoint


def fail_to_write(save: int) -> None:
    """The disk is full when this process writes optimizer state of its `save`-th checkpoint."""
    saves = [0]
    original = optimizer_state.write_file

    def write_file(path, planned):
        saves[0] += 1
        if saves[0] == save:
            path.write_bytes(b"begun")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, planned)

    optimizer_state.write_file = write_file


def save_slowly(save: int, seconds: float) -> None:
    """The disk takes its time with this process's part of its `save`-th checkpoint."""
    saves, original = [0], TrainingLoop._write_files

    def write_files(self, folder):
        saves[0] += 1
        if saves[0] == save:
            time.sleep(seconds)
        return original(self, folder)

    TrainingLoop._write_files = write_files


def report_little_room(save: int) -> None:
    """The disk's owner says that there is no room before the `save`-th checkpoint."""
    asked = [0]
    original = tensor_writer.shutil.disk_usage

    def disk_usage(path):
        asked[0] += 1
        usage = original(path)
        # It is asked once for all of them before the first step.
        return usage if asked[0] <= save else usage._replace(free=1000)

    tensor_writer.shutil = SimpleNamespace(disk_usage=disk_usage)


def kill_in_final() -> None:
    """This process dies when the first file of the run's result is in place."""
    original = Path.replace

    def replace(self, target):
        original(self, target)
        if self.parent.name == checkpoints.FINAL_INCOMPLETE != Path(target).parent.name:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = replace


def kill_worker(step: int) -> None:
    """The kernel, short of memory, kills a process that reads images."""

    def act(loop):
        for child in psutil.Process().children():
            child.kill()

    before_step(step, act)


def damage_image(step: int) -> None:
    """Images that were sound at the start are cut off when training comes to them."""
    original, running = TrainingLoop.train, [0]
    before_step(0, lambda loop: running.__setitem__(0, loop.step + 1), every=True)

    def train(self):
        dataset = self._plan.data.dataset
        read = dataset.read_image

        def read_image(path):
            if running[0] >= step - 1:
                raise ValueError(f"{path}: the image is damaged")
            return read(path)

        dataset.read_image = read_image
        return original(self)

    TrainingLoop.train = train


def compute_in_bf16() -> None:
    """No fault: what a GPU does by itself, and a CPU only slowly."""
    prepared_run.choose_bf16 = lambda arguments: True


def report_memory(size: int) -> None:
    """This process's device has only so many bytes."""
    prepared_run.measure_memory = lambda device, processes: size


def refuse_whole_moves() -> None:
    """No fault: a device on which the whole model has no room."""
    original = torch.nn.Module.to

    def to(self, *arguments, **options):
        if isinstance(self, PeftModel) and any(parameter.numel() for parameter in self.parameters()):
            raise torch.OutOfMemoryError("the whole model was moved at once")
        return original(self, *arguments, **options)

    torch.nn.Module.to = to


def hang_before_start() -> None:
    """This process gets stuck before the first step."""
    run_plan.load_processing = lambda *arguments: time.sleep(100_000)


def main() -> None:
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        kind, rank = fault.pop("kind"), fault.pop("rank", None)
        if rank is None or rank == find_rank():
            globals()[kind](**fault)
    train.main(sys.argv[1:])


if __name__ == "__main__":
    run_and_leave(main)
