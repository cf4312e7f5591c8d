"""The data set that the stages work on, in MNIST's format, as `src/download.py` puts it into data/<name>/raw.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017:
60 000 training and 10 000 test images of ten classes of garments, 28×28, grey. Another set's images are all of one size,
square, grey or in colour, and stay in their file: only what is indexed is read, so that it may be larger than memory.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.data.idx import AGAIN, TEST, TRAIN, map_idx
from ddpm.errors import UserError
from ddpm.files import file_sha256, sha256
from ddpm.params import FASHION_MNIST
from ddpm.paths import raw_folder

CLASSES_FILE = "classes.txt"  # of another set: a name a line, none where it has no classes


@dataclass
class Dataset:
    """Images uint8 [N, H, H], in colour [N, H, H, 3], and labels int64 [N], on one device; without classes all labels are 0."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...] = CLASSES

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, H]"""
        return (1 if self.images.ndim == 3 else 3, *self.images.shape[1:3])

    def subsample(self, count: int) -> Self:
        """At most `count` images for training and as many for testing, evenly spaced."""
        train, test = (slice(None, None, -(-len(x) // count)) for x in (self.images, self.test_images))
        return type(self)(self.images[train], self.labels[train], self.test_images[test], self.test_labels[test], self.classes)

    def to(self, device: torch.device) -> Self:
        """Itself on a device that has room for it twice over; where that hasn't, batches go there one at a time."""
        tensors = (self.images, self.labels, self.test_images, self.test_labels)
        if device.type == "cuda" and 2 * sum(x.nbytes for x in tensors) > torch.cuda.mem_get_info(device)[0]:
            return self
        return type(self)(*(x.to(device) for x in tensors), self.classes)


def load_dataset(name: str) -> Dataset:
    """The data set `name`. Raises UserError if a file is missing or damaged; Fashion-MNIST's bytes must be its own."""
    raw = raw_folder(name)
    if name == FASHION_MNIST:
        return Dataset(*load_split(raw, "train"), *load_split(raw, "test"))
    images, labels, test_images, test_labels = (
        map_idx(min(raw.glob(f"{prefix}-{kind}-idx?-ubyte"), default=raw / f"{prefix}-{kind}-idx3-ubyte"))
        for prefix in (TRAIN, TEST)
        for kind in ("images", "labels")
    )
    try:
        classes = tuple((raw / CLASSES_FILE).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{raw / CLASSES_FILE}: missing or damaged; {AGAIN} anew") from None
    if max(labels.max(), test_labels.max()) >= max(1, len(classes)):
        raise UserError(f"{raw}: a label is none of the {len(classes)} in {CLASSES_FILE}; {AGAIN} anew")
    return Dataset(images, labels.long(), test_images, test_labels.long(), classes)


def dataset_sha256(name: str) -> str:
    """SHA-256 that stands for all of a data set's files."""
    files = sorted(path for path in raw_folder(name).iterdir() if not path.name.startswith("."))
    return sha256("".join(file_sha256(path) for path in files).encode())


FEWEST = 10  # images for testing, for figures to mean anything
