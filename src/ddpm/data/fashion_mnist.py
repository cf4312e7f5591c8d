"""Fashion-MNIST: the names of its classes, and its four files, which are verified before they are used."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.data.idx import TEST, TRAIN
from ddpm.errors import UserError
from ddpm.files import sha256

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {  # SHA-256 of the unpacked files; files with other hashes are rejected, whatever their source
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load_split(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's "train" or "test" split in the folder `raw`: images uint8 [N, 28, 28] and labels int64 [N].

    Raises UserError if a file is missing or has other bytes than Fashion-MNIST's.
    """
    prefix = {"train": TRAIN, "test": TEST}[split]
    images = _read_verified(raw / f"{prefix}-images-idx3-ubyte")
    labels = _read_verified(raw / f"{prefix}-labels-idx1-ubyte")
    return (
        torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28).copy()),
        torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)),
    )


def _read_verified(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `python src/download.py` downloads it") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    if sha256(data) != FILES[path.name]:
        raise UserError(f"{path}: not Fashion-MNIST's bytes (SHA-256 differs); `python src/download.py` downloads it again")
    return data
