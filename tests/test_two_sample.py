"""The classifier two-sample test: what it must see, what it must not see, and that its figures are repeatable."""

import pytest
import torch

from ddpm.data.fashion_mnist import load_split
from ddpm.evaluation import two_sample
from ddpm.evaluation.two_sample import c2st

CPU = torch.device("cpu")
N = 400


@pytest.fixture(scope="module")
def test_images(fashion_mnist) -> torch.Tensor:
    return load_split(fashion_mnist, "test")[0][:N]


@pytest.fixture(scope="module")
def train_images(fashion_mnist) -> torch.Tensor:
    return load_split(fashion_mnist, "train")[0][:N]


def grainy(images: torch.Tensor) -> torch.Tensor:
    """With noise of a twelfth of the range. (2 000 images would show a much finer grain.)"""
    noise = 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_real_images_cannot_be_told_from_other_real_images(train_images, test_images):
    auc, accuracy = c2st(train_images, test_images, CPU)
    assert abs(auc - 0.5) < 0.08
    assert abs(accuracy - 0.5) < 0.08


def test_grain_is_seen(train_images, test_images):
    auc, accuracy = c2st(grainy(train_images), test_images, CPU)
    assert auc > 0.98
    assert accuracy > 0.95


def test_an_image_is_judged_by_a_network_that_never_saw_it():
    """Eight passes over pure noise teach nothing that holds for other noise, but much of what was seen is remembered."""
    noise = torch.randint(0, 256, (2, 300, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert abs(c2st(noise[0], noise[1], CPU).auc - 0.5) < 0.08


def test_samples_score_above_one_half_whichever_side_they_are_on(train_images, test_images):
    """The figure says that a sample looks like a sample, not merely that two sets differ in some direction."""
    assert c2st(test_images, grainy(train_images), CPU).auc > 0.98


def test_the_same_images_and_seed_give_the_same_figures(train_images, test_images):
    few, others = grainy(train_images[:60]), test_images[:60]
    state = torch.get_rng_state()
    first = c2st(few, others, CPU, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn elsewhere doesn't depend on this
    torch.rand(3)
    assert c2st(few, others, CPU, seed=1) == first
    assert c2st(few, others, CPU, seed=2) != first


def test_only_the_first_images_count_beyond_the_limit(monkeypatch, train_images, test_images):
    monkeypatch.setattr(two_sample, "IMAGES", 40)
    white = torch.full_like(train_images, 255)
    mixed = torch.cat([train_images[:40], white])
    assert c2st(mixed, test_images, CPU) == c2st(train_images[:40], test_images[:40], CPU)


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (32, 32, 3), (96, 96, 3)])
def test_any_size_and_colours(shape):
    noise = torch.randint(0, 256, (2, 40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    darker = noise[0] // 2
    assert c2st(darker, noise[1], CPU).auc > 0.9


@pytest.mark.parametrize("n", [2, 3, 11])
def test_few_images_give_figures(n, train_images, test_images):
    auc, accuracy = c2st(train_images[:n], test_images[:n], CPU)
    assert 0 <= auc <= 1
    assert 0 <= accuracy <= 1


def test_fewer_than_two_images_are_refused(train_images, test_images):
    with pytest.raises(ValueError, match="at least two images of each kind, not 1"):
        c2st(train_images[:1], test_images, CPU)
