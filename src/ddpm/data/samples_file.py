"""samples.npz: sampled images, their classes, and which model drew them."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.files import write_atomic

REMEDY = "`dvc repro sample` draws them again"


@dataclass(frozen=True)
class Samples:
    images: Tensor  # uint8 [N, H, H], or [N, H, H, 3] in colour
    labels: Tensor  # int64 [N]; -1 for no class
    checkpoint_sha256: str | None  # of the model file that drew them; None if unknown


def npz(samples: Samples) -> bytes:
    """The bytes of such a file."""
    archive = io.BytesIO()
    arrays: dict[str, Any] = {"images": samples.images.numpy(), "labels": samples.labels.numpy()}
    if samples.checkpoint_sha256 is not None:
        arrays["checkpoint_sha256"] = samples.checkpoint_sha256
    np.savez_compressed(archive, **arrays)
    return archive.getvalue()


def write_samples(path: Path, samples: Samples) -> None:
    write_atomic(path, npz(samples))


def read_samples(path: Path) -> Samples:
    """Raises UserError if the file is missing, corrupt, or holds no such images and labels."""
    try:
        with np.load(path) as archive:
            images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
            checkpoint = str(archive["checkpoint_sha256"]) if "checkpoint_sha256" in archive else None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `dvc repro sample` makes it") from None
    except Exception:  # zipfile, zlib and numpy's header parser each raise their own errors for a changed byte
        raise UserError(f"{path}: corrupt, or without images and labels; {REMEDY}") from None
    kinds = (images.dtype, labels.dtype)
    if kinds != (torch.uint8, torch.int64) or len(images.shape) not in (3, 4) or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: images must be uint8 [N, H, H] or [N, H, H, 3] with N int64 labels; {REMEDY}")
    return Samples(images, labels, checkpoint)
