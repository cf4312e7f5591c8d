"""The evaluation's own parts, which choose what is compared, and the evaluator's augmentation."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.data.fashion_mnist import load_split
from ddpm.data.samples_file import read_samples
from ddpm.errors import UserError
from ddpm.evaluation import classifier_training
from ddpm.evaluation.classifier_training import augment, turned
from ddpm.evaluation.features import extract
from ddpm.evaluation.judge import class_balanced
from ddpm.params_file import load_params
from ddpm.tracking.provenance import drawn_from

DRAWN_AGAIN = "`dvc repro sample` draws them again"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 200), draw=st.integers(0, 5))
def test_class_balanced_draws_as_many_of_each_class_without_repeats(seed, n, draw):
    pool = torch.randint(0, 10, (3000,), generator=seeded(seed))
    labels = torch.randint(0, 10, (n,), generator=seeded(seed + 1))
    chosen = class_balanced(pool, labels, draw)
    assert torch.equal(pool[chosen].bincount(minlength=10), labels.bincount(minlength=10))
    assert len(chosen.unique()) == len(chosen) == n
    assert torch.equal(chosen, class_balanced(pool, labels, draw))


def test_class_balanced_draws_differ_and_are_no_prefix_of_the_pool():
    pool = torch.arange(10).repeat(100)
    labels = torch.arange(10).repeat(20)
    draws = [set(class_balanced(pool, labels, draw).tolist()) for draw in range(5)]
    assert len({frozenset(draw) for draw in draws}) == 5
    assert all(max(draw) > 900 for draw in draws)


def test_class_balanced_can_take_the_whole_pool_but_no_more():
    pool = torch.tensor([0, 1, 1, 2])
    assert sorted(class_balanced(pool, pool, 0).tolist()) == [0, 1, 2, 3]
    assert class_balanced(pool, torch.tensor([0, 0]), 0) is None
    assert class_balanced(pool, torch.tensor([5]), 0) is None


def test_fewer_labels_of_no_class_than_classes_have_no_balance():
    assert class_balanced(torch.arange(20).repeat(3), torch.full((19,), -1), 0) is None


def test_labels_of_no_class_stand_for_every_class_equally():
    pool = torch.arange(10).repeat(50)
    assert pool[class_balanced(pool, torch.full((70,), -1), 0)].bincount().tolist() == [7] * 10
    mixed = torch.tensor([3] * 5 + [-1] * 20)
    assert pool[class_balanced(pool, mixed, 0)].bincount().tolist() == [2, 2, 2, 7, 2, 2, 2, 2, 2, 2]
    assert class_balanced(pool, torch.full((510,), -1), 0) is None


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
LABELS = np.arange(20) % 11 - 1


def test_samples_come_back_as_they_were_saved(tmp_path):
    np.savez_compressed(tmp_path / "samples.npz", images=IMAGES, labels=LABELS)
    read = read_samples(tmp_path / "samples.npz")
    images, labels, checkpoint = read.images, read.labels, read.checkpoint_sha256
    assert checkpoint is None
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), IMAGES)
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), LABELS)


def test_missing_samples(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: there is no such file; `dvc repro sample` makes it')}$"):
        read_samples(path)


def archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in members.items():
            z.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no archive", id="text"),
        pytest.param(archive(images=IMAGES, labels=LABELS)[:-30], id="cut short"),
        pytest.param(archive(images=IMAGES), id="without labels"),
        pytest.param(archive(labels=LABELS), id="without images"),
        pytest.param(single_array(), id="one array"),
        pytest.param(archive(images=IMAGES.astype(object), labels=LABELS), id="pickled objects"),
        pytest.param(archive(images=IMAGES.astype(str), labels=LABELS), id="text arrays"),
        pytest.param(zipped(images=b"", labels=b""), id="empty members"),
    ],
)
def test_damaged_samples(tmp_path, content):
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    line = f"{path}: corrupt, or without images and labels; {DRAWN_AGAIN}"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        read_samples(path)


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param({"images": IMAGES / 255, "labels": LABELS}, id="float images"),
        pytest.param({"images": IMAGES[:, None, None], "labels": LABELS}, id="five dimensions"),
        pytest.param({"images": IMAGES[:, 0], "labels": LABELS}, id="rows of images"),
        pytest.param({"images": IMAGES, "labels": LABELS[:-1]}, id="a label too few"),
        pytest.param({"images": IMAGES, "labels": LABELS[:, None]}, id="labels of two dimensions"),
        pytest.param({"images": IMAGES, "labels": LABELS / 2}, id="float labels"),
    ],
)
def test_samples_of_another_kind(tmp_path, arrays):
    path = tmp_path / "samples.npz"
    path.write_bytes(archive(**arrays))
    with pytest.raises(
        UserError,
        match=f"^{re.escape(f'{path}: images must be uint8 [N, H, H] or [N, H, H, 3] with N int64 labels; {DRAWN_AGAIN}')}",
    ):
        read_samples(path)


def test_a_changed_byte_of_the_samples_is_noticed_or_harmless(tmp_path):
    path, data = tmp_path / "samples.npz", archive(images=IMAGES, labels=LABELS)
    generator = np.random.default_rng(1)
    noticed = 0
    edges = [*range(130), *range(len(data) - 250, len(data))]  # the archive's own structures
    for position in [*edges, *generator.integers(0, len(data), 300).tolist()]:
        spoilt = bytearray(data)
        spoilt[position] ^= int(generator.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            read = read_samples(path)
            images, labels = read.images, read.labels
        except UserError as error:
            assert DRAWN_AGAIN in str(error)
            noticed += 1
        else:
            assert np.array_equal(images.numpy(), IMAGES) and np.array_equal(labels.numpy(), LABELS)
    assert noticed > 300


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_augmented_images_keep_their_form_and_depend_on_the_generator_alone(seed, n):
    images = torch.randint(0, 256, (n, 28, 28), generator=seeded(seed)).to(torch.uint8)
    before = images.clone()
    augmented = augment(images, seeded(seed), mirror=True)
    assert augmented.shape == images.shape and augmented.dtype == torch.uint8
    assert torch.equal(augmented, augment(images, seeded(seed), mirror=True))
    assert torch.equal(images, before)


def test_augmentation_shifts_mirrors_and_erases_a_square():
    """A single bright pixel comes out within two pixels of where it was or of its mirror image, or erased."""
    row, column = 12, 6
    images = torch.zeros(4000, 28, 28, dtype=torch.uint8)
    images[:, row, column] = 200
    augmented = augment(images, seeded(0), mirror=True)
    seen = augmented.nonzero()
    assert set(augmented[augmented > 0].tolist()) == {200}
    assert len(seen[:, 0].unique()) == len(seen)  # at most one pixel each
    assert set((seen[:, 1] - row).tolist()) == {-2, -1, 0, 1, 2}
    straight, mirrored = (abs(seen[:, 2] - c) <= 2 for c in (column, 27 - column))
    assert (straight | mirrored).all()
    assert straight.float().mean() == pytest.approx(0.5, abs=0.03)
    erased = 1 - len(seen) / len(images)
    assert erased == pytest.approx(100 / 28**2, abs=0.04)
    unmirrored = augment(images, seeded(0), mirror=False).nonzero()
    assert ((unmirrored[:, 2] - column).abs() <= 2).all()


def test_augmentation_is_in_proportion_to_the_size():
    images = torch.zeros(2000, 64, 64, 3, dtype=torch.uint8)
    images[:, 30, 20] = 200
    seen = augment(images, seeded(0), mirror=False)[..., 0].nonzero()
    assert set((seen[:, 1] - 30).tolist()) == set(range(-4, 5))
    assert 1 - len(seen) / len(images) == pytest.approx((22 / 64) ** 2, abs=0.04)


@pytest.mark.slow
def test_turns_of_symmetric_images_are_learned():
    """Wedges that widen downwards: mirroring after a quarter turn would make it the other quarter turn."""
    recipe = classifier_training.RECIPE | {"epochs": 6, "batch_size": 50}
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    centre, slope = (torch.rand(600, 1, 1, generator=seeded(i)) for i in range(2))
    wedges = (((columns - 9 - 10 * centre).abs() < (0.2 + 0.3 * slope) * rows) * 255).to(torch.uint8)
    model = classifier_training.train_classifier(wedges, torch.zeros(600, dtype=torch.int64), 0, recipe).eval()
    images, quarters = turned(wedges[:200])
    predicted = extract(model, images, torch.device("cpu"))[1]
    assert all((predicted[quarters == k] == k).float().mean() > 0.9 for k in range(4))


def test_augmentation_is_a_view_of_the_image_but_for_the_erased_square(fashion_mnist):
    images = load_split(fashion_mnist, "train")[0][:30]
    augmented = augment(images, seeded(3), mirror=True)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i, image in enumerate(augmented):
        views = [padded[i, r : r + 28, c : c + 28] for r in range(5) for c in range(5)]
        differences = [(image != view.flip(1) if flip else image != view) for view in views for flip in (False, True)]
        changed = min(differences, key=lambda d: d.sum()).nonzero()
        if len(changed):
            extent = changed.max(0).values - changed.min(0).values
            assert extent.max() < 10
            assert (image[changed[:, 0], changed[:, 1]] == 0).all()
    assert len(augmented) == 30 and not torch.equal(augmented, images)


def test_only_samples_that_dvc_knows_are_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampling = load_params(Path(__file__).parents[1] / "params.yaml").sample
    model, samples = b"weights", b"images"
    (tmp_path / "output").mkdir()
    (tmp_path / "output/samples.npz").write_bytes(samples)
    assert not drawn_from(model, sampling)  # there is no dvc.lock

    def lock(**changes) -> None:
        made = {"model": model, "samples": samples, "params": sampling.model_dump(), **changes}
        stage = {
            "deps": [{"path": "models/diffusion_model.pth", "md5": hashlib.md5(made["model"]).hexdigest()}],
            "params": {"params.yaml": {"sample": made["params"]}},
            "outs": [{"path": "output/samples.npz", "md5": hashlib.md5(made["samples"]).hexdigest()}],
        }
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"sample": stage}}))

    lock()
    assert drawn_from(model, sampling)
    for changes in ({"model": b"others"}, {"samples": b"others"}, {"params": {**sampling.model_dump(), "seed": 99}}):
        lock(**changes)
        assert not drawn_from(model, sampling)
    (tmp_path / "dvc.lock").write_text("stages: [")
    assert not drawn_from(model, sampling)
