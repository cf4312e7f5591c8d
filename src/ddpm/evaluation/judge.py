"""The whole evaluation of a set of samples: each figure beside what real images score."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.data.samples_file import Samples
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import Extracted, extract, extract_cached
from ddpm.evaluation.metrics import fid, kid, memorisation, nearest, prdc
from ddpm.evaluation.two_sample import IMAGES, c2st
from ddpm.figures import sheet
from ddpm.runtime.distributed import Group

FLOOR_DRAWS = 5  # a floor is the mean over this many draws of real images
PAIRS = 12  # closest pairs shown
REFERENCES = 100_000  # largest number of real images to compare with


class Features(NamedTuple):
    """What the classifier makes of the three sets that are compared."""

    samples: Extracted
    train: Extracted
    test: Extracted


def extract_all(
    classifier: Classifier, images: Tensor, data: Dataset, device: torch.device, cache: Path, group: Group
) -> Features:
    """Features of samples (uint8 `images`) and of the real images, which are cached. Only rank 0 gets them."""
    return Features(
        extract(classifier, images, device, group=group),
        extract_cached(classifier, data.images, device, cache, group),
        extract_cached(classifier, data.test_images, device, cache, group),
    )


def judge(samples: Samples, data: Dataset, features: Features, device: torch.device) -> tuple[dict[str, float], Image]:
    """All metrics by name, those of real images last, and the picture of the samples that are closest to a training image."""
    labels, (sample_features, predicted) = samples.labels, features.samples
    train, (test, test_predicted) = features.train.features, features.test
    metrics = {"fid": fid(sample_features, train), "fid_test": fid(sample_features, test), "kid": kid(sample_features, train)}

    # With as many samples as test images, every draw is the whole test set.
    count = 1 if len(sample_features) == len(test) else FLOOR_DRAWS
    draws = [draw_real(data.test_labels, labels, seed) for seed in range(count)]
    of_real = floors(train, test, data, labels, draws)
    unseen = draws[0]
    real = test[unseen]
    metrics |= prdc(sample_features, real)
    of_real |= {f"{name}_real": value for name, value in prdc(train[draw_real(data.labels, labels, 0)], real).items()}

    if (labels >= 0).all():
        metrics["class_accuracy"] = (predicted == labels).float().mean().item()
    if data.classes:
        of_real["class_accuracy_real"] = (test_predicted == data.test_labels).float().mean().item()
    # Told from test images, not from training images: copies of these would be the best samples.
    some = labels[:IMAGES]
    test_images = data.test_images[draw_real(data.test_labels, some, 0)]
    train_images = data.images[draw_real(data.labels, some, 0)]
    metrics["c2st_auc"], metrics["c2st_accuracy"] = c2st(samples.images, test_images, device)
    of_real["c2st_auc_real"], of_real["c2st_accuracy_real"] = c2st(train_images, test_images, device, what="training images")
    copies, picture = neighbours(samples.images, sample_features, data, train, data.test_images[unseen], real)
    return metrics | copies | of_real, picture


def comparable_samples(samples: Samples, data: Dataset) -> Samples:
    """As many of the samples as can be compared with an equal number of real images, which a floor needs."""
    n = min(len(samples.images), len(data.images), len(data.test_images))
    return replace(samples, images=samples.images[:n], labels=samples.labels[:n])


def draw_real(pool: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Indices into `pool`, the labels of real images, of as many images as there are `labels`.

    Each class has as many of them as it has samples, if there are enough; otherwise they are drawn from all classes.
    """
    balanced = class_balanced(pool, labels, seed)
    if balanced is not None:
        return balanced
    return torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: len(labels)]


def class_balanced(pool: Tensor, labels: Tensor, seed: int) -> Tensor | None:
    """Indices into the labels `pool` of as many images of each class as `labels` has, drawn without replacement.

    Labels of -1 stand for every class equally. None if some class has too few, or there are fewer labels than classes.
    """
    known, classes = labels[labels >= 0], int(pool.max()) + 1
    counts = torch.bincount(known, minlength=classes) + (len(labels) - len(known)) // classes
    if not counts.any():
        return None
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    indices = []
    for c, count in enumerate(counts.tolist()):
        of_class = order[pool[order] == c]
        if len(of_class) < count:
            return None
        indices.append(of_class[:count])
    return torch.cat(indices)


def floors(train: Tensor, test: Tensor, data: Dataset, labels: Tensor, draws: list[Tensor]) -> dict[str, float]:
    """The scores of an equal number of real images against the same references: the practical limit for any model."""
    floors = {"fid_floor": torch.tensor([fid(test[draw], train) for draw in draws])}
    others = [draw_real(data.labels, labels, seed) for seed in range(FLOOR_DRAWS)]
    floors["fid_test_floor"] = torch.tensor([fid(train[draw], test) for draw in others])
    floors["kid_floor"] = torch.tensor([kid(test[draw], train) for draw in draws])
    means = {name: values.mean().item() for name, values in floors.items()}
    return means | {f"{name}_std": values.std().item() for name, values in floors.items() if len(values) > 1}


def neighbours(
    images: Tensor, sample_features: Tensor, data: Dataset, train: Tensor, unseen_images: Tensor, unseen: Tensor
) -> tuple[dict[str, float], Image]:
    """Whether samples are copies: how near their nearest training image is, compared with that of unseen real images."""
    metrics: dict[str, float] = {}
    rows: list[Tensor] = []
    in_pixels, in_features = (images, data.images, unseen_images), (sample_features, train, unseen)
    for suffix, (queries, reference, real) in (("", in_pixels), ("_features", in_features)):
        distance, index = nearest(queries, reference)
        ratio, share = memorisation(distance, nearest(real, reference)[0])
        metrics |= {f"nearest_neighbour_ratio{suffix}": ratio, f"closer_than_test{suffix}": share}
        closest = distance.argsort()[:PAIRS]
        rows += [images[closest], data.images[index[closest]]]
    names = ["sample", "nearest in pixels", "sample", "nearest in features"]
    return metrics, sheet(torch.cat(rows), min(PAIRS, len(images)), names)
