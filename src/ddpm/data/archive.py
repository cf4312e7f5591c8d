"""samples.npz: images, their labels, and the model that drew them."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.files import write_atomic


def write_samples(path: Path, images: Tensor, labels: Tensor, checkpoint: str) -> None:
    """The archive of images uint8 [N, …] and labels int64 [N], which says by its SHA-256 which `checkpoint` drew them."""
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images.numpy(), labels=labels.numpy(), checkpoint_sha256=checkpoint)
    write_atomic(path, archive.getvalue())


ANEW = "`dvc repro sample` makes it anew"


def read_samples(path: Path) -> tuple[Tensor, Tensor, str | None]:
    """Images uint8 [N, H, H] or [N, H, H, 3], labels int64 [N], -1 for no class, and the model's SHA-256 if it is known.

    Raises UserError if the file isn't that.
    """
    try:
        with np.load(path) as archive:
            images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
            checkpoint = str(archive["checkpoint_sha256"]) if "checkpoint_sha256" in archive else None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `dvc repro sample` makes it") from None
    except Exception:  # zipfile, zlib and numpy's header parser each have their own for a changed byte
        raise UserError(f"{path}: damaged, or without images and labels; {ANEW}") from None
    kinds = (images.dtype, labels.dtype)
    if kinds != (torch.uint8, torch.int64) or len(images.shape) not in (3, 4) or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: images must be uint8 [N, H, H] or [N, H, H, 3] with N int64 labels; {ANEW}")
    return images, labels, checkpoint
