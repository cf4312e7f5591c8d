from pathlib import Path

import pytest

from ddpm.data import FILES, download
from ddpm.files import file_sha256

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory) -> Path:
    """A folder with Fashion-MNIST's four unpacked files, to read only."""
    cache = ROOT / ".cache"
    if all((cache / name).is_file() and file_sha256(cache / name) == digest for name, digest in FILES.items()):
        return cache
    raw = tmp_path_factory.mktemp("fashion-mnist")
    download(raw, cache)
    return raw
