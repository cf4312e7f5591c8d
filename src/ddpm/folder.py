"""A user's own data set, out of a folder into MNIST's format: MNIST's own files, or images."""

import gzip
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ddpm.data import CLASSES_FILE, TEST, TRAIN, idx_header, idx_name, read_header
from ddpm.files import atomic, write_atomic
from ddpm.params import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
HELD_OUT = 7  # of images that aren't split yet, every seventh is for testing: the share that Fashion-MNIST has
FEWEST = 10  # images for testing, for figures to mean anything


def take_folder(folder: Path, raw: Path) -> None:
    """Put a user's data set into `raw` in MNIST's format: files that have it already, packed or not, or a folder of images.

    Images may lie in `train` and `test`, else every seventh is held out for testing; in sub-folders, which are then their
    classes, or not. Raises UserError, naming the file, where one can't be read or isn't as square and large as the others.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder: {folder}: there is no such folder")
    if folder.resolve() == raw.resolve():
        raise UserError(f"data.folder: {folder}: is where the data set will be; move it elsewhere first")
    take = _take_mnist if list(folder.glob(f"{TRAIN}-images?idx*")) else _take_images
    for old in (raw / CLASSES_FILE, *raw.glob("*-ubyte")):  # the list of classes comes last: without it there is no data set
        old.unlink(missing_ok=True)
    classes = take(folder, raw)
    write_atomic(raw / CLASSES_FILE, "".join(f"{name}\n" for name in classes).encode())


def _take_mnist(folder: Path, raw: Path) -> list[str]:
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
        _write_labels(raw, prefix, np.searchsorted(names, labels[prefix]))
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


def _take_images(folder: Path, raw: Path) -> list[str]:
    """A folder of images. Returns the classes' names, which are their sub-folders'."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        classes, train = _find_images(folder / "train")
        test_classes, test = _find_images(folder / "test")
        if classes != test_classes:
            raise UserError(f"{folder}: train has classes {classes}, test has {test_classes}; they should be the same")
    else:
        classes, found = _find_images(folder)
        test = found[HELD_OUT - 1 :: HELD_OUT]
        train = [item for i, item in enumerate(found, 1) if i % HELD_OUT]
    paths = [path for path, _ in train + test]
    size, mode = _common_size(paths)
    for items, purpose in ((test, "testing"), (train, "training")):
        if len(items) < FEWEST:
            raise UserError(
                f"{folder}: {len(items)} images for {purpose} are too few; {FEWEST} are needed, or {FEWEST * HELD_OUT} to split"
            )
    with tqdm(total=len(paths), unit="image", desc=folder.name, dynamic_ncols=True) as bar:
        for prefix, items in ((TRAIN, train), (TEST, test)):
            random.Random(0).shuffle(items)  # the first of them stand for all in validation
            shape = (len(items), size, size, *((3,) if mode == "RGB" else ()))
            with atomic(raw / idx_name(prefix, "images", shape)) as out:
                out.write(idx_header(shape))
                for path, _ in items:
                    out.write(_pixels(path, mode))
                    bar.update()
            _write_labels(raw, prefix, np.array([label for _, label in items]))
    return classes


def _find_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The names of its classes, and its images with the numbers of theirs, in the order of their names."""
    parts = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    parts = {path: names for path, names in parts.items() if not any(name.startswith(".") for name in names)}
    beside = [path for path, names in parts.items() if len(names) == 1]
    classes = sorted({names[0] for names in parts.values() if len(names) > 1})
    if not parts:
        raise UserError(f"{folder}: has no images ({' '.join(sorted(SUFFIXES))}) and no {TRAIN}-images-idx3-ubyte")
    if classes and beside:
        raise UserError(f"{beside[0]}: an image beside sub-folders of images; put all into sub-folders, a class each, or none")
    if len(classes) > 256 or not all(name.isprintable() for name in classes):
        raise UserError(f"{folder}: at most 256 classes, with plain names, are possible")
    return classes, [(path, classes.index(names[0]) if classes else 0) for path, names in parts.items()]


def _common_size(paths: list[Path]) -> tuple[int, str]:
    """The side of all of these square images, and whether they are grey (L) or have colours (RGB)."""
    side, grey = None, True
    for path in paths:
        with _opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits a pixel and colour; convert it first")
            if side is None:
                side = image.width
            if image.size != (side, side):
                wanted = f"{side}×{side}, as {paths[0]} seems to be" if path != paths[0] else "square"
                raise UserError(f"{path}: is {image.width}×{image.height}; all images should be {wanted}")
            grey &= image.mode in ("1", "L", "LA")
    return side, "L" if grey else "RGB"


def _pixels(path: Path, mode: str) -> bytes:
    with _opened(path) as image:
        return image.convert(mode).tobytes()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: not a whole image ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None


def _write_labels(raw: Path, prefix: str, labels: np.ndarray) -> None:
    header = idx_header((len(labels),))
    write_atomic(raw / idx_name(prefix, "labels", (len(labels),)), header + labels.astype(np.uint8).tobytes())
