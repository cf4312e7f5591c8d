"""The evaluator of a data set: found or trained once, the same every time, and doubted where its figures say little."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.data.dataset import Dataset
from ddpm.data.samples_file import Samples
from ddpm.errors import UserError
from ddpm.evaluation import classifier_training, evaluator
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.evaluator import doubts, find_evaluator
from ddpm.evaluation.features import extract
from ddpm.evaluation.judge import comparable_samples, draw_real, extract_all, judge
from ddpm.evaluation.metrics import fid
from ddpm.files import file_sha256
from ddpm.runtime.distributed import SINGLE_PROCESS
from helpers import CPU, class_images

ROOT = Path(__file__).resolve().parents[1]


def stripes(count: int, classes: tuple[str, ...]) -> Dataset:
    """Images of stripes, upright in class 0 and lying in class 1, under noise; or all upright, without classes."""
    g = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % max(1, len(classes))
        images = torch.randint(0, 60, (n, 16, 16), generator=g)
        images[labels == 0, :, ::4] += 180
        images[labels == 1, ::4] += 180
        return images.to(torch.uint8), labels

    return Dataset(*split(count), *split(count // 2), classes=classes)


@pytest.fixture
def quick(monkeypatch) -> None:
    """A short training."""
    short = classifier_training.OWN_RECIPE | {"least_steps": 30, "most_steps": 30, "batch_size": 32}
    for module in (classifier_training, evaluator):
        monkeypatch.setattr(module, "OWN_RECIPE", short)


def test_fashion_mnist_has_the_committed_one(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    found = find_evaluator("auto", "FashionMNIST", class_images(), "any", tmp_path, CPU)
    card = json.loads((ROOT / "models/classifier.json").read_text())
    assert (found.sha256, found.accuracy) == (card["sha256"], card["test_accuracy"])
    assert not list(tmp_path.iterdir())


def test_another_data_set_s_is_trained_once_and_the_same_every_time(tmp_path, quick, capsys):
    data = stripes(128, ("upright", "lying"))
    first, again, elsewhere = (find_evaluator("auto", "stripes", data, "a1", tmp_path / f, CPU) for f in ("x", "x", "y"))
    assert first.sha256 == again.sha256 == elsewhere.sha256
    assert capsys.readouterr().err.count("stripes has no evaluator yet") == 2  # in each folder once
    assert first.accuracy > 0.9
    assert first.path.parent == tmp_path / "x" and file_sha256(first.path) == first.sha256
    predicted = extract(first.classifier, data.test_images, CPU).predictions
    assert (predicted == data.test_labels).float().mean().item() == pytest.approx(first.accuracy)


def test_other_data_or_another_recipe_has_another_file(tmp_path, quick, monkeypatch):
    data = stripes(128, ("upright", "lying"))
    find_evaluator("auto", "stripes", data, "a1", tmp_path, CPU)
    find_evaluator("auto", "stripes", data, "b2", tmp_path, CPU)
    monkeypatch.setattr(evaluator, "OWN_RECIPE", evaluator.OWN_RECIPE | {"seed": 1})
    find_evaluator("auto", "stripes", data, "a1", tmp_path, CPU)
    assert len(list(tmp_path.glob("classifier-*.pth"))) == 3


def test_without_classes_the_evaluator_learns_quarter_turns(tmp_path, quick):
    data = stripes(128, ())
    data.images[:, :, :8] = 0  # so that up and down, left and right differ
    data.test_images[:, :, :8] = 0
    data.images[:, :8] //= 2
    data.test_images[:, :8] //= 2
    found = find_evaluator("auto", "stripes", data, "a1", tmp_path, CPU)
    assert found.classifier.classes == 4 and found.accuracy > 0.9


def test_a_file_of_other_classes_is_refused(tmp_path, quick):
    path = find_evaluator("auto", "stripes", stripes(128, ("upright", "lying")), "a1", tmp_path, CPU).path
    for suffix in (".pth", ".json"):
        shutil.copy(path.with_suffix(suffix), tmp_path / f"own{suffix}")
    own = tmp_path / "own.pth"
    assert find_evaluator(str(own), "stripes", stripes(128, ("a", "b")), "b2", tmp_path, CPU).path == own
    with pytest.raises(UserError, match=r"own\.pth: trained on an earlier stripes with other classes or colours; set evaluate"):
        find_evaluator(str(own), "stripes", stripes(128, ("a", "b", "c")), "b2", tmp_path, CPU)
    with pytest.raises(UserError, match=r"own\.pth: trained on stripes, not on dots; set evaluate\.classifier to auto$"):
        find_evaluator(str(own), "dots", stripes(128, ("a", "b")), "b2", tmp_path, CPU)


def labelled(*counts: int) -> Dataset:
    """Test images of so many of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.zeros(len(labels), 8, 8, dtype=torch.uint8)
    return Dataset(images, labels, images, labels, classes=tuple(map(str, range(len(counts)))) if len(counts) > 1 else ())


@pytest.mark.parametrize(
    ("accuracy", "data", "doubt"),
    [
        pytest.param(0.9, labelled(100, 100), None, id="good"),
        pytest.param(0.63, labelled(100, 100), None, id="a quarter of the way from guessing"),
        pytest.param(0.6, labelled(100, 100), "recognises 60% of the test images, where guessing gives 50%", id="hardly better"),
        pytest.param(0.91, labelled(900, 100), "91% of the test images, where guessing gives 90%", id="a frequent class"),
        pytest.param(0.3, labelled(200), "recognises 30% of the turns of test images, where guessing gives 25%", id="turns"),
        pytest.param(0.9, labelled(200), None, id="turns recognised"),
        pytest.param(1.0, labelled(60, 60), "there are only 120 test images", id="few images"),
    ],
)
def test_figures_that_say_little_are_doubted(accuracy, data, doubt):
    found = doubts(accuracy, data)
    assert found is None if doubt is None else doubt in found


def test_larger_images_are_averaged_down():
    torch.manual_seed(0)
    network = Classifier(3, 3).eval()
    small = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.allclose(network(large)[0], network(small)[0], atol=1e-5)


@pytest.mark.parametrize(("size", "batch"), [(28, 250), (32, 195), (64, 48), (256, 3), (1024, 1)])
def test_batches_shrink_as_images_grow(size, batch, monkeypatch):
    seen = []

    class Counting(Classifier):
        def forward(self, images):
            seen.append(len(images))
            return torch.zeros(len(images), 128), torch.zeros(len(images), 2)

    images = torch.zeros(1, size, size, dtype=torch.uint8).expand(500, size, size)
    extract(Counting(2), images, CPU)
    assert sum(seen) == 500 and max(seen) == batch


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), drawn=st.integers(1, 60))
def test_real_images_are_drawn_by_class_where_there_are_enough(counts, drawn):
    pool = labelled(*counts).test_labels
    drawn = min(drawn, len(pool))
    labels = torch.arange(drawn) % len(counts)
    chosen = draw_real(pool, labels, 0)
    assert len(chosen.unique()) == len(chosen) == drawn
    if (labels.bincount(minlength=len(counts)) <= torch.tensor(counts)).all() and drawn >= len(counts):
        assert torch.equal(pool[chosen].bincount(minlength=len(counts)), labels.bincount(minlength=len(counts)))


def test_more_samples_than_test_images_are_judged_as_far_as_a_floor_reaches(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = class_images()
    images = torch.randint(0, 256, (90, 28, 28), generator=g).to(torch.uint8)
    samples = comparable_samples(Samples(images, torch.arange(90) % 10, None), data)
    assert len(samples.images) == len(samples.labels) == len(data.test_images) == 40
    assert torch.equal(samples.images, images[:40])
    network = Classifier().eval()
    metrics, _ = judge(samples, data, extract_all(network, samples.images, data, CPU, tmp_path, SINGLE_PROCESS), CPU)
    train, test = (extract(network, x, CPU).features for x in (data.images, data.test_images))
    assert metrics["fid_floor"] == pytest.approx(fid(test, train), rel=1e-3)
    assert metrics["fid"] == pytest.approx(fid(extract(network, images[:40], CPU).features, train), rel=1e-3)
    assert np.isfinite(list(metrics.values())).all()


def test_classes_of_one_image_can_be_halved_together():
    data = class_images(12)
    card = classifier_training.evaluate_classifier(Classifier().eval(), data)
    assert np.isfinite(list(card.values())).all()
