"""MNIST and CIFAR-10 by their names: from a local server in place of the real ones, and from a folder of the same files.

The files are small ones of the same form, whose hashes take the place of the real ones in torchvision's classes.
"""

import functools
import gzip
import hashlib
import io
import pickle
import re
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, MNIST

from ddpm.data.dataset import load_dataset
from ddpm.data.idx import idx_header
from ddpm.errors import UserError
from ddpm.paths import raw_folder
from ddpm.sources.named import take_named
from ddpm.sources.raw_files import Taken

NOWHERE = "http://127.0.0.1:9/"  # a port that nothing listens on
RNG = np.random.default_rng(0)
DIGITS = {"train": RNG.integers(0, 256, (40, 28, 28), np.uint8), "t10k": RNG.integers(0, 256, (20, 28, 28), np.uint8)}
PHOTOS = {f"data_batch_{i}": RNG.integers(0, 256, (10, 3, 32, 32), np.uint8) for i in range(1, 6)}
PHOTOS["test_batch"] = RNG.integers(0, 256, (20, 3, 32, 32), np.uint8)
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A folder with both data sets' packed files, whose hashes torchvision expects. Their servers are out of reach."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "published"
    folder.mkdir()
    for split, images in DIGITS.items():
        labels = np.arange(len(images), dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_header(array.shape) + array.tobytes()))
    monkeypatch.setattr(MNIST, "resources", [(name, md5(folder / name)) for name, _ in MNIST.resources])
    monkeypatch.setattr(MNIST, "mirrors", [NOWHERE])

    batches = {name: {"data": x.reshape(len(x), -1), "labels": [i % 10 for i in range(len(x))]} for name, x in PHOTOS.items()}
    batches["batches.meta"] = {"label_names": NAMES}
    contents = {name: pickle.dumps(batch) for name, batch in batches.items()}
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    hashes = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, hashes[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashes["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashes["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(folder / CIFAR10.filename))
    monkeypatch.setattr(CIFAR10, "url", f"{NOWHERE}{CIFAR10.filename}")
    return folder


@pytest.fixture
def server(published, monkeypatch):
    """Serves these files. Its list `asked` has what was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(Path(self.path).name)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=published)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [NOWHERE, url])
        monkeypatch.setattr(CIFAR10, "url", f"{url}{CIFAR10.filename}")
        running.asked = asked
        yield running
        running.shutdown()


def take(name: str, folder: Path | None = None, size: int | None = None) -> Taken:
    return take_named(name, raw_folder(name), Path("cache"), folder, size)


def has_digits() -> bool:
    data = load_dataset("MNIST")
    assert data.test_labels.tolist() == [*range(10)] * 2
    return np.array_equal(data.images.numpy(), DIGITS["train"]) and np.array_equal(data.test_images.numpy(), DIGITS["t10k"])


def has_photos() -> bool:
    data = load_dataset("CIFAR10")
    assert data.classes == tuple(NAMES)
    expected = np.concatenate([PHOTOS[f"data_batch_{i}"] for i in range(1, 6)]).transpose(0, 2, 3, 1)
    return np.array_equal(data.images.numpy(), expected)


def test_mnist_is_downloaded_once(server):
    assert str(take("MNIST")) == "60 grey images of 28×28 pixels, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert has_digits()
    assert sorted(set(server.asked)) == sorted(name for name, _ in MNIST.resources)
    server.asked.clear()
    take("MNIST")
    assert has_digits() and not server.asked  # from the cache


def test_cifar10_is_downloaded_once(server):
    assert str(take("CIFAR10")).startswith("70 colour images of 32×32 pixels, 10 classes: airplane, automobile, bird")
    assert has_photos()
    server.asked.clear()
    take("CIFAR10")
    assert has_photos() and not server.asked


def test_a_damaged_file_in_the_cache_is_downloaded_again(server):
    take("MNIST")
    path = Path("cache/train-images-idx3-ubyte.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    server.asked.clear()
    take("MNIST")
    assert has_digits() and path.read_bytes() == whole and set(server.asked) == {path.name}


@pytest.mark.parametrize(("name", "is_there"), [("MNIST", has_digits), ("CIFAR10", has_photos)])
def test_a_folder_of_the_same_files_needs_no_network(published, name, is_there):
    taken = take(name, published)
    assert is_there()
    assert taken.notes == [f"held out for testing: {name}'s own test images"]


@pytest.mark.parametrize(("name", "shape"), [("MNIST", (16, 16)), ("CIFAR10", (48, 48, 3))])
def test_a_named_set_can_be_scaled(published, name, shape):
    taken = take(name, published, shape[0])
    assert taken.notes[1] in ("scaled from 28×28 pixels", "scaled from 32×32 pixels")
    data = load_dataset(name)
    assert data.images.shape[1:] == data.test_images.shape[1:] == shape
    whole = {"MNIST": DIGITS["train"], "CIFAR10": PHOTOS["data_batch_1"]}[name]
    assert data.images[:10].float().mean().item() == pytest.approx(whole[:10].mean(), abs=1)


@pytest.mark.parametrize(
    ("name", "files"), [("MNIST", "train-images-idx3-ubyte.gz and train-labels"), ("CIFAR10", "cifar-10-python.tar.gz")]
)
def test_without_a_network_one_line_says_what_to_do(published, name, files):
    with pytest.raises(UserError, match=rf"^{name} could not be downloaded \(.*refused.*\); put {re.escape(files)}") as caught:
        take(name)
    assert str(caught.value).endswith("into a folder, set data.folder in params.yaml to it, and run again")
    assert "\n" not in str(caught.value)
    assert not raw_folder(name).exists()


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_other_bytes_from_the_server_are_refused(server, published, name):
    path = published / {"MNIST": "t10k-labels-idx1-ubyte.gz", "CIFAR10": CIFAR10.filename}[name]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"^{name} could not be downloaded \(File not found or corrupted"):
        take(name)


def test_other_bytes_in_the_folder_are_refused(published):
    path = published / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz: not MNIST's file of that name \(its MD5 differs\)$"):
        take("MNIST", published)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_a_folder_without_the_files_is_refused_even_if_the_cache_has_them(published, tmp_path, name):
    take(name, published)
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        UserError, match=rf"^data\.folder: .*photos: has none of {name}'s files \(.*\); for images of yours, choose"
    ):
        take(name, tmp_path / "photos")
