"""Downloads Fashion-MNIST: from a folder, a mirror or a Debian package. Every file is verified, wherever it comes from."""

import gzip
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import requests
from tqdm import tqdm

from ddpm.data.fashion_mnist import FILES
from ddpm.errors import UserError
from ddpm.files import sha256, write_atomic

MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)  # the same as torchvision's; it has no https
DEBIAN_PACKAGE = "dataset-fashion-mnist"
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30  # seconds


class SourceError(Exception):
    """A source can't be used; the message says why."""


class FileError(SourceError):
    """A source lacks one file, or has it with other bytes; it may have the others."""


def download(raw: Path, cache: Path, folder: Path | None = None, mirrors: Sequence[str] = MIRRORS, debian: bool = True) -> None:
    """Put the four verified files into `raw`, and keep them in `cache`.

    Files that aren't in `cache` yet are looked for in `folder`, packed or unpacked, then in each of `mirrors`, and last, unless
    `debian` is False, in the Debian package. They are verified before they are put in place, so an interrupted download leaves
    no incomplete file. Raises UserError with a list of the sources and why they failed,
    or if `folder` has none of the files.
    """
    if folder is not None and not any((folder / f"{name}{end}").is_file() for name in FILES for end in ("", ".gz")):
        raise UserError(
            f"data.folder: {folder}: has none of Fashion-MNIST's four files; for images of yours, choose another data.name"
        )
    missing = [name for name in FILES if not _is_verified(cache / name)]
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        sources: list[tuple[str, Callable[[str], bytes]]] = []
        if folder is not None:
            sources.append((f"folder {folder}", partial(_from_folder, folder)))
        sources += [(f"mirror {mirror}", partial(_from_mirror, mirror)) for mirror in mirrors]
        if debian:
            sources.append((f"Debian package {DEBIAN_PACKAGE}", partial(_from_debian, Path(temporary))))
        for source, get in sources:
            if missing:
                print(f"trying {source}", file=sys.stderr)
            for name in list(missing):
                try:
                    data = get(name)
                    _verify(name, data)
                except SourceError as error:
                    failures.append(f"{source}: {error}")
                    print(f"  failed: {error}", file=sys.stderr)
                    if isinstance(error, FileError):
                        continue
                    break
                write_atomic(cache / name, data)
                missing.remove(name)
    if missing:
        raise UserError(
            f"Fashion-MNIST could not be downloaded: {', '.join(missing)} missing. Tried:\n"
            + "".join(f"  - {failure}\n" for failure in failures)
            + "Put the four .gz files (or the unpacked ones) into a folder, set data.folder in params.yaml to it, and run again."
        )
    for name in FILES:
        write_atomic(raw / name, (cache / name).read_bytes())


def _is_verified(path: Path) -> bool:
    return path.is_file() and sha256(path.read_bytes()) == FILES[path.name]


def _verify(name: str, data: bytes) -> None:
    if sha256(data) != FILES[name]:
        raise FileError(f"{name} has the wrong bytes (SHA-256 {sha256(data)[:12]}…, {FILES[name][:12]}… expected)")


def _unpack(name: str, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise FileError(f"{name}.gz is not a complete gzip file ({error})") from None


def _from_folder(folder: Path, name: str) -> bytes:
    packed, unpacked = folder / f"{name}.gz", folder / name
    try:
        if unpacked.is_file():
            return unpacked.read_bytes()
        if packed.is_file():
            return _unpack(name, packed.read_bytes())
    except OSError as error:
        raise FileError(f"{error.filename}: {error.strerror}") from None
    raise FileError(f"it has neither {name} nor {name}.gz")


def _from_mirror(mirror: str, name: str) -> bytes:
    data = bytearray()
    try:
        with requests.get(f"{mirror}{name}.gz", stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            response.raise_for_status()
            size = int(response.headers.get("content-length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=name, leave=False) as bar:
                for chunk in response.raw.stream(1 << 16, decode_content=False):
                    data += chunk
                    bar.update(len(chunk))
    except requests.HTTPError as error:
        raise FileError(f"{name}.gz: HTTP {error.response.status_code} {error.response.reason}") from None
    except Exception as error:  # from the raw stream, requests lets urllib3's own errors through
        raise SourceError(f"{name}.gz: {type(error).__name__}") from None
    return _unpack(name, bytes(data))


def _from_debian(temporary: Path, name: str) -> bytes:
    unpacked = temporary / "unpacked"
    if not unpacked.exists():
        _unpack_package(temporary, unpacked)
    path = unpacked / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
    if not path.is_file():
        raise SourceError(f"it has no {path.name}")
    return _unpack(name, path.read_bytes())


def _unpack_package(temporary: Path, unpacked: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceError(f"this machine has no {tool}")
    options = ["-o", f"Acquire::http::Timeout={CONNECT_TIMEOUT}", "-o", "Acquire::Retries=1", "-o", "APT::Sandbox::User="]
    private = [  # use our own package list (no root needed), in case the machine's is empty or outdated
        *("-o", f"Dir::State::Lists={temporary}/lists", "-o", f"Dir::Cache={temporary}/cache"),
    ]
    download = ["download", DEBIAN_PACKAGE]
    try:
        _run(["apt-get", *options, *download], temporary)
    except SourceError:
        (temporary / "lists/partial").mkdir(parents=True)
        (temporary / "cache/archives/partial").mkdir(parents=True)
        _run(["apt-get", *options, *private, "update"], temporary)
        _run(["apt-get", *options, *private, *download], temporary)
    package = next(temporary.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(package), str(unpacked)], temporary)


def _run(command: list[str], folder: Path) -> None:
    """Run a command, with its output to the terminal. If it fails, raises SourceError with the last line of its errors."""
    process = subprocess.run(command, cwd=folder, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise SourceError(f"{' '.join(command[:1] + command[-2:])}: {lines[-1]}")
