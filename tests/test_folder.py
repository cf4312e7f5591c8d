"""Other data sets than Fashion-MNIST: out of a user's folder, larger than memory, and through the whole pipeline."""

import gzip
import json
import re
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torchvision
import yaml
from mlflow import MlflowClient
from PIL import Image, ImageDraw, ImageFont

import crash
from clones import edit_params, environment
from ddpm.data.dataset import load_dataset
from ddpm.data.idx import idx_header, map_idx
from ddpm.errors import UserError
from ddpm.sources.user_folder import existing_folder, take_folder
from helpers import commit, copied, mlflow_runs, run, stages_run, start

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
    with pytest.raises(UserError, match=r"003\.png: not an image, or a damaged one"):
        taken(workspace / "colours")
    with pytest.raises(UserError, match=r"`python src/download.py` recreates it$"):
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


@pytest.mark.parametrize("place", ["data/mine/raw", "data/mine/raw/pictures"])
def test_the_data_set_s_own_folder_is_not_taken_and_stays(workspace, place):
    mnist(folder := workspace / place, packed=False)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"the data set will be written to this folder; move your files elsewhere first$"):
        take_folder(folder, Path("data/mine/raw"))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "line"),
    [
        pytest.param("/nope", "/nope: there is no such folder", id="missing"),
        pytest.param("~nobody-here/x", "~nobody-here/x: there is no user nobody-here", id="of nobody"),
        pytest.param("{workspace}/file", "{workspace}/file: there is no such folder", id="a file"),
        pytest.param("/" + "x" * 300, f"/{'x' * 300}: can't be read (File name too long)", id="too long a name"),
    ],
)
def test_a_folder_that_is_not_there_is_told(workspace, name, line):
    (workspace / "file").touch()
    with pytest.raises(UserError, match=f"^data.folder: {re.escape(line.format(workspace=workspace))}$"):
        existing_folder(name.format(workspace=workspace))


def test_a_folder_may_be_under_one_s_home(workspace, monkeypatch):
    monkeypatch.setenv("HOME", str(workspace))
    (workspace / "pets").mkdir()
    assert existing_folder("~/pets") == workspace / "pets"


def test_mnist_s_format_can_be_scaled(workspace):
    arrays = mnist(workspace / "given", packed=True)
    take_folder(workspace / "given", Path("data/mine/raw"), 14)
    data = load_dataset("mine")
    assert data.images.shape == (60, 14, 14) and data.test_labels.tolist() == [1, 2, 0] * 4
    halved = arrays["train-images-idx3-ubyte"].reshape(60, 14, 2, 14, 2).mean((2, 4))
    assert np.corrcoef(data.images.numpy().ravel(), halved.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0"])
def test_a_file_of_another_length_is_told_when_it_is_scaled_too(workspace, change):
    mnist(folder := workspace / "given", packed=False)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: corrupt: shorter or longer than its header says$"):
        take_folder(folder, Path("data/mine/raw"), 14)


def test_a_single_label_is_no_class(workspace):
    mnist(folder := workspace / "given", packed=False)
    for prefix, count in (("train", 60), ("t10k", 12)):
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_header((count,)) + bytes([7] * count))
    assert taken(folder).classes == ()


FAULTS = [
    (lambda folder: folder.mkdir(), "{folder}: has no images, and no file train-images-idx3-ubyte"),
    (lambda folder: pictures(folder, 69), "{folder}: 9 images for testing are too few; at least 10 are needed (one in 7"),
    (image_folder(a__x_png=b"no image"), "{folder}/a/x.png: not an image, or a damaged one"),
    (image_folder(a__x_png=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "{folder}/a/x.png: can't be read (Truncated File Read)"),
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
    (evaluator,) = (clone / ".cache").glob("classifier-*.json")
    assert metrics["class_accuracy_real"] == 1
    assert metrics["fid"] > metrics["fid_floor"]
    with Image.open(clone / "output/generated_samples.png") as grid:
        assert grid.mode == "RGB"

    assert metrics["evaluator"] == json.loads(evaluator.read_text())["sha256"][:12]

    deep = {"train": {"model": {"channels": [16, 32, 64, 64, 64]}}}
    halved = "5 levels would halve 8×8 pixels unevenly; use fewer, or set data.size to 32"
    for changes, stage, line in (
        (
            {"evaluate": {"classifier": "models/classifier.pth"}},
            "evaluate",
            "models/classifier.pth: trained on FashionMNIST, not on",
        ),
        (deep, "train", f"params.yaml: train.model.channels: {halved}"),
        ({"sample": {"classes": [12]}}, "train", "params.yaml: sample.classes: 12, but colours has the classes 0 to 2"),
    ):
        edit_params(clone, changes)
        _, errors = (process := start(clone, "python", f"src/{stage}.py")).communicate()
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith(f"error: {line}")
        run(clone, "git", "checkout", "--quiet", "params.yaml")
        edit_params(clone, {"data": yaml.safe_load((coloured_run / "params.yaml").read_text())["data"]})


@pytest.mark.slow
def test_experiments_on_other_images_have_their_own_names_and_one_evaluator(coloured_run, tmp_path):
    clone = copied(coloured_run, tmp_path)
    commit(clone, "colours")
    run(clone, "dvc", "exp", "run", "--temp", "--name", "few-steps", "--set-param", "sample.steps=3")
    table = run(clone, "python", "src/compare.py")
    assert re.search(r"few-steps +sample\.steps=3 ", table)
    assert "evaluator" not in table  # a title for those of another evaluator would have the word
    run(clone, "python", "src/report.py")
    page = re.sub(r"base64,[^\"]+", "", (clone / "output/report.html").read_text())
    for text in (table, page):
        assert not re.search("fashion|garment", text, re.IGNORECASE)
    assert "a diffusion model of colours" in page

    evaluations = mlflow_runs(clone, "evaluate")
    (evaluator,) = {run.data.tags["evaluator_sha256"] for run in evaluations}
    assert len(evaluations) == 2
    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("colours-ddpm", "champion")
    assert champion.tags["evaluator_sha256"] == evaluator
    assert not re.search("fashion|garment", champion.description, re.IGNORECASE)


def letters(folder: Path) -> None:
    """20 letters from the fonts that come with matplotlib: red, on a transparent background, cut out tightly.

    One font in six is for validation.
    """
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
    fonts = [path for path in fonts if path.name.startswith(("DejaVu", "STIXGeneral", "cmr", "cmss", "cmtt", "cmb"))]
    for i, path in enumerate(fonts):
        font = ImageFont.truetype(path, 40)
        for letter in "ABCDEFGHJKLMNOPRSTUV":
            left, top, right, bottom = font.getbbox(letter)
            if right <= left or bottom <= top:  # the font lacks it
                continue
            image = Image.new("RGBA", (int(right - left), int(bottom - top)), (0, 255, 0, 0))
            ImageDraw.Draw(image).text((-left, -top), letter, (200, 0, 0, 255), font)
            file = folder / ("Val" if i % 6 == 5 else "Train") / letter / f"{path.stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)


@pytest.mark.slow
def test_letters_of_published_fonts_through_the_whole_pipeline(tmp_path):
    """Transparent, of mixed sizes, split into Train and Val; two edits and the size, so that it takes seconds."""
    letters(tmp_path / "letters")
    clone = crash.clone(tmp_path)
    edit_params(clone, {"data": {"name": "letters", "folder": str(tmp_path / "letters"), "size": 16}})
    output = run(clone, "dvc", "repro")
    assert stages_run(output) == ["download", "train", "sample", "evaluate"]
    assert re.search(r"colour images of 16×16 pixels, 20 classes: A, B, C, D, E, F, G, H, J, K, …, V ", output)
    assert re.search(r"one class per folder; held out for testing: \d+ images, those in Val\n", output)
    data = np.fromfile(clone / "data/letters/raw/train-images-idx4-ubyte", np.uint8, offset=20)
    corners = data.reshape(-1, 16, 16, 3)[:, ::15, ::15].reshape(-1, 3)
    assert not (corners == (0, 255, 0)).all(1).any() and (corners == 255).all(1).mean() > 0.3  # white where nothing is
    metrics = json.loads((clone / "output/metrics/evaluate.json").read_text())
    assert metrics["class_accuracy_real"] > 0.5  # ten times as often as by guessing
    (judged,) = re.findall(r"evaluate: fid [\d.]+ of the first (\d+) samples, \d+ × the floor of real images", output)
    assert int(judged) == int.from_bytes((clone / "data/letters/raw/t10k-labels-idx1-ubyte").read_bytes()[4:8], "big")
    with Image.open(clone / "output/generated_samples.png") as grid:
        assert grid.height > 20 * 32  # one row per class
