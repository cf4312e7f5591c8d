"""Takes a user's data set that is a folder of images."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ddpm.data.idx import TEST, TRAIN, idx_header, idx_name
from ddpm.errors import UserError
from ddpm.files import atomic
from ddpm.sources.mnist_files import MIN_IMAGES, write_labels

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_EVERY = 7  # one in seven images is used for testing unless they are split already: Fashion-MNIST's share
MAX_CLASSES = 256  # labels are bytes


def take_images(folder: Path, raw: Path) -> list[str]:
    """Write the images in `folder` to `raw`; returns the names of the classes, which are those of their sub-folders.

    Raises UserError if an image can't be read or isn't square and of the same size as the others, if there are too few, or if
    their folders don't make clear what the classes are.
    """
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        classes, train = _find_images(folder / "train")
        test_classes, test = _find_images(folder / "test")
        if classes != test_classes:
            raise UserError(f"{folder}: train has classes {classes}, test has {test_classes}; they should be the same")
    else:
        classes, found = _find_images(folder)
        test = found[TEST_EVERY - 1 :: TEST_EVERY]
        train = [item for i, item in enumerate(found, 1) if i % TEST_EVERY]
    paths = [path for path, _ in train + test]
    size, mode = _common_size(paths)
    for items, purpose in ((test, "testing"), (train, "training")):
        if len(items) < MIN_IMAGES:
            unsplit = f"{MIN_IMAGES * TEST_EVERY} that aren't split into train and test"
            raise UserError(
                f"{folder}: {len(items)} images for {purpose} are too few; at least {MIN_IMAGES} are needed, or {unsplit}"
            )
    with tqdm(total=len(paths), unit="image", desc=folder.name, dynamic_ncols=True) as bar:
        for prefix, items in ((TRAIN, train), (TEST, test)):
            random.Random(0).shuffle(items)  # because validation takes the first ones
            shape = (len(items), size, size, *((3,) if mode == "RGB" else ()))
            with atomic(raw / idx_name(prefix, "images", shape)) as out:
                out.write(idx_header(shape))
                for path, _ in items:
                    out.write(_pixels(path, mode))
                    bar.update()
            write_labels(raw, prefix, np.array([label for _, label in items]))
    return classes


def _find_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The names of the classes in `folder`, and its images in alphabetical order, each with the number of its class."""
    parts = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    parts = {path: names for path, names in parts.items() if not any(name.startswith(".") for name in names)}
    unsorted = [path for path, names in parts.items() if len(names) == 1]
    classes = sorted({names[0] for names in parts.values() if len(names) > 1})
    if not parts:
        raise UserError(f"{folder}: has no images ({' '.join(sorted(SUFFIXES))}) and no {TRAIN}-images-idx3-ubyte")
    if classes and unsorted:
        raise UserError(f"{unsorted[0]}: an image next to sub-folders of images; put each image into the sub-folder of its class")
    if len(classes) > MAX_CLASSES or not all(name.isprintable() for name in classes):
        raise UserError(f"{folder}: there may be at most {MAX_CLASSES} classes, and their names must be printable")
    return classes, [(path, classes.index(names[0]) if classes else 0) for path, names in parts.items()]


def _common_size(paths: list[Path]) -> tuple[int, str]:
    """The width and height of the images, and "L" if all are grey, else "RGB"."""
    side, grey = 0, True
    for path in paths:
        with _opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits per pixel and channel; convert it first")
            side = side or image.width  # of the first one
            if image.size != (side, side):
                wanted = f"{side}×{side}, as {paths[0]} is" if path != paths[0] else "square"
                raise UserError(f"{path}: is {image.width}×{image.height}; all images should be {wanted}")
            grey = grey and image.mode in ("1", "L", "LA")
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a complete image ({reason})") from None
