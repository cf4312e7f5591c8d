"""The metrics against their definitions, and against what they must say of sets whose faults are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import gaussian_blur

from ddpm.data.fashion_mnist import load_split
from ddpm.evaluation import metrics
from ddpm.evaluation.classifier import load_classifier
from ddpm.evaluation.features import extract
from ddpm.evaluation.metrics import ROWS, fid, kid, memorisation, nearest, prdc

CPU = torch.device("cpu")
CLASSIFIER = Path(__file__).resolve().parents[1] / "models/classifier.pth"


def normal(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """Points whose sample mean and (unbiased) sample covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The closed form: the trace of (A B)^½ is that of the symmetric (A^½ B A^½)^½."""
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = symmetric_sqrt(covariance_a)
    cross = np.trace(symmetric_sqrt(root @ covariance_b @ root))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross


def unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x, x)[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y, y)[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * kernel(x, y).mean()


def naive_prdc(samples: np.ndarray, reference: np.ndarray, k: int) -> dict[str, float]:
    """Kynkäänniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 3 and 4: one comparison at a time."""

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(x: np.ndarray) -> np.ndarray:
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(distance(x, x))])

    between, reference_radii, sample_radii = distance(samples, reference), radii(reference), radii(samples)
    n, m = between.shape
    return {
        "precision": sum(any(between[i, j] <= reference_radii[j] for j in range(m)) for i in range(n)) / n,
        "recall": sum(any(between[i, j] <= sample_radii[i] for i in range(n)) for j in range(m)) / m,
        "density": sum(between[i, j] <= reference_radii[j] for i in range(n) for j in range(m)) / (k * n),
        "coverage": sum(any(between[i, j] <= reference_radii[j] for i in range(n)) for j in range(m)) / m,
    }


@pytest.mark.parametrize("seed", range(3))
def test_fid_is_the_closed_form(seed):
    mixing = np.random.default_rng(seed).standard_normal((16, 16))
    a, b = normal(300, 16, seed).numpy(), normal(500, 16, seed + 100).numpy() @ mixing + 0.5
    assert fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(frechet(a.astype(float), b.astype(float)), rel=1e-4)


def test_fid_of_gaussians_with_known_parameters():
    mean, variances_a, variances_b = np.array([3.0, 4.0, 0.0]), np.array([1.0, 4.0, 9.0]), np.array([16.0, 4.0, 1.0])
    a = with_moments(50, np.zeros(3), np.diag(variances_a), 0)
    b = with_moments(70, mean, np.diag(variances_b), 1)
    between_spreads = ((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2).sum()  # commuting covariances
    assert fid(a, b) == pytest.approx(25 + between_spreads, rel=1e-9)
    assert fid(b, a) == pytest.approx(25 + between_spreads, rel=1e-9)


def test_fid_with_fewer_samples_than_features():
    a, b = normal(20, 64, 0, torch.float64), normal(30, 64, 1, torch.float64) + 0.3
    assert fid(a, b) == pytest.approx(frechet(a.numpy(), b.numpy()), rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kid_of_full_size_subsets_is_the_unbiased_mmd(shift):
    a, b = normal(60, 8, 2), normal(60, 8, 3) + shift
    expected = unbiased_mmd2(a.double().numpy(), b.double().numpy())
    assert kid(a, b) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_kid_is_unbiased():
    values = [kid(normal(100, 8, seed), normal(100, 8, seed + 1000)) for seed in range(30)]
    mean, error = np.mean(values), np.std(values) / np.sqrt(len(values))
    assert abs(mean) < 4 * error
    assert min(values) < 0  # as only an unbiased estimate can be


def test_kid_is_deterministic_and_leaves_the_global_generator_alone(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 50)
    a, b = normal(200, 8, 4), normal(150, 8, 5) + 0.2
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = kid(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert kid(a, b) == first
    assert kid(a, b, seed=1) != first  # other subsets


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(7, 40), m=st.integers(7, 40), d=st.integers(1, 6), k=st.integers(1, 6))
def test_prdc_is_its_definition(seed, n, m, d, k):
    samples, reference = normal(n, d, seed, torch.float64) * 1.3, normal(m, d, seed + 1, torch.float64)
    assert prdc(samples, reference, k) == pytest.approx(naive_prdc(samples.numpy(), reference.numpy(), k))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(7, 40), m=st.integers(7, 40), k=st.integers(1, 6))
def test_prdc_is_its_definition_where_distances_tie(seed, n, m, k):
    g = torch.Generator().manual_seed(seed)
    samples, reference = (torch.randint(0, 4, (size, 2), generator=g).double() for size in (n, m))
    assert prdc(samples, reference, k) == pytest.approx(naive_prdc(samples.numpy(), reference.numpy(), k))


def test_prdc_of_more_rows_than_it_holds_at_a_time():
    samples, reference = normal(ROWS + 200, 4, 6, torch.float64) + 0.4, normal(300, 4, 7, torch.float64)
    assert prdc(samples, reference) == pytest.approx(naive_prdc(samples.numpy(), reference.numpy(), 5))


@pytest.mark.parametrize("n", [50, ROWS + 1])
def test_a_set_against_itself(n):
    x = normal(n, 32, 8)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    values = prdc(x, x)
    assert (values["precision"], values["recall"], values["coverage"]) == (1, 1, 1)


def test_far_apart_sets():
    values = prdc(normal(100, 8, 9) + 100, normal(100, 8, 10))
    assert values == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


@pytest.fixture(scope="module")
def real(fashion_mnist):
    """Test images, and the evaluator's features of images."""
    classifier = load_classifier(CLASSIFIER)
    images, _ = load_split(fashion_mnist, "test")
    return images, lambda x: extract(classifier, x, CPU)[0]


def worsened(images: torch.Tensor, how: str, strength: float) -> torch.Tensor:
    x = images.float()
    if how == "noise":
        x = x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    elif how == "blur":
        x = gaussian_blur(x, 9, strength) if strength else x
    return x.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("how", "strengths"), [("noise", [0, 10, 25, 60]), ("blur", [0, 0.6, 1.0, 2.0])])
def test_fid_and_kid_grow_with_noise_and_blur(real, how, strengths):
    images, features = real
    reference, sets = features(images[:400]), [features(worsened(images[400:800], how, s)) for s in strengths]
    for metric in (fid, kid):
        values = [metric(x, reference) for x in sets]
        assert values == sorted(values), values
        assert values[-1] > 5 * abs(values[0])


def test_fid_grows_as_classes_are_missed(real, fashion_mnist):
    images, features = real
    _, labels = load_split(fashion_mnist, "test")
    x, labels = features(images[:1000]), labels[:1000]
    values = [fid(x[labels < classes], x) for classes in (10, 8, 6, 3)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values)
    assert values[1] > 0.1 and values[-1] > 5


@pytest.mark.parametrize("kept", [1, 4])
def test_few_images_repeated_are_precise_but_cover_nothing(real, kept):
    images, features = real
    x = features(images[:1000])
    dense = torch.cdist(x, x).kthvalue(6, dim=1).values.argsort()  # such as lie where there are many real ones
    repeated = x[dense[:kept]].repeat(500 // kept, 1)
    others = x[dense[kept:]]
    good, values = prdc(x[:500], x[500:]), prdc(repeated, others)
    assert values["precision"] >= 0.99
    assert values["recall"] < 0.05 < 0.5 < good["recall"]
    assert values["coverage"] < 0.1 < 0.5 < good["coverage"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 50), m=st.integers(1, 50), d=st.integers(1, 8))
def test_nearest_is_the_naive_argmin(seed, n, m, d):
    queries, reference = normal(n, d, seed, torch.float64), normal(m, d, seed + 1, torch.float64)
    distance, index = nearest(queries, reference)
    naive = np.linalg.norm(queries.numpy()[:, None] - reference.numpy()[None], axis=-1)
    assert np.array_equal(index.numpy(), naive.argmin(1))
    assert np.allclose(distance.numpy(), naive.min(1), rtol=1e-12)


def test_nearest_of_more_rows_than_it_holds_at_a_time():
    queries, reference = normal(ROWS + 200, 3, 11, torch.float64), normal(500, 3, 12, torch.float64)
    naive = np.linalg.norm(queries.numpy()[:, None] - reference.numpy()[None], axis=-1)
    assert np.array_equal(nearest(queries, reference)[1].numpy(), naive.argmin(1))


def test_copies_of_training_images_are_found(fashion_mnist):
    train, test = (load_split(fashion_mnist, split)[0].flatten(1).float() / 255 for split in ("train", "test"))
    train, test = train[:4000], test[:1000]
    test_distance, _ = nearest(test, train)
    chosen = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:1000]
    distance, index = nearest(train[chosen], train)
    assert torch.equal(index, chosen)
    assert distance.max() == 0
    assert memorisation(distance, test_distance) == (0, 1)

    a_little_noise = train[chosen] + 0.01 * normal(1000, 784, 1)
    ratio, share = memorisation(nearest(a_little_noise, train)[0], test_distance)
    assert ratio < 0.1
    assert share > 0.95


def test_unseen_real_images_are_no_copies(fashion_mnist):
    train, test = (load_split(fashion_mnist, split)[0].flatten(1).float() / 255 for split in ("train", "test"))
    halves = [nearest(half, train[:4000])[0] for half in (test[:2000], test[2000:4000])]
    ratio, share = memorisation(*halves)
    assert ratio == pytest.approx(1, abs=0.03)
    assert share == pytest.approx(0.01, abs=0.0075)


def test_memorisation_is_its_definition():
    samples, unseen = torch.tensor([0.5, 1.0, 1.5]), torch.linspace(1, 3, 101)
    ratio, share = memorisation(samples, unseen)  # the first percentile of `unseen` is 1.02
    assert ratio == pytest.approx(1 / 2)
    assert share == pytest.approx(2 / 3)


def test_a_reference_in_several_parts_has_the_same_nearest_points(monkeypatch):
    queries, reference = normal(20, 4, 0), normal(50, 4, 1)
    monkeypatch.setattr(metrics, "HELD", 4 * 4 * 7)  # seven points at a time
    distance, index = nearest(queries, reference)
    expected = (queries[:, None] - reference).norm(dim=2).min(1)
    assert index.tolist() == expected.indices.tolist()
    assert torch.allclose(distance, expected.values)


def test_the_ratio_of_memorisation_is_of_medians():
    ratio, share = memorisation(torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0]), torch.tensor([2.0, 2.0, 2.0, 9.0, 9.0]))
    assert ratio == 0.5
    assert share == pytest.approx(0.8)
