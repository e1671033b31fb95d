"""What this machine's GPU or CPU must have for a run, found in seconds: neither a model nor transformers is loaded."""

import importlib.util
import os
import shutil

import torch

from meme_llava.distributed.environment import count_processes
from meme_llava.errors import UserError
from meme_llava.model.packed_attention import choose_attention, gpu_multiplies_bf16, multiplies_bf16
from meme_llava.train.settings import TrainArguments


def choose_bf16(arguments: TrainArguments) -> bool:
    """Whether steps compute in bf16 here. Raises UserError for a precision that this machine does not have."""
    precision, has_gpu = arguments.precision, torch.cuda.is_available()
    if precision == "bf16" and not has_gpu and multiplies_bf16():
        return True
    if precision in ("bf16", "tf32") and not has_gpu:
        reasons = {
            "bf16": "on a CPU without AMX or AVX512_BF16 it is several times slower than fp32",
            "tf32": "no CPU has it",
        }
        raise UserError(f"--precision {precision} needs a GPU here: {reasons[precision]}")
    if precision in ("auto", "bf16") and has_gpu and not gpu_multiplies_bf16():
        raise UserError("this GPU has no bf16; pass --precision fp32 (fp16 overflows with Qwen2)")
    return precision in ("auto", "bf16") and has_gpu


def check_gpus_answer() -> None:
    """Raise UserError where the driver shows GPUs that torch cannot compute on; a run would go on on the CPU."""
    if torch.cuda.is_available() or torch.cuda.device_count() == 0:
        return
    raise UserError(
        f"this machine has {torch.cuda.device_count()} GPU(s), but torch {torch.__version__}, made for CUDA "
        f"{torch.version.cuda}, cannot use them; most often the driver is older than that (nvidia-smi shows it). "
        "Install a newer driver, or a torch for an older CUDA; with CUDA_VISIBLE_DEVICES= (run.sh: GPUS=cpu) the CPU "
        "is used."
    )


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless layers can be compiled for this device."""
    if device.type == "cuda":
        missing = None if importlib.util.find_spec("triton") else "the package triton"
    else:
        compiler = os.environ.get("CXX", "g++")
        missing = None if shutil.which(compiler) else f"a C++ compiler, and there is no {compiler}"
    if missing:
        raise UserError(f"--torch_compile needs {missing}; install it, or leave the flag out")


def check_device(arguments: TrainArguments) -> None:
    """Raise UserError if this machine lacks what the settings ask of it."""
    check_gpus_answer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_attention(arguments.attention, device, choose_bf16(arguments))
    if arguments.torch_compile:
        check_compiler(device)


def check_no_gpu_idles() -> None:
    """Raise UserError where one process trains and sees several GPUs."""
    if torch.cuda.device_count() > 1 and count_processes() == 1:
        raise UserError(
            f"one process sees {torch.cuda.device_count()} GPUs; start one process a GPU, as run.sh does, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
