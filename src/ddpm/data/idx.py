"""MNIST's file format, IDX: header and bytes."""

import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.files import write_atomic

AGAIN = "`python src/download.py` makes it"
TRAIN, TEST = "train", "t10k"  # what their names begin with


def map_idx(path: Path) -> Tensor:
    """The bytes in a file of MNIST's format as a uint8 tensor of the shape that it says; read where and when they are indexed.

    Raises UserError if the file is missing, of another format, or shorter or longer than it says.
    """
    try:
        with path.open("rb") as file:
            shape = read_header(file)
        if shape is None or path.stat().st_size != len(idx_header(shape)) + math.prod(shape):
            raise UserError(f"{path}: damaged, or not in MNIST's format; {AGAIN} anew")
        array = np.memmap(path, np.uint8, "r", offset=len(idx_header(shape)), shape=shape)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    with warnings.catch_warnings(action="ignore"):  # that it can't be written to; nobody does
        return torch.from_numpy(array)


def idx_name(prefix: str, kind: str, shape: tuple[int, ...]) -> str:
    return f"{prefix}-{kind}-idx{len(shape)}-ubyte"


def idx_header(shape: tuple[int, ...]) -> bytes:
    """What a file of bytes of that shape begins with (LeCun, Cortes and Burges, "The MNIST database")."""
    return bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def read_header(file: BinaryIO) -> tuple[int, ...] | None:
    """The shape that the open file begins with; None where it isn't in MNIST's format."""
    start = file.read(4)
    if start[:3] != bytes([0, 0, 8]) or len(start) < 4 or not 1 <= start[3] <= 4:
        return None
    sizes = file.read(4 * start[3])
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))


def write_labels(raw: Path, prefix: str, labels: np.ndarray) -> None:
    header = idx_header((len(labels),))
    write_atomic(raw / idx_name(prefix, "labels", (len(labels),)), header + labels.astype(np.uint8).tobytes())
