"""Which processor the work runs on, set up to give the same bytes every time."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from ddpm.errors import UserError

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in what PyTorch raises


def select_device(name: str, tf32: bool = True, deterministic: bool = True) -> torch.device:
    """The device called `name` ("auto": CUDA, else Apple's MPS, else the CPU), with or without TF32 on CUDA.

    `deterministic`: on CUDA, only with kernels that give the same bytes every time. Raises UserError where the machine has
    no such device, or this process is to share it with others.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and name.startswith("cuda"):  # one of several processes, each on a GPU of its own
        if name != "cuda":
            raise UserError(f"runtime.device: {name!r}, but several processes can't share it; use cuda, or one process")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"runtime.device: {name!r}, but PyTorch sees no CUDA device here; use auto or cpu")
        if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
            raise UserError(
                f"runtime.device: {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # or what is pinned, for one, would take memory of cuda:0
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic algorithms
        torch.use_deterministic_algorithms(deterministic)  # no kernels that add in an order of their own
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not deterministic
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: 'mps', but PyTorch sees no Apple GPU here; use auto or cpu")
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether compiling pays there and can be done: on CUDA, with Triton, and what Triton compiles its launcher with."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian has the headers
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None and headers.exists()


@contextmanager
def enough_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raise UserError that ends in `remedy` where the work inside takes more memory than the device has."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in NO_MEMORY):
            raise
        raise UserError(f"{device} is out of memory; {remedy}") from None
