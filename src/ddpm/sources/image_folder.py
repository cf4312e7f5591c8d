"""A user's own data set as a folder of images."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ddpm.data.dataset import FEWEST
from ddpm.data.idx import TEST, TRAIN, idx_header, idx_name, write_labels
from ddpm.errors import UserError
from ddpm.files import atomic

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
HELD_OUT = 7  # of images that aren't split yet, every seventh is for testing: the share that Fashion-MNIST has


def take_images(folder: Path, raw: Path) -> list[str]:
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
            write_labels(raw, prefix, np.array([label for _, label in items]))
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
