"""Other data sets than Fashion-MNIST: out of a user's folder, larger than memory, and through the whole pipeline."""

import gzip
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from clones import edit_params, environment
from ddpm.data.dataset import load_dataset
from ddpm.data.idx import idx_header, map_idx
from ddpm.errors import UserError
from ddpm.sources.user_folder import take_folder
from helpers import copied, start

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty one, where data sets are put."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: Path, count: int, size: int = 16, mode: str = "L", suffix: str = ".png", seed: int = 0) -> dict[str, bytes]:
    """Random images in `folder`: the pixels of each."""
    folder.mkdir(parents=True, exist_ok=True)
    g, pixels = np.random.default_rng(seed), {}
    for i in range(count):
        array = g.integers(0, 256, (size, size, 3) if mode == "RGB" else (size, size), np.uint8)
        Image.fromarray(array).save(folder / f"{i:03d}{suffix}")
        pixels[f"{folder.name}/{i:03d}"] = array.tobytes()
    return pixels


def taken(folder: Path, name: str = "mine"):
    take_folder(folder, Path("data") / name / "raw")
    return load_dataset(name)


def content(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_in_sub_folders_are_classes_and_every_seventh_is_held_out(workspace, mode):
    cats, dogs = (pictures(workspace / "all" / name, 70, mode=mode, seed=i) for i, name in enumerate(("cat", "big dog")))
    data = taken(workspace / "all")
    assert data.classes == ("big dog", "cat")
    assert data.image_shape == (1 if mode == "L" else 3, 16, 16)
    assert (len(data.images), len(data.test_images)) == (120, 20)
    assert data.test_labels.bincount().tolist() == [10, 10]
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        assert content(images[labels == 1]) <= set(cats.values())
        assert content(images[labels == 0]) <= set(dogs.values())
    assert content(data.images) | content(data.test_images) == {*cats.values(), *dogs.values()}
    assert not content(data.images) & content(data.test_images)
    assert 2 <= data.test_labels[:10].sum() <= 8  # the first of them stand for all


def test_images_without_classes_in_train_and_test(workspace):
    train, test = pictures(workspace / "all/train", 30), pictures(workspace / "all/test", 10, suffix=".bmp", seed=1)
    (workspace / "all/train/.hidden.png").write_bytes(b"")
    data = taken(workspace / "all")
    assert data.classes == ()
    assert (data.labels.unique().tolist(), data.test_labels.unique().tolist()) == ([0], [0])
    assert (content(data.images), content(data.test_images)) == (set(train.values()), set(test.values()))


def test_taking_a_folder_again_leaves_nothing_old(workspace):
    pictures(workspace / "grey", 70)
    taken(workspace / "grey")
    pictures(workspace / "colours", 70, mode="RGB")
    assert taken(workspace / "colours").image_shape == (3, 16, 16)

    (workspace / "colours/003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"003\.png: not a complete image"):
        taken(workspace / "colours")
    with pytest.raises(UserError, match=r"ubyte: there is no such file; "):
        load_dataset("mine")


@pytest.mark.parametrize("content", [None, b"", b"\xff\n", b"one\ntwo\n"])
def test_a_list_of_classes_that_is_none_is_told(workspace, content):
    mnist(workspace / "all", packed=False)
    assert len(taken(workspace / "all").classes) == 3
    path = workspace / "data/mine/raw/classes.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data/mine/raw.*; `python src/download.py` recreates it$"):
        load_dataset("mine")


def mnist(folder: Path, packed: bool, dot: bool = False) -> dict[str, np.ndarray]:
    """A small set in MNIST's format, whose labels are 3, 5 and 9."""
    folder.mkdir(parents=True)
    g, arrays = np.random.default_rng(0), {}
    for prefix, count in (("train", 60), ("t10k", 12)):
        arrays[f"{prefix}-images-idx3-ubyte"] = g.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.tile(np.array([5, 9, 3], np.uint8), count // 3)
    for name, array in arrays.items():
        data, name = idx_header(array.shape) + array.tobytes(), name.replace("-idx", ".idx") if dot else name
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return arrays


@pytest.mark.parametrize(("packed", "dot"), [(True, False), (False, False), (False, True)])
def test_mnist_s_own_format_is_taken_and_torchvision_reads_it(workspace, packed, dot):
    arrays = mnist(workspace / "given", packed, dot)
    data = taken(workspace / "given", "MNIST")
    assert data.classes == ("3", "5", "9")
    assert np.array_equal(data.images.numpy(), arrays["train-images-idx3-ubyte"])
    assert data.test_labels.tolist() == [1, 2, 0] * 4
    theirs = torchvision.datasets.MNIST("data", train=False)
    assert torch.equal(theirs.data, data.test_images) and torch.equal(theirs.targets, data.test_labels)


def spoil(name: str, change):
    def apply(folder: Path) -> None:
        mnist(folder, packed=False)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def image_folder(**images: Image.Image | bytes | None):
    """Makes a folder of good images and these."""

    def apply(folder: Path) -> None:
        pictures(folder / "a", 80)
        for name, image in images.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image) if isinstance(image, bytes) else image.save(path)

    return apply


def test_the_data_set_s_own_folder_is_not_taken_and_stays(workspace):
    mnist(raw := workspace / "data/mine/raw", packed=False)
    before = {path: path.read_bytes() for path in raw.iterdir()}
    with pytest.raises(UserError, match=r"the data set will be written to this folder; move your files elsewhere first$"):
        take_folder(raw, Path("data/mine/raw"))
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


FAULTS = [
    (lambda folder: None, "data.folder: {folder}: there is no such folder"),
    (
        lambda folder: folder.mkdir(),
        "{folder}: has no images (.bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp) and no train-",
    ),
    (lambda folder: pictures(folder, 69), "{folder}: 9 images for testing are too few; at least 10 are needed, or 70 that"),
    (image_folder(a__x_png=b"no image"), "{folder}/a/x.png: not a complete image ("),
    (image_folder(a__x_png=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "{folder}/a/x.png: not a complete image ("),
    (
        image_folder(a__x_png=Image.new("L", (16, 15))),
        "{folder}/a/x.png: is 16×15; all images should be 16×16, as {folder}/a/000.png ",
    ),
    (
        image_folder(a__x_png=Image.new("L", (32, 32))),
        "{folder}/a/x.png: is 32×32; all images should be 16×16, as {folder}/a/000.png ",
    ),
    (image_folder(a__000_png=Image.new("L", (8, 9))), "{folder}/a/000.png: is 8×9; all images should be square"),
    (
        image_folder(a__x_png=Image.new("I;16", (16, 16))),
        "{folder}/a/x.png: has more than 8 bits per pixel and channel; convert it first",
    ),
    (image_folder(x_png=Image.new("L", (16, 16))), "{folder}/x.png: an image next to sub-folders of images; put each image "),
    (
        lambda folder: [pictures(folder / "train/a", 9), pictures(folder / "test/b", 9)],
        "{folder}: train has classes ['a'], test has ['b']; they should be the same",
    ),
    (
        spoil("train-images-idx3-ubyte", lambda b: b[:-1]),
        "{folder}/train-images-idx3-ubyte: corrupt: shorter or longer than its header says",
    ),
    (spoil("t10k-images-idx3-ubyte", lambda b: b + b"\0"), "{folder}/t10k-images-idx3-ubyte: corrupt: shorter or longer than "),
    (spoil("train-images-idx3-ubyte", lambda b: b"PNG" + b), "{folder}/train-images-idx3-ubyte: not in MNIST's format"),
    (
        spoil("train-images-idx3-ubyte", lambda b: idx_header((60, 28, 14)) + b[16:]),
        "{folder}/train-images-idx3-ubyte: its shape is 60×28×14; ",
    ),
    (spoil("t10k-labels-idx1-ubyte", lambda b: b[:-1]), "{folder}/t10k-labels-idx1-ubyte: corrupt, or not a list of labels"),
    (
        spoil("t10k-labels-idx1-ubyte", lambda b: idx_header((11,)) + b[9:]),
        "{folder}/t10k-images-idx3-ubyte: 12 images, but there are 11 ",
    ),
    (
        spoil("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\7"),
        "{folder}: label 7 is in the test set, but not in the training set",
    ),
    (
        lambda folder: [mnist(folder, packed=False), (folder / "t10k-labels-idx1-ubyte").unlink()],
        "{folder}: has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz",
    ),
    (
        lambda folder: [mnist(folder, True), p := folder / "train-images-idx3-ubyte.gz", p.write_bytes(p.read_bytes()[:-900])],
        "{folder}/train-images-idx3-ubyte.gz: can't be read (",
    ),
]


@pytest.mark.parametrize(("make", "line"), FAULTS, ids=[re.sub(r"\W+", " ", line)[7:60] for _, line in FAULTS])
def test_a_bad_folder_is_told_in_a_line(workspace, make, line):
    folder = workspace / "given"
    make(folder)
    with pytest.raises(UserError) as caught:
        taken(folder)
    assert str(caught.value).startswith(line.format(folder=folder))
    assert "\n" not in str(caught.value)
    assert not (workspace / "data/mine/raw/classes.txt").exists()  # comes last


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b"\1" + b[1:]])
def test_a_damaged_file_of_the_stage_is_noticed(workspace, change):
    pictures(workspace / "all", 70)
    taken(workspace / "all")
    path = workspace / "data/mine/raw/train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"idx3-ubyte: corrupt, or not in MNIST's format; `python src/download.py` recreates it"):
        load_dataset("mine")


def test_mapped_bytes_are_those_of_the_file(workspace):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    path = workspace / "x-idx4-ubyte"
    path.write_bytes(idx_header(array.shape) + array.tobytes())
    path.chmod(0o444)  # as DVC's links are
    assert np.array_equal(map_idx(path)[torch.tensor([4, 0, 4])].numpy(), array[[4, 0, 4]])


LIMITED = """
import resource, sys, torch
from pathlib import Path
from ddpm.data.dataset import load_dataset as load_data
from ddpm.training.loop import train
from ddpm.training.step import Execution
from helpers import CPU, Recorder, params

resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
data = load_data("huge")
try:
    bytearray(data.images.nbytes)
except MemoryError:
    print("it would not fit")
train(params(steps=20), data.to(CPU), Path("."), Recorder(), Execution(CPU))
print(f"trained on {data.images.nbytes >> 30} GiB")
"""


@pytest.mark.slow
def test_a_set_larger_than_memory_trains(workspace):
    """Six GiB that take no room on the disk, in a process that may have three."""
    raw, count = workspace / "data/huge/raw", (6 << 30) // 784
    raw.mkdir(parents=True)
    for prefix, n in (("train", count), ("t10k", 1000)):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            with (raw / f"{prefix}-{kind}-ubyte").open("wb") as file:
                file.write(header := idx_header(shape))
                file.truncate(len(header) + int(np.prod(shape)))
    (raw / "classes.txt").write_text("black\n")
    here = {**environment(), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    (workspace / "limited.py").write_text(LIMITED)
    done = subprocess.run(["python", "limited.py"], env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["it would not fit", "trained on 5 GiB"]


@pytest.mark.slow
def test_a_folder_of_coloured_images_through_the_whole_pipeline(coloured_run, tmp_path):
    clone = copied(coloured_run, tmp_path)
    samples = np.load(clone / "output/samples.npz")
    assert samples["images"].shape == (30, 16, 16, 3)
    colours = samples["images"].mean((1, 2)).argmax(1)
    assert (colours == np.array([2, 1, 0])[samples["labels"]]).mean() > 0.8  # blue, green, red: in alphabetical order
    metrics = json.loads((clone / "output/metrics/evaluate.json").read_text())
    assert metrics["class_accuracy_real"] == 1
    assert metrics["fid"] > metrics["fid_floor"]
    with Image.open(clone / "output/generated_samples.png") as grid:
        assert grid.mode == "RGB"

    edit_params(
        clone, {"evaluate": {"classifier": "models/classifier.pth"}, "train": {"model": {"channels": [16, 32, 64, 64, 64]}}}
    )
    for stage, line in (
        ("train", "error: params.yaml: train.model.channels: 5 levels would halve 8×8 pixels unevenly; use fewer"),
        ("evaluate", "error: models/classifier.pth: trained on FashionMNIST, not on colours; "),
    ):
        _, errors = (process := start(clone, "python", f"src/{stage}.py")).communicate()
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith(line)
