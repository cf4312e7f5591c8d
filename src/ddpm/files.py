"""Files that are whole or absent: hashes, atomic writes, and reading tensors without running code.

`torch.save` to a path writes the file's name into the archive, so that the same weights under another name are other
bytes: everything is serialised in memory and put in place by write, fsync, rename, fsync of the folder.
"""

import hashlib
import io
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from ddpm.params import UserError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a power cut, sees the whole file or none of it.

    Raises UserError if the folder can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        if os.name == "posix":  # Windows can't open a folder to sync it
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: can't be written ({error.strerror})") from None


def write_verified(path: Path, data: bytes) -> None:
    """Write `data` atomically, behind its hash, for `read_verified`."""
    write_atomic(path, hashlib.sha256(data).digest() + data)


def read_verified(path: Path) -> bytes | None:
    """The data that `write_verified` wrote; None if the file is missing or damaged."""
    content = path.read_bytes() if path.is_file() else b""
    digest, data = content[:32], content[32:]
    return data if hashlib.sha256(data).digest() == digest else None


def serialise(obj: object) -> bytes:
    """The bytes that `torch.save` writes, independent of any file's name."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def load_tensors(path: Path, keys: set[str], made_by: str) -> dict:
    """Load a dictionary of tensors and plain values that has at least `keys`, onto the CPU.

    Never runs code from the file (`weights_only=True`). Raises UserError, naming the command `made_by` as the way to a
    good file, if the file is missing, damaged, holds code, or lacks a key.
    """
    try:
        file = io.BytesIO(path.read_bytes())
        if (damaged := zipfile.ZipFile(file).testzip()) is not None:  # torch.load doesn't look at the checksums
            raise zipfile.BadZipFile(damaged)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `{made_by}` makes it") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged, or not a file of weights alone; `{made_by}` makes it anew") from None
    missing = sorted(keys - content.keys()) if isinstance(content, dict) else sorted(keys)
    if missing:
        raise UserError(f"{path}: made by another program or version (it lacks {', '.join(missing)}); `{made_by}` makes it anew")
    return content
