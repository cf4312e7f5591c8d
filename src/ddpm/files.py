"""Files that are either complete or missing: hashes and atomic writes."""

import glob
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

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
