"""Takes a user's data set that is a folder of images: photos and drawings of any size and kind."""

import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from ddpm.data.idx import TEST, TRAIN
from ddpm.errors import UserError
from ddpm.sources.layout import Labelled, files_below, understand
from ddpm.sources.raw_files import Taken, resized, write_images, write_labels

KEPT_SIZES = range(8, 257)  # pixels along a side that stay, if all images are square and equal
AUTO_SIZES = (64, 32)  # pixels along a side for all others
CAMERA_RAW = {".arw", ".cr2", ".dng", ".nef", ".orf", ".pef", ".rw2", ".srw"}  # Pillow would take the small preview inside
BACKGROUND = "white"  # seen through transparent pixels
NAMED = 5  # files that were left out, in one line
TOLD = 20  # files that can't be read
UNREADABLE = (OSError, SyntaxError, TypeError, ValueError, EOFError, Image.DecompressionBombError)

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photos are welcome; for huge ones there is an error


@dataclass
class Found:
    """The files of a folder, as far as their first bytes tell."""

    images: dict[Path, tuple[int, int]] = field(default_factory=dict)  # width and height
    is_grey: bool = True  # all images are
    others: list[Path] = field(default_factory=list)  # files that aren't images
    unreadable: dict[Path, str] = field(default_factory=dict)  # images that can't be read, and why


def take_images(folder: Path, raw: Path, size: int | None) -> Taken:
    """Write the images in `folder` to `raw`, as squares of one size, grey if all are grey and else RGB.

    Without a `size` they keep their own if all are square and equal, with 8 to 256 pixels along a side. Otherwise they are scaled
    and cropped: to 64 pixels if more than half of the images have shorter sides of at least 64, else to 32. Raises UserError with
    the files that can't be read, or if it isn't clear what the classes are, or if there are too few images.
    """
    found = look_into(folder)
    if not found.images:
        if found.unreadable:
            raise UserError(_told(found.unreadable))
        raise UserError(f"{folder}: has no images, and no file {TRAIN}-images-idx3-ubyte")
    layout = understand(folder, sorted([*found.images, *found.unreadable]))
    side = side_of(Counter(found.images.values()), size)
    mode, shape = ("L", (side, side)) if found.is_grey else ("RGB", (side, side, 3))
    with tqdm(total=len(found.images), unit="image", desc=folder.name, dynamic_ncols=True) as bar:

        def contents(items: Labelled) -> Iterator[bytes]:
            for path in (path for path, _ in items if path in found.images):
                try:
                    with Image.open(path) as image:
                        yield square(image, side, mode).tobytes()
                except UNREADABLE as error:
                    found.unreadable[path] = _reason(error)
                bar.update()

        for prefix, items in ((TRAIN, layout.train), (TEST, layout.test)):
            random.Random(0).shuffle(items)  # because validation takes the first ones
            write_images(raw, prefix, len(items), shape, contents(items))
            write_labels(raw, prefix, np.array([label for _, label in items]))
    if found.unreadable:
        raise UserError(_told(found.unreadable))
    notes = [
        f"{'one class per folder' if layout.classes else 'no classes'}; "
        f"held out for testing: {len(layout.test):,} images, {layout.held_out}",
        *_changes(found, side),
        *_left_out(folder, found),
    ]
    return Taken(layout.classes, shape, len(layout.train), len(layout.test), notes)


def look_into(folder: Path) -> Found:
    """Tell images from other files by their content, whatever their names are."""
    found = Found()
    suffixes = Image.registered_extensions()
    for path in tqdm([*files_below(folder)], unit="file", desc=f"{folder.name}: sizes", dynamic_ncols=True, leave=False):
        if path.suffix.lower() in CAMERA_RAW:
            found.others.append(path)
            continue
        try:
            with Image.open(path) as image:
                if isinstance(image, ImageFile.StubImageFile) or image.format == "MPEG":  # Pillow knows it, but can't decode it
                    found.others.append(path)
                    continue
                found.images[path] = image.size
                found.is_grey = found.is_grey and is_grey(image)
        except UNREADABLE as error:
            if isinstance(error, UnidentifiedImageError) and suffixes.get(path.suffix.lower()) not in Image.OPEN:
                found.others.append(path)
            else:
                found.unreadable[path] = _reason(error)
    return found


def is_grey(image: Image.Image) -> bool:
    """Whether the image has shades of grey only, as far as its mode or its palette tells."""
    if image.mode == "P":
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def side_of(sizes: Counter[tuple[int, int]], wanted: int | None) -> int:
    """Pixels along a side that images of these widths and heights are made to have."""
    if wanted is not None:
        return wanted
    (width, height), *others = sizes
    if not others and width == height and width in KEPT_SIZES:
        return width
    large_enough = (side for side in AUTO_SIZES if sum(n for size, n in sizes.items() if min(size) >= side) > sizes.total() / 2)
    return next(large_enough, AUTO_SIZES[-1])


def square(image: Image.Image, side: int, mode: str) -> Image.Image:
    """The image in `mode` L or RGB, `side` pixels wide and high, upright, and without transparency.

    Raises ValueError if its pixels' range of values isn't clear.
    """
    image.draft("RGB", (2 * side, 2 * side))  # lets JPEG's decoder skip detail that the scaling would remove
    image = _in_bytes(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, BACKGROUND)
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return resized(image.convert(mode), side)


def _in_bytes(image: Image.Image) -> Image.Image:
    """Images of 16 bits or floating-point numbers as grey ones of 8 bits; others as they are."""
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image
    pixels, white = np.asarray(image), 1.0 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= white):  # so that nan fails
        raise ValueError(f"pixel values from {pixels.min()} to {pixels.max()}; at most 0 to {white} are supported")
    return Image.fromarray((pixels / white * 255).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a link to a file that doesn't exist"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a damaged one"
    return f"can't be read ({(str(error) or type(error).__name__).splitlines()[0]})"


def _told(unreadable: dict[Path, str]) -> str:
    lines = [f"{path}: {reason}" for path, reason in sorted(unreadable.items())]
    if len(lines) == 1:
        return lines[0]
    more = [f"… and {len(lines) - TOLD:,} more"] if len(lines) > TOLD else []
    return "\n".join([f"{len(lines):,} images can't be read; repair or remove them:", *lines[:TOLD], *more])


def _changes(found: Found, side: int) -> list[str]:
    sizes = sorted(set(found.images.values()), key=math.prod)
    if sizes == [(side, side)]:
        return []
    smallest, largest = (f"{width}×{height}" for width, height in (sizes[0], sizes[-1]))
    were = smallest if len(sizes) == 1 else f"of {len(sizes):,} sizes, {smallest} to {largest}"
    return [f"scaled to {side}×{side} pixels and cropped to the middle; they were {were} (data.size sets the size)"]


def _left_out(folder: Path, found: Found) -> list[str]:
    if not found.others:
        return []
    names = [path.relative_to(folder).as_posix() for path in found.others[:NAMED]]
    more = ", …" if len(found.others) > NAMED else ""
    return [f"left out: {len(found.others):,} files that can't be opened as images ({', '.join(names)}{more})"]
