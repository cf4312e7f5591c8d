""""""

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import extract, extract_cached
from ddpm.evaluation.metrics import fid, kid, memorisation, nearest
from ddpm.figures import save_png, sheet
from ddpm.paths import NEIGHBOURS, project_root
from ddpm.runtime.distributed import Group

FLOOR_DRAWS = 5
PAIRS = 12  # closest pairs shown
REFERENCES = 100_000  # real images to compare with, at most


def features(
    classifier: Classifier, images: Tensor, data: Dataset, device: torch.device, group: Group
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Features and predicted classes of the samples, of the images that they are compared with, and of those for testing."""
    cache = project_root() / ".cache"
    return (
        extract(classifier, images, device, group=group),
        extract_cached(classifier, data.images, device, cache, group),
        extract_cached(classifier, data.test_images, device, cache, group),
    )


def class_balanced(pool: Tensor, labels: Tensor, draw: int) -> Tensor | None:
    """Indices into the labels `pool` of as many images of each class as `labels` has, drawn without replacement.

    Labels of -1 stand for every class equally. None if some class has too few, or there are fewer labels than classes.
    """
    known, classes = labels[labels >= 0], pool.max().item() + 1
    counts = torch.bincount(known, minlength=classes) + (len(labels) - len(known)) // classes
    if not counts.any():
        return None
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(pool), generator=generator)
    indices = []
    for c, count in enumerate(counts.tolist()):
        of_class = order[pool[order] == c]
        if len(of_class) < count:
            return None
        indices.append(of_class[:count])
    return torch.cat(indices)


def floors(train: Tensor, test: Tensor, data: Dataset, labels: Tensor, draws: list[Tensor]) -> dict[str, float]:
    """What as many real images score against the same references: no model can be expected to do better."""
    floors = {"fid_floor": torch.tensor([fid(test[draw], train) for draw in draws])}
    others = [class_balanced(data.labels, labels, draw) for draw in range(FLOOR_DRAWS)]
    if others[0] is not None:
        floors["fid_test_floor"] = torch.tensor([fid(train[draw], test) for draw in others])
    floors["kid_floor"] = torch.tensor([kid(test[draw], train) for draw in draws])
    means = {name: values.mean().item() for name, values in floors.items()}
    return means | {f"{name}_std": values.std().item() for name, values in floors.items() if len(values) > 1}


def neighbours(
    images: Tensor, samples: Tensor, train_images: Tensor, train: Tensor, test_images: Tensor, test: Tensor
) -> dict[str, float]:
    """Are the samples copies? Nearest training images of samples and of test images, in pixels and in features."""
    metrics, rows = {}, []
    for suffix, mine, reference, unseen in (("", images, train_images, test_images), ("_features", samples, train, test)):
        distance, index = nearest(mine, reference)
        ratio, share = memorisation(distance, nearest(unseen, reference)[0])
        metrics |= {f"nearest_neighbour_ratio{suffix}": ratio, f"closer_than_test{suffix}": share}
        closest = distance.argsort()[:PAIRS]
        rows += [images[closest], train_images[index[closest]]]
    names = ["sample", "nearest in pixels", "sample", "nearest in features"]
    save_png(NEIGHBOURS, sheet(torch.cat(rows), len(closest), names))
    return metrics
