"""Takes a user's data set that has the form of MNIST's four files."""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from ddpm.data.idx import TEST, TRAIN, idx_header, idx_name, read_header
from ddpm.errors import UserError
from ddpm.files import atomic, write_atomic

CHUNK = 1 << 20  # bytes
MIN_IMAGES = 10  # for training, and for testing


def take_mnist_files(folder: Path, raw: Path) -> list[str]:
    """Write the data set in `folder` to `raw`; returns the names of its classes, which are their numbers in MNIST's files.

    In `raw` the classes are numbered from 0, without gaps. Raises UserError if a file is missing, can't be read, or doesn't match
    the others.
    """
    labels, shapes = {}, {}
    for prefix in (TRAIN, TEST):
        labels[prefix] = _read_labels(folder, prefix)
        shapes[prefix] = _copy_images(folder, prefix, len(labels[prefix]), raw)
    if shapes[TRAIN] != shapes[TEST]:
        train, test = ("×".join(map(str, shapes[prefix])) for prefix in (TRAIN, TEST))
        raise UserError(f"{folder}: training images are {train}, test images {test}; they should be the same")
    numbers = np.unique(labels[TRAIN])
    if unknown := sorted(set(labels[TEST].tolist()) - set(numbers.tolist())):
        raise UserError(f"{folder}: label {unknown[0]} is in the test set, but not in the training set")
    for prefix in (TRAIN, TEST):
        write_labels(raw, prefix, np.searchsorted(numbers, labels[prefix]))
    return [str(number) for number in numbers]


def _read_labels(folder: Path, prefix: str) -> np.ndarray:
    """uint8 [N]"""
    with _open_idx(folder, prefix, "labels") as (path, file, shape):
        labels = np.frombuffer(b"".join(_chunks(path, file)), np.uint8)
        if len(shape) != 1 or len(labels) != shape[0]:
            raise UserError(f"{path}: corrupt, or not a list of labels")
    return labels


def _copy_images(folder: Path, prefix: str, count: int, raw: Path) -> tuple[int, ...]:
    """Copy a file of `count` images, chunk by chunk; returns the shape of one image, (H, H) or (H, H, 3)."""
    with _open_idx(folder, prefix, "images") as (path, file, shape):
        if len(shape) not in (3, 4) or shape[1] != shape[2] or shape[3:] not in ((), (3,)):
            raise UserError(f"{path}: its shape is {'×'.join(map(str, shape))}; images should be square, and grey or RGB")
        if shape[0] != count:
            raise UserError(f"{path}: {shape[0]} images, but there are {count} labels")
        if count < MIN_IMAGES:
            raise UserError(f"{path}: {count} images are too few; at least {MIN_IMAGES} are needed")
        with atomic(raw / idx_name(prefix, "images", shape)) as copy:
            copy.write(idx_header(shape))
            for chunk in _chunks(path, file):
                copy.write(chunk)
            if copy.tell() != len(idx_header(shape)) + math.prod(shape):
                raise UserError(f"{path}: corrupt: shorter or longer than its header says")
    return shape[1:]


@contextmanager
def _open_idx(folder: Path, prefix: str, kind: str) -> Iterator[tuple[Path, BufferedIOBase, tuple[int, ...]]]:
    """The path of a file, packed or not, the file opened after its header, and the shape in the header."""
    found = sorted(folder.glob(f"{prefix}-{kind}[-.]idx?-ubyte")) + sorted(folder.glob(f"{prefix}-{kind}[-.]idx?-ubyte.gz"))
    if not found:
        name = f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
        raise UserError(f"{folder}: has neither {name} nor {name}.gz")
    path = found[0]
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if (shape := read_header(file)) is None:
            raise UserError(f"{path}: not in MNIST's format")
        yield path, file, shape


def _chunks(path: Path, file: BufferedIOBase) -> Iterator[bytes]:
    with _reading(path):
        while chunk := file.read(CHUNK):
            yield chunk


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def write_labels(raw: Path, prefix: str, labels: np.ndarray) -> None:
    """Write labels [N], from 0 to 255, to their file in the folder `raw`."""
    header = idx_header((len(labels),))
    write_atomic(raw / idx_name(prefix, "labels", (len(labels),)), header + labels.astype(np.uint8).tobytes())
