"""The data set that the stages work on, loaded from data/<name>/raw, where `src/download.py` puts it in MNIST's format.

Fashion-MNIST has 60 000 training and 10 000 test images of ten classes of garments, 28×28 pixels, grey (Xiao, Rasul and Vollgraf,
"Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017). The images of other data sets are
square, of one size, and grey or in colour. They are read from their file when they are indexed, so they may take more space than
there is memory.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.data.idx import RECREATE, TEST, TRAIN, map_idx
from ddpm.errors import UserError
from ddpm.files import file_sha256, sha256
from ddpm.params import FASHION_MNIST
from ddpm.paths import raw_folder

CLASSES_FILE = "classes.txt"  # of data sets other than Fashion-MNIST: one name per line, none if there are no classes


@dataclass
class Dataset:
    """Images uint8 [N, H, H], or [N, H, H, 3] in colour, and labels int64 [N], all 0 if there are no classes."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...] = CLASSES  # names; none if there are no classes
    mirror: bool = False  # training shows every image mirrored half of the time

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, H]"""
        return (1 if self.images.ndim == 3 else 3, *self.images.shape[1:3])

    def subsample(self, count: int) -> Self:
        """Every n-th image, so that there are at most `count` for training and at most `count` for testing."""
        train, test = (slice(None, None, -(-len(x) // count)) for x in (self.images, self.test_images))
        return replace(
            self,
            images=self.images[train],
            labels=self.labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )

    def to(self, device: torch.device) -> Self:
        """The data set on `device`. If it takes over half of a CUDA device's free memory it stays where it is."""
        tensors = (self.images, self.labels, self.test_images, self.test_labels)
        if device.type == "cuda" and 2 * sum(x.nbytes for x in tensors) > torch.cuda.mem_get_info(device)[0]:
            return self
        images, labels, test_images, test_labels = (x.to(device) for x in tensors)
        return replace(self, images=images, labels=labels, test_images=test_images, test_labels=test_labels)


def load_dataset(name: str) -> Dataset:
    """The data set `name`, on the CPU.

    Raises UserError if a file is missing or corrupt; Fashion-MNIST's files must have their well-known bytes.
    """
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
        raise UserError(f"{raw / CLASSES_FILE}: missing or corrupt; {RECREATE}") from None
    if max(labels.max(), test_labels.max()) >= max(1, len(classes)):
        raise UserError(f"{raw}: a label is none of the {len(classes)} classes in {CLASSES_FILE}; {RECREATE}")
    return Dataset(images, labels.long(), test_images, test_labels.long(), classes)


def dataset_sha256(name: str) -> str:
    """One SHA-256 for all files of the data set `name`."""
    files = sorted(path for path in raw_folder(name).iterdir() if not path.name.startswith("."))
    return sha256("".join(file_sha256(path) for path in files).encode())
