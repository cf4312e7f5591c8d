"""Fashion-MNIST: a verified download, and the whole set as one uint8 tensor.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017:
60 000 training and 10 000 test images of ten classes of garments, 28×28, grey.
"""

import gzip
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import requests
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.files import sha256, write_atomic
from ddpm.params import UserError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
RAW = Path("data/FashionMNIST/raw")  # where torchvision.datasets.FashionMNIST("data") looks

FILES = {  # SHA-256 of the unpacked bytes: whatever the source, these bytes or an error
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)  # torchvision's; plain http, hence the hashes
DEBIAN_PACKAGE = "dataset-fashion-mnist"
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30  # seconds


class SourceError(Exception):
    """Why a source gives nothing."""


class FileError(SourceError):
    """Why a source does not give one file; it may give the others."""


def load_split(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """The "train" or "test" split in the folder `raw`: images uint8 [N, 28, 28] and labels int64 [N].

    Raises UserError if a file is missing or its bytes are not those of Fashion-MNIST.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_verified(raw / f"{prefix}-images-idx3-ubyte")
    labels = _read_verified(raw / f"{prefix}-labels-idx1-ubyte")
    return (
        torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28).copy()),
        torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)),
    )


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28] → float32 [N, 1, 28, 28] in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float [N, 1, 28, 28] in [-1, 1] → uint8 [N, 28, 28], rounded, out-of-range values clipped."""
    return ((x.float().squeeze(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def download(raw: Path, cache: Path, folder: Path | None = None, mirrors: Sequence[str] = MIRRORS, debian: bool = True) -> None:
    """Put the four verified files into `raw`.

    Tries in order: the files already verified in `cache`; `folder`, which holds them packed or unpacked; each of
    `mirrors`; the Debian package. A source need not have all four: the next one is asked for what is still missing.
    Every file is verified, then renamed into place, so that an interrupted download leaves nothing that looks finished.
    Raises UserError that lists every source and why it failed.
    """
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
            f"Fashion-MNIST could not be had: {', '.join(missing)} missing. Tried:\n"
            + "".join(f"  - {failure}\n" for failure in failures)
            + "Put the four .gz files (or the unpacked ones) into a folder, name it in params.yaml as"
            " runtime.data_folder, and run again."
        )
    for name in FILES:
        write_atomic(raw / name, (cache / name).read_bytes())


def _is_verified(path: Path) -> bool:
    return path.is_file() and sha256(path.read_bytes()) == FILES[path.name]


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


def _verify(name: str, data: bytes) -> None:
    if sha256(data) != FILES[name]:
        raise FileError(f"{name} has the wrong bytes (SHA-256 {sha256(data)[:12]}…, {FILES[name][:12]}… expected)")


def _unpack(name: str, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise FileError(f"{name}.gz is not a whole gzip file ({error})") from None


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
    except Exception as error:  # requests passes urllib3's errors of the raw stream through as they are
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
    private = [  # a package list of our own, where the machine's is empty or old: no root needed
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
    """Run a command whose own progress goes to the terminal; its last error line is the reason if it fails."""
    process = subprocess.run(command, cwd=folder, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise SourceError(f"{' '.join(command[:1] + command[-2:])}: {lines[-1]}")
