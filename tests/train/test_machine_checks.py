"""What a machine cannot do is said before a run: GPUs that torch cannot use, bf16 that is only emulated."""

import pytest
import torch
from conftest import train_flags

from meme_llava.distributed.launch import make_environments
from meme_llava.errors import UserError
from meme_llava.inference.generation import choose_dtype
from meme_llava.train.session import check_device, choose_bf16
from meme_llava.train.settings import parse_train_arguments


def test_gpus_that_torch_cannot_use_do_not_leave_a_run_to_the_cpu(world, tmp_path, monkeypatch):
    arguments = parse_train_arguments(train_flags(world, tmp_path), "")
    check_device(arguments)
    # NVML counts what the driver shows; CUDA of that driver is too old for torch.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"has 2 GPU\(s\), but torch .*, made for CUDA 13.0, cannot use them"):
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
