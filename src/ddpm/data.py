"""The data set that the stages work on, in MNIST's format, as `src/download.py` puts it into data/<name>/raw.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017:
60 000 training and 10 000 test images of ten classes of garments, 28×28, grey. Another set's images are all of one size,
square, grey or in colour, and stay in their file: only what is indexed is read, so that it may be larger than memory.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from ddpm.files import file_sha256, sha256
from ddpm.params import FASHION_MNIST, UserError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {  # SHA-256 of the unpacked bytes: whatever the source, these bytes or an error
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
TRAIN, TEST = "train", "t10k"  # what their names begin with
CLASSES_FILE = "classes.txt"  # of another set: a name a line, none where it has no classes
AGAIN = "`python src/download.py` makes it"


@dataclass
class Data:
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

    def thinned(self, count: int) -> Self:
        """At most `count` images for training and as many for testing, evenly spaced."""
        train, test = (slice(None, None, -(-len(x) // count)) for x in (self.images, self.test_images))
        return type(self)(self.images[train], self.labels[train], self.test_images[test], self.test_labels[test], self.classes)

    def to(self, device: torch.device) -> Self:
        """Itself on a device that has room for it twice over; where that hasn't, batches go there one at a time."""
        tensors = (self.images, self.labels, self.test_images, self.test_labels)
        if device.type == "cuda" and 2 * sum(x.nbytes for x in tensors) > torch.cuda.mem_get_info(device)[0]:
            return self
        return type(self)(*(x.to(device) for x in tensors), self.classes)


def raw_folder(name: str) -> Path:
    """Where torchvision looks, too: `torchvision.datasets.FashionMNIST("data")`."""
    return Path("data") / name / "raw"


RAW = raw_folder(FASHION_MNIST)


def load_data(name: str) -> Data:
    """The data set `name`. Raises UserError if a file is missing or damaged; Fashion-MNIST's bytes must be its own."""
    raw = raw_folder(name)
    if name == FASHION_MNIST:
        return Data(*load_split(raw, "train"), *load_split(raw, "test"))
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
    return Data(images, labels.long(), test_images, test_labels.long(), classes)


def digest(name: str) -> str:
    """SHA-256 that stands for all of a data set's files."""
    files = sorted(path for path in raw_folder(name).iterdir() if not path.name.startswith("."))
    return sha256("".join(file_sha256(path) for path in files).encode())


def load_split(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's "train" or "test" split in the folder `raw`: images uint8 [N, 28, 28] and labels int64 [N].

    Raises UserError if a file is missing or its bytes are not those of Fashion-MNIST.
    """
    prefix = {"train": TRAIN, "test": TEST}[split]
    images = _read_verified(raw / f"{prefix}-images-idx3-ubyte")
    labels = _read_verified(raw / f"{prefix}-labels-idx1-ubyte")
    return (
        torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28).copy()),
        torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)),
    )


def map_idx(path: Path) -> Tensor:
    """The bytes in a file of MNIST's format as a uint8 tensor of the shape that it says; read where and when they are indexed.

    Raises UserError if the file is missing, of another format, or shorter or longer than it says.
    """
    try:
        with path.open("rb") as file:
            shape = read_header(file)
        if shape is None or path.stat().st_size != len(idx_header(shape)) + math.prod(shape):
            raise UserError(f"{path}: damaged, or not in MNIST's format; {AGAIN} anew")
        array = np.memmap(path, np.uint8, "r", offset=len(idx_header(shape)), shape=shape)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    with warnings.catch_warnings(action="ignore"):  # that it can't be written to; nobody does
        return torch.from_numpy(array)


def idx_name(prefix: str, kind: str, shape: tuple[int, ...]) -> str:
    return f"{prefix}-{kind}-idx{len(shape)}-ubyte"


def idx_header(shape: tuple[int, ...]) -> bytes:
    """What a file of bytes of that shape begins with (LeCun, Cortes and Burges, "The MNIST database")."""
    return bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def read_header(file: BinaryIO) -> tuple[int, ...] | None:
    """The shape that the open file begins with; None where it isn't in MNIST's format."""
    start = file.read(4)
    if start[:3] != bytes([0, 0, 8]) or len(start) < 4 or not 1 <= start[3] <= 4:
        return None
    sizes = file.read(4 * start[3])
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))


def channels_first(images: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, 3] → [N, C, H, W]."""
    return images.unsqueeze(1) if images.ndim == 3 else images.movedim(3, 1)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, 3] → float32 [N, C, H, W] in [-1, 1]."""
    return channels_first(images).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float [N, C, H, W] in [-1, 1] → uint8 [N, H, W] or [N, H, W, 3], rounded, out-of-range values clipped."""
    x = x.squeeze(1) if x.shape[1] == 1 else x.movedim(1, 3)
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def _read_verified(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `python src/download.py` fetches it") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    if sha256(data) != FILES[path.name]:
        raise UserError(f"{path}: not Fashion-MNIST's bytes (SHA-256 differs); `python src/download.py` fetches it again")
    return data
