"""Files of tensors: saved with the same bytes whatever their name, and loaded without running code.

They are serialised in memory first: `torch.save` to a path writes the file's name into the archive, so the same weights would
have other bytes under another name.
"""

import hashlib
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ddpm.errors import UserError
from ddpm.files import write_atomic


def write_verified(path: Path, obj: object) -> None:
    """Write tensors and plain values atomically, preceded by their SHA-256, for `read_verified`."""
    data = serialise(obj)
    write_atomic(path, hashlib.sha256(data).digest() + data)


def read_verified(path: Path) -> Any | None:
    """What `write_verified` wrote, on the CPU; None if the file is missing, unreadable or corrupt."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        return None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def serialise(obj: object) -> bytes:
    """The bytes of `torch.save`, which don't depend on a file's name."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def load_tensors(path: Path, keys: set[str], remedy: str) -> dict[str, Any]:
    """Load a dictionary of tensors and plain values onto the CPU; it has at least `keys`.

    Never runs code from the file (`weights_only=True`). Raises UserError if the file is missing, corrupt, holds code, or lacks a
    key. The message ends with `remedy`, which says what creates the file, such as "`dvc repro train` makes it".
    """
    try:
        file = io.BytesIO(path.read_bytes())
        if (corrupt := zipfile.ZipFile(file).testzip()) is not None:  # torch.load doesn't check the checksums
            raise zipfile.BadZipFile(corrupt)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: corrupt, or not a plain weights file; {remedy}") from None
    missing = sorted(keys - content.keys()) if isinstance(content, dict) else sorted(keys)
    if missing:
        raise UserError(f"{path}: made by another program or version (it lacks {', '.join(missing)}); {remedy}")
    return content
