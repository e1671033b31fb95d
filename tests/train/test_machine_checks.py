"""What a machine cannot do is said before a run: GPUs that torch cannot use, bf16 that is only emulated."""

from types import SimpleNamespace

import pytest
import torch
from conftest import train_flags

from meme_llava.distributed.environment import choose_engine
from meme_llava.distributed.launch import make_environments
from meme_llava.distributed.processes import take_own_gpu
from meme_llava.errors import ProcessError, UserError
from meme_llava.inference.generation import choose_dtype
from meme_llava.train import session
from meme_llava.train.session import check_device, check_shared_memory, choose_bf16, list_ways_out
from meme_llava.train.settings import parse_train_arguments


def test_gpus_that_torch_cannot_use_do_not_leave_a_run_to_the_cpu(world, tmp_path, monkeypatch):
    arguments = parse_train_arguments(train_flags(world, tmp_path), "")
    check_device(arguments)
    # NVML counts what the driver shows; CUDA of that driver is too old for torch.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"has 2 GPUs, but torch .*, made for CUDA 13.0, cannot use them"):
        check_device(arguments)


def test_a_gpu_that_only_emulates_bf16_has_none(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for precision in ("auto", "bf16"):
        with pytest.raises(UserError, match="this GPU has no bf16; pass --precision fp32"):
            choose_bf16(parse_train_arguments(train_flags(world, tmp_path, precision=precision), ""))
    assert choose_dtype("auto", torch.device("cuda")) == torch.float32


def test_threads_are_divided_from_the_cores_that_a_job_was_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    environments = make_environments(nodes=1, node=0, processes=2, address="127.0.0.1", port=29500)
    assert [environment["OMP_NUM_THREADS"] for environment in environments.values()] == ["3", "3"]


def test_each_process_takes_its_own_gpu_or_says_that_there_is_none(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for local_rank in ("1", "2"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        if local_rank == "2":
            with pytest.raises(ProcessError, match="process 2 on a machine with 2 GPUs"):
                take_own_gpu()
        else:
            take_own_gpu()
    assert taken == [1]


def test_too_little_shared_memory_for_workers_is_said_before_they_start(monkeypatch):
    """Docker gives 64 MB; 8 images of 336 x 336 take 2.7 MB, eight processes with two workers hold 64 batches."""
    batch = {"pixel_values": torch.zeros((8, 3, 336, 336), dtype=torch.uint8), "max_seqlen_q": 700}
    monkeypatch.setattr(session.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(session, "SHARED_MEMORY", session.Path("/"))
    check_shared_memory(batch, workers=2)  # one process: 22 MB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_shared_memory(batch, workers=0)
    with pytest.raises(UserError, match=r"has 67 MB free, and .* up to 173 MB. .* --ipc=host"):
        check_shared_memory(batch, workers=2)


@pytest.mark.parametrize(
    ("engine", "processes", "on_gpu", "engines"),
    [
        ("single", 1, True, ["zero2_offload"]),
        ("single", 1, False, []),
        ("ddp", 2, True, ["zero2", "zero3", "zero2_offload"]),
        ("ddp", 2, False, ["zero2", "zero3"]),
        ("zero2", 2, True, ["zero3", "zero2_offload"]),
        ("zero2_offload", 2, True, ["zero3"]),
        ("zero3", 2, True, ["zero3_offload"]),
        ("fsdp2", 2, True, ["zero3_offload"]),
        ("zero3_offload", 2, True, []),
    ],
)
def test_out_of_memory_only_engines_that_take_less_are_advised(
    world, tmp_path, monkeypatch, engine, processes, on_gpu, engines
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    session = SimpleNamespace(engine=choose_engine(engine, processes, on_gpu), processes=processes)
    ways = list_ways_out(parse_train_arguments(train_flags(world, tmp_path), ""), session)
    assert [way.removeprefix("ENGINE=").partition(":")[0] for way in ways if way.startswith("ENGINE=")] == engines
