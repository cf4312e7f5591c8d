"""Which processor the work runs on, set up to give the same bytes every time."""

import os
from importlib.util import find_spec

import torch

from ddpm.params import UserError


def select_device(name: str, tf32: bool = True) -> torch.device:
    """The device called `name` ("auto": CUDA, else Apple's MPS, else the CPU), with or without TF32 on CUDA.

    Raises UserError where the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"runtime.device: {name!r}, but PyTorch sees no CUDA device here; use auto or cpu")
        if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
            raise UserError(
                f"runtime.device: {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0"
            )
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        # the same bytes every time: no kernels that add in an order of their own
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: 'mps', but PyTorch sees no Apple GPU here; use auto or cpu")
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether compiling pays there and can be done: on CUDA, with the compiler that torch.compile needs for it."""
    return device.type == "cuda" and find_spec("triton") is not None
