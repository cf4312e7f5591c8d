"""Files that are either complete or missing: hashes, atomic writes, and loading tensors without running code.

Tensors are serialised in memory first: `torch.save` to a path writes the file's name into the archive, so the same weights
would have other bytes under another name.
"""

import glob
import hashlib
import io
import os
import pickle
import platform
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

from ddpm.errors import UserError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_md5(path: Path) -> str:
    """The hash that `dvc.lock` has for the file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError if the system doesn't let `path` be written: no space, no permission, a folder of the same name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None


def sync(path: Path) -> None:
    """Return when the contents of the file or folder would survive a power cut. Only Linux promises that much."""
    if os.name == "posix":  # Windows can't open a folder to sync it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It becomes `path` when the block ends without an error, so that `path` is never incomplete.

    This holds after a power cut, too: write, fsync, rename, fsync of the folder. Raises UserError if the file can't be written.
    """
    path = Path(path)
    stem = f".{path.name}.{platform.node()}."
    temporary = path.with_name(f"{stem}{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(stem)}*.tmp"):  # of processes that were killed while they wrote
            pid = leftover.name.removeprefix(stem).removesuffix(".tmp")
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                leftover.unlink(missing_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing. Raises UserError if the file can't be written."""
    with atomic(path) as file:
        file.write(data)


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
