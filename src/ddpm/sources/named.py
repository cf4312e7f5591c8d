"""Gets MNIST and CIFAR-10 by their names: downloaded and verified by torchvision, or from a folder with the same files."""

import shutil
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm.data.idx import TEST, TRAIN
from ddpm.errors import UserError
from ddpm.files import file_md5, write_atomic
from ddpm.sources.raw_files import Taken, completed, write_images, write_labels

TIMEOUT = 30  # seconds without an answer; torchvision itself would wait for ever


class Split(NamedTuple):
    images: np.ndarray  # uint8 [N, H, H], or [N, H, H, 3] in colour
    labels: np.ndarray  # [N]
    classes: list[str]


def take_named(name: str, raw: Path, cache: Path, folder: Path | None, size: int | None) -> Taken:
    """Write MNIST or CIFAR10 to `raw`, scaled to `size` if there is one.

    Its packed files are taken from `folder`, or else downloaded and kept in `cache`. Raises UserError if they aren't in the
    folder, can't be downloaded, or have other bytes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        sets = _load(name, Path(temporary), cache, folder)
    return completed(raw, lambda: _write(name, sets, raw, size))


def _write(name: str, sets: dict[str, Split], raw: Path, size: int | None) -> Taken:
    shape: tuple[int, ...] = ()
    for prefix, (images, labels, _) in sets.items():
        shape = write_images(raw, prefix, len(images), images.shape[1:], (image.tobytes() for image in images), size)
        write_labels(raw, prefix, labels)
    train, test = sets[TRAIN], sets[TEST]
    scaled = [] if shape == train.images.shape[1:] else [f"scaled from {train.images.shape[1]}×{train.images.shape[1]} pixels"]
    notes = [f"held out for testing: {name}'s own test images", *scaled]
    return Taken(train.classes, shape, len(train.labels), len(test.labels), notes)


def _load(name: str, root: Path, cache: Path, folder: Path | None) -> dict[str, Split]:
    from torchvision.datasets import CIFAR10, MNIST  # type: ignore[import-untyped]  # slow, and Fashion-MNIST doesn't need it

    data_set: Any = {"MNIST": MNIST, "CIFAR10": CIFAR10}[name]
    packed = dict(MNIST.resources) if name == "MNIST" else {CIFAR10.filename: CIFAR10.tgz_md5}  # and their MD5
    place = root / "MNIST/raw" if name == "MNIST" else root  # where torchvision looks for them
    place.mkdir(parents=True, exist_ok=True)
    if folder and not any((folder / file).is_file() for file in packed):
        files = ", ".join(packed)
        raise UserError(
            f"data.folder: {folder}: has none of {name}'s files ({files}); for images of yours, choose another data.name"
        )
    for file, md5 in packed.items():
        try:
            if folder and (folder / file).is_file() and file_md5(folder / file) != md5:
                raise UserError(f"{folder / file}: not {name}'s file of that name (its MD5 differs)")
            source = next((f / file for f in (folder, cache) if f and (f / file).is_file()), None)
            if source:
                shutil.copy(source, place / file)
        except OSError as error:
            raise UserError(f"{error.filename}: can't be copied ({error.strerror})") from None
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        loaded = {prefix: data_set(root, train=prefix == TRAIN, download=True) for prefix in (TRAIN, TEST)}
    except (OSError, RuntimeError, EOFError, ValueError, HTTPException) as error:
        reason = ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
        remedy = f"put {' and '.join(packed)} into a folder, set data.folder in params.yaml to it, and run again"
        raise UserError(f"{name} could not be downloaded ({reason}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(waited)
    for file in packed:
        write_atomic(cache / file, (place / file).read_bytes())
    classes = [text.partition(" - ")[0] for text in loaded[TRAIN].classes]  # MNIST's are "0 - zero" …
    return {prefix: Split(np.asarray(data.data), np.asarray(data.targets), classes) for prefix, data in loaded.items()}
