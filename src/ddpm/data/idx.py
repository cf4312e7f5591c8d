"""MNIST's file format, IDX: a header with the shape of an array, and the array's bytes.

LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

import math
import warnings
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import UserError

CREATE, RECREATE = "`python src/download.py` creates it", "`python src/download.py` recreates it"
TRAIN, TEST = "train", "t10k"  # how the names of the files begin


def map_idx(path: Path) -> Tensor:
    """The array in a file of MNIST's format, uint8. Its bytes are read from the file when they are indexed.

    Raises UserError if the file is missing, has another format, or another length than its header says.
    """
    try:
        with path.open("rb") as file:
            shape = read_header(file)
        if shape is None or path.stat().st_size != len(idx_header(shape)) + math.prod(shape):
            raise UserError(f"{path}: corrupt, or not in MNIST's format; {RECREATE}")
        array = np.memmap(path, np.uint8, "r", offset=len(idx_header(shape)), shape=shape)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {CREATE}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    with warnings.catch_warnings(action="ignore"):  # PyTorch warns that the array can't be written to
        return torch.from_numpy(array)


def read_header(file: BufferedIOBase) -> tuple[int, ...] | None:
    """The shape in the header of a file, which is then read up to the array; None if it isn't in MNIST's format."""
    start = file.read(4)
    if start[:3] != bytes([0, 0, 8]) or len(start) < 4 or not 1 <= start[3] <= 4:
        return None
    sizes = file.read(4 * start[3])
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))


def idx_header(shape: tuple[int, ...]) -> bytes:
    """The header of a file that holds a uint8 array of this shape."""
    return bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def idx_name(prefix: str, kind: str, shape: tuple[int, ...]) -> str:
    """The name of a file for an array of this shape: train-images-idx3-ubyte for TRAIN, "images" and (60_000, 28, 28)."""
    return f"{prefix}-{kind}-idx{len(shape)}-ubyte"
