"""Takes a user's data set that has the form of MNIST's four files."""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from ddpm.data.idx import TEST, TRAIN, read_header
from ddpm.errors import UserError
from ddpm.sources.raw_files import MIN_IMAGES, Taken, write_images, write_labels


def take_mnist_files(folder: Path, raw: Path, size: int | None) -> Taken:
    """Write the data set in `folder` to `raw`, scaled to `size` if there is one. The names of classes are their numbers.

    In `raw` the classes are numbered from 0, without gaps. Raises UserError if a file is missing, can't be read, or doesn't match
    the others.
    """
    labels, shapes = {}, {}
    for prefix in (TRAIN, TEST):
        labels[prefix] = _read_labels(folder, prefix)
        shapes[prefix] = _copy_images(folder, prefix, len(labels[prefix]), raw, size)
    if shapes[TRAIN] != shapes[TEST]:
        train, test = ("×".join(map(str, shapes[prefix])) for prefix in (TRAIN, TEST))
        raise UserError(f"{folder}: training images are {train}, test images {test}; they should be the same")
    numbers = np.unique(labels[TRAIN])
    if unknown := sorted(set(labels[TEST].tolist()) - set(numbers.tolist())):
        raise UserError(f"{folder}: label {unknown[0]} is in the test set, but not in the training set")
    for prefix in (TRAIN, TEST):
        write_labels(raw, prefix, np.searchsorted(numbers, labels[prefix]))
    classes = [str(number) for number in numbers] if len(numbers) > 1 else []  # a single one tells nothing apart
    return Taken(classes, shapes[TRAIN], len(labels[TRAIN]), len(labels[TEST]), ["taken from files in MNIST's format"])


def _read_labels(folder: Path, prefix: str) -> np.ndarray:
    """uint8 [N]"""
    with _open_idx(folder, prefix, "labels") as (path, file, shape):
        labels = np.frombuffer(file.read(), np.uint8)
        if len(shape) != 1 or len(labels) != shape[0]:
            raise UserError(f"{path}: corrupt, or not a list of labels")
    return labels


def _copy_images(folder: Path, prefix: str, count: int, raw: Path, size: int | None) -> tuple[int, ...]:
    """Copy a file of `count` images, scaled to `size`; returns the shape of one image in `raw`, (H, H) or (H, H, 3)."""
    with _open_idx(folder, prefix, "images") as (path, file, shape):
        if len(shape) not in (3, 4) or shape[1] != shape[2] or shape[3:] not in ((), (3,)):
            raise UserError(f"{path}: its shape is {'×'.join(map(str, shape))}; images should be square, and grey or RGB")
        if shape[0] != count:
            raise UserError(f"{path}: {shape[0]} images, but there are {count} labels")
        if count < MIN_IMAGES:
            raise UserError(f"{path}: {count} images are too few; at least {MIN_IMAGES} are needed")
        return write_images(raw, prefix, count, shape[1:], _images(path, file, count, math.prod(shape[1:])), size)


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


def _images(path: Path, file: BufferedIOBase, count: int, size: int) -> Iterator[bytes]:
    """The `count` images, of `size` bytes each, that a file should have. Raises UserError if it has more or less."""
    corrupt = UserError(f"{path}: corrupt: shorter or longer than its header says")
    with _reading(path):
        for _ in range(count):
            image = file.read(size)
            if len(image) < size:
                raise corrupt
            yield image
        if file.read(1):
            raise corrupt


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
