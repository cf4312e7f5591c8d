"""The device that the work runs on: chosen, set up to give the same bytes every time, and checked for too little memory."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from ddpm.errors import UserError

MEMORY_ERRORS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in PyTorch's messages


def select_device(name: str, tf32: bool = True, deterministic: bool = True) -> torch.device:
    """The device called `name`; "auto" is CUDA if there is a CUDA device, else Apple's MPS, else the CPU.

    On CUDA: `tf32` allows TF32 in matrix products and convolutions, and `deterministic` only kernels that give the same bytes
    every time. Raises UserError if the machine has no such device, or if several processes would have to share it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and name.startswith("cuda"):  # one of several processes, each with its own GPU
        if name != "cuda":
            raise UserError(f"runtime.device: {name!r}, but several processes can't share it; use cuda, or one process")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda"):
        _set_up_cuda(name, tf32, deterministic)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: 'mps', but PyTorch sees no Apple GPU here; use auto or cpu")
    return torch.device(name)


def _set_up_cuda(name: str, tf32: bool, deterministic: bool) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"runtime.device: {name!r}, but PyTorch sees no CUDA device here; use auto or cpu")
    count = torch.cuda.device_count()
    if name.startswith("cuda:"):
        if int(name[5:]) >= count:
            raise UserError(f"runtime.device: {name!r}, but this machine has {count} CUDA devices, from cuda:0")
        torch.cuda.set_device(name)  # otherwise pinning memory, for example, would take memory on cuda:0
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
    torch.use_deterministic_algorithms(deterministic)  # no kernels that add in varying order
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile is worth it and works there: on CUDA, with Triton, a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's scheme for its headers
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None and headers.exists()


def free_memory(device: torch.device) -> int:
    """Bytes that a program could still take on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@contextmanager
def enough_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raise UserError, ending with `remedy`, if the block takes more memory than the device has."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in MEMORY_ERRORS):
            raise
        raise UserError(f"{device} ran out of memory; {remedy}") from None
