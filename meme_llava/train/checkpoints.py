"""The checkpoints of a run: each whole or absent, kept while it is needed, found when a run goes on.

All processes write `.checkpoint-N.incomplete` together; when everything is on the disk its manifest is written, and it
becomes `checkpoint-N`. Older ones go only after the new one was read back. `storage.run_record.verify_directory` proves
one whole.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from meme_llava.distributed.processes import any_process, broadcast_from_main, gather
from meme_llava.errors import CheckpointError, DiskFullError, UserError, count, is_disk_full
from meme_llava.storage.files import fsync_path, lock
from meme_llava.storage.run_record import (
    MANIFEST,
    describe_file,
    list_checkpoints,
    read_step,
    verify_directory,
    write_manifest,
)
from meme_llava.storage.tensor_writer import check_free_space
from meme_llava.terminal import format_bytes

INCOMPLETE = ".checkpoint-{}.incomplete"
FINAL_INCOMPLETE = ".final.incomplete"
CORRUPT_SUFFIX = ".passed_over"
# What a checkpoint holds besides tensors: tokenizer, processor, records, the log so far.
SIDECAR_BYTES = 50_000_000
# Worker processes of a killed run live on for a few seconds, and its lock with them.
LOCK_PATIENCE_SECONDS = 15


def find_newest(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, every byte of it read. What is passed over is named with its reason, and put
    aside under another name when the run goes on."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            verify_directory(checkpoint)
            return checkpoint
        except CheckpointError as error:
            print(f"passed over {checkpoint.name}: {error}", flush=True)
    return None


def archive_newer_checkpoints(output_dir: Path, step: int) -> None:
    """Rename checkpoints newer than the step that a run goes on from; their names will be needed."""
    for newer in list_checkpoints(output_dir):
        if read_step(newer) > step:
            aside = newer.with_name(newer.name + CORRUPT_SUFFIX)
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            print(f"{newer.name} is kept as {aside.name}; delete it when you need it no more", flush=True)


def check_room(output_dir: Path, tensor_bytes: int, saves: int, keep: int) -> None:
    """Raise DiskFullError unless the checkpoints that a run is still to write, and its result, find room.

    Args:
        tensor_bytes: what a checkpoint's tensors take.
        saves: how many checkpoints are to come.
        keep: how many of the newest checkpoints stay.
    """
    there = len(list_checkpoints(output_dir))
    # The oldest goes only after a new one was read back. The result is a checkpoint without moments, at most half.
    most, kept = min(max(keep, there) + 1, there + saves), min(keep, there + saves)
    needed = max(most * tensor_bytes, kept * tensor_bytes + tensor_bytes // 2) - there * tensor_bytes + SIDECAR_BYTES
    try:
        check_free_space(output_dir, needed)
    except DiskFullError as error:
        raise DiskFullError(
            f"no room for the run: {count(most, 'checkpoint')} of {format_bytes(tensor_bytes)} are there at one time, "
            f"{there} of them now, and the result is added. {error}"
        ) from error


def write_checkpoint(
    output_dir: Path,
    step: int,
    tensor_bytes: int,
    write_files: Callable[[Path], Sequence[Path]],
    make_manifest_metadata: Callable[[], Mapping],
    keep: int,
) -> None:
    """Write a checkpoint; all processes call this together. Raises UserError, the same in every process, where it could
    not be written; older checkpoints are untouched then.

    Args:
        tensor_bytes: what its tensors take.
        write_files: writes this process's files into a folder and returns them.
        make_manifest_metadata: what the manifest says besides the files; called in the main process.
        keep: how many of the newest checkpoints stay.
    """
    folder = output_dir / INCOMPLETE.format(step)
    broadcast_from_main(lambda: _make_room(output_dir, folder, tensor_bytes + SIDECAR_BYTES))
    own, error = {}, None
    try:
        for path in write_files(folder):
            fsync_path(path)
            own[path.name] = describe_file(path)
    except (OSError, UserError) as failure:
        error = failure
    if any_process(error is not None):
        broadcast_from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        problem = next(found for found in gather(_to_user_error(error, folder, tensor_bytes)) if found is not None)
        problem.is_common = True
        raise problem
    files = {name: described for of_process in gather(own) for name, described in of_process.items()}
    checkpoint = output_dir / f"checkpoint-{step}"
    broadcast_from_main(lambda: _complete(folder, checkpoint, files, make_manifest_metadata(), keep))


def _make_room(output_dir: Path, folder: Path, needed: int) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in (*output_dir.glob(INCOMPLETE.format("*")), output_dir / FINAL_INCOMPLETE):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        check_free_space(output_dir, needed)
    except DiskFullError as error:
        raise DiskFullError(f"no room for a checkpoint: {error} {_describe_kept(output_dir)}") from error
    folder.mkdir()


def _to_user_error(error: OSError | UserError | None, folder: Path, needed: int) -> UserError | None:
    if error is None or isinstance(error, UserError):
        return error
    reason = error.strerror or str(error)
    if is_disk_full(error):
        free = shutil.disk_usage(folder.parent).free
        reason += f"; it takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    return (DiskFullError if is_disk_full(error) else UserError)(
        f"{folder}: the checkpoint could not be written ({reason}). Free some room or fix the disk, then start the "
        f"same command again. {_describe_kept(folder.parent)}"
    )


def _describe_kept(output_dir: Path) -> str:
    kept = list_checkpoints(output_dir)
    return f"{kept[-1].name} and older ones are untouched." if kept else "There is no older checkpoint."


def _complete(folder: Path, checkpoint: Path, files: Mapping, facts: Mapping, keep: int) -> None:
    write_manifest(folder, files, facts)
    fsync_path(folder)
    if checkpoint.exists():  # a damaged one that nobody could put aside
        shutil.rmtree(checkpoint)
    folder.rename(checkpoint)
    fsync_path(checkpoint.parent)
    verify_directory(checkpoint)
    _delete_older(checkpoint.parent, keep)


def _delete_older(output_dir: Path, keep: int) -> None:
    for older in list_checkpoints(output_dir)[:-keep]:
        # Under another name first: half of a checkpoint must not look like one.
        removed = older.with_name(INCOMPLETE.format(read_step(older)))
        older.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def write_final(output_dir: Path, checkpoint: Path, names: Sequence[str], last: str, keep: int) -> None:
    """Put the final files of a run, `names` of its last checkpoint, beside its checkpoints; only the main process. The
    one called `last`, which says that all are there, appears last. The `keep` newest checkpoints stay."""
    folder = output_dir / FINAL_INCOMPLETE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for name in names:
            shutil.copyfile(checkpoint / name, folder / name)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _to_user_error(error, folder, SIDECAR_BYTES) from error
    write_manifest(folder, {name: describe_file(folder / name) for name in names}, {"copied_from": checkpoint.name})
    for name in names:
        fsync_path(folder / name)
    for name in (*(name for name in names if name != last), MANIFEST, last):
        (folder / name).replace(output_dir / name)
    folder.rmdir()
    # A run that was killed right after its last checkpoint has not come to it.
    _delete_older(output_dir, keep)
    fsync_path(output_dir)


@contextlib.contextmanager
def hold_output_dir(output_dir: Path) -> Iterator[None]:
    """Keep other runs off the directory, and see that all processes write to the same one. Raises UserError where
    another run writes it, or a machine does not share it."""
    with contextlib.ExitStack() as held, contextlib.ExitStack() as probe:

        def take() -> str:
            output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(output_dir, LOCK_PATIENCE_SECONDS))
            return Path(probe.enter_context(NamedTemporaryFile(prefix=".shared-", dir=output_dir)).name).name

        name = broadcast_from_main(take)
        if any_process(not (output_dir / name).exists()):
            raise UserError(
                f"{output_dir}: not every machine sees the same folder there. Checkpoints are written by all of them "
                "together; put OUTPUT_DIR on storage that they share."
            )
        probe.close()
        yield
