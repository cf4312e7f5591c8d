"""A user's own data set in MNIST's four files."""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddpm.data.dataset import FEWEST
from ddpm.data.idx import TEST, TRAIN, idx_header, idx_name, read_header, write_labels
from ddpm.errors import UserError
from ddpm.files import atomic


def take_mnist_files(folder: Path, raw: Path) -> list[str]:
    """MNIST's four files; a class is called by its number in them. Returns the classes' names."""
    labels, shapes = {}, {}
    for prefix in (TRAIN, TEST):
        with _open_idx(folder, prefix, "labels") as (path, file, shape):
            labels[prefix] = np.frombuffer(b"".join(_chunks(path, file)), np.uint8)
            if len(shape) != 1 or len(labels[prefix]) != shape[0]:
                raise UserError(f"{path}: damaged, or not a list of labels")
        with _open_idx(folder, prefix, "images") as (path, file, shape):
            if len(shape) not in (3, 4) or shape[1] != shape[2] or shape[3:] not in ((), (3,)):
                raise UserError(
                    f"{path}: holds {'×'.join(map(str, shape))} bytes; images should be square, grey or in three colours"
                )
            if shape[0] != len(labels[prefix]):
                raise UserError(f"{path}: {shape[0]} images, but there are {len(labels[prefix])} labels")
            if shape[0] < FEWEST:
                raise UserError(f"{path}: {shape[0]} images are too few; {FEWEST} are needed")
            with atomic(raw / idx_name(prefix, "images", shape)) as out:
                out.write(idx_header(shape))
                for chunk in _chunks(path, file):
                    out.write(chunk)
                if out.tell() != len(idx_header(shape)) + math.prod(shape):
                    raise UserError(f"{path}: damaged: shorter or longer than it says")
        shapes[prefix] = shape[1:]
    if shapes[TRAIN] != shapes[TEST]:
        raise UserError(f"{folder}: images for training are {shapes[TRAIN]}, for testing {shapes[TEST]}")
    names = np.unique(labels[TRAIN])
    if unknown := sorted(set(labels[TEST].tolist()) - set(names.tolist())):
        raise UserError(f"{folder}: label {unknown[0]} is among those for testing, but not among those for training")
    for prefix in (TRAIN, TEST):
        write_labels(raw, prefix, np.searchsorted(names, labels[prefix]))
    return [str(name) for name in names]


@contextmanager
def _open_idx(folder: Path, prefix: str, kind: str) -> Iterator[tuple[Path, BinaryIO, tuple[int, ...]]]:
    """The file, open behind its header, and the shape that the header says."""
    found = sorted(folder.glob(f"{prefix}-{kind}[-.]idx?-ubyte")) + sorted(folder.glob(f"{prefix}-{kind}[-.]idx?-ubyte.gz"))
    if not found:
        raise UserError(f"{folder}: has no {prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte, nor one that ends in .gz")
    path = found[0]
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if (shape := read_header(file)) is None:
            raise UserError(f"{path}: not in MNIST's format")
        yield path, file, shape


def _chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    with _reading(path):
        while chunk := file.read(1 << 20):
            yield chunk


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
