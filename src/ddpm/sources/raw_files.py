"""What every source writes into data/<name>/raw: images and labels in MNIST's format."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ddpm.data.dataset import CLASSES_FILE
from ddpm.data.idx import idx_header, idx_name
from ddpm.files import atomic, write_atomic

MIN_IMAGES = 10  # for training, and for testing
MOST_NAMES = 12  # of classes, in one line


@dataclass(frozen=True)
class Taken:
    """A data set that was written, and what its user should know about it."""

    classes: list[str]  # names; none if there are no classes
    shape: tuple[int, ...]  # of one image: (H, H), or (H, H, 3) in colour
    train: int  # number of images
    test: int
    notes: list[str] = field(default_factory=list)  # how a folder was understood, and what was changed or left out

    def __str__(self) -> str:
        kind = "grey" if len(self.shape) == 2 else "colour"
        images = f"{self.train + self.test:,} {kind} images of {self.shape[0]}×{self.shape[0]} pixels"
        names = self.classes
        shown = names if len(names) <= MOST_NAMES else [*names[: MOST_NAMES - 2], "…", names[-1]]
        return f"{images}, {len(names)} classes: {', '.join(shown)}" if names else f"{images}, without classes"


def completed(raw: Path, take: Callable[[], Taken]) -> Taken:
    """What `take` writes to the folder `raw`, in place of what was there.

    The list of classes is deleted first and written last, so an incomplete data set has none and isn't loaded.
    """
    for old in (raw / CLASSES_FILE, *raw.glob("*-ubyte")):
        old.unlink(missing_ok=True)
    taken = take()
    write_atomic(raw / CLASSES_FILE, "".join(f"{name}\n" for name in taken.classes).encode())
    return taken


def write_images(
    raw: Path, prefix: str, count: int, shape: tuple[int, ...], images: Iterable[bytes], side: int | None = None
) -> tuple[int, ...]:
    """Write `count` images of this shape to their file in the folder `raw`, scaled to `side` pixels along a side if it is given.

    Returns the shape that they have there.
    """
    if side is not None and side != shape[0]:
        images, shape = map(partial(_scaled, shape, side), images), (side, side, *shape[2:])
    with atomic(raw / idx_name(prefix, "images", (count, *shape))) as out:
        out.write(idx_header((count, *shape)))
        for image in images:
            out.write(image)
    return shape


def _scaled(shape: tuple[int, ...], side: int, image: bytes) -> bytes:
    return resized(Image.fromarray(np.frombuffer(image, np.uint8).reshape(shape)), side).tobytes()


def write_labels(raw: Path, prefix: str, labels: np.ndarray) -> None:
    """Write labels [N], from 0 to 255, to their file in the folder `raw`."""
    header = idx_header((len(labels),))
    write_atomic(raw / idx_name(prefix, "labels", (len(labels),)), header + labels.astype(np.uint8).tobytes())


def resized(image: Image.Image, side: int) -> Image.Image:
    """The middle of a grey or RGB image as a square, with its shorter side scaled to `side` pixels, without aliasing."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
