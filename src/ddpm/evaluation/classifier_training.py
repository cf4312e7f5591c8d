"""Trains and evaluates the classifiers whose features the metrics compare.

Without classes the network learns by which of four quarter turns an image was turned (Gidaris et al. 2018).
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.data.dataset import Dataset
from ddpm.evaluation.classifier import TURNS, Classifier
from ddpm.evaluation.features import extract
from ddpm.evaluation.metrics import fid
from ddpm.files import sha256, write_atomic
from ddpm.params import FASHION_MNIST
from ddpm.tensor_files import serialise

RECIPE: dict[str, Any] = {  # of Fashion-MNIST's evaluator
    "seed": 0,
    "epochs": 20,
    "batch_size": 128,
    "learning_rate": 0.1,  # peak of one cycle, SGD with Nesterov momentum 0.9
    "weight_decay": 0.001,
    "label_smoothing": 0.1,
    "dropout": 0.3,
    "augmentation": "shift up to 2 pixels, mirror, erase a square of 10",
}
OWN_RECIPE: dict[str, Any] = {  # of the evaluators of other data sets, which may be small, and where left may differ from right
    **RECIPE,
    "least_steps": 200,  # however few images there are
    "most_steps": 1000,  # however many
    "mirror": False,
    "augmentation": "shift up to a fourteenth, erase a square of a third",
}
FLOOR_DRAWS = 5  # a floor is the mean over this many draws
CPU = torch.device("cpu")


def make_classifier(data: Dataset, name: str, device: torch.device = CPU) -> tuple[bytes, dict[str, Any]]:
    """A trained evaluator of the data set `name`: the contents of its file, and its card, which says how good it is."""
    classes, recipe = len(data.classes), RECIPE if name == FASHION_MNIST else OWN_RECIPE
    weights = train_classifier(data.images, data.labels, classes, recipe, device).cpu().state_dict()
    weights = {key: w.half().contiguous() if w.is_floating_point() else w for key, w in weights.items()}
    model = new_classifier(data.images, classes)
    model.load_state_dict(weights)  # evaluated as it will be used: stored in half precision, computed in float32
    content = serialise({"weights": weights})
    card = {
        "sha256": sha256(content),
        "data": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        **evaluate_classifier(model.eval(), data, device),
        "recipe": recipe,
    }
    return content, card


def write_classifier(path: Path, content: bytes, card: dict[str, Any]) -> None:
    """Write an evaluator to `path`, and its card beside it: last, because a file without its card isn't loaded."""
    write_atomic(path, content)
    write_atomic(path.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())


def train_classifier(
    images: Tensor, labels: Tensor, classes: int, recipe: dict[str, Any] = RECIPE, device: torch.device = CPU
) -> Classifier:
    """Train on uint8 images [N, …] with int64 labels [N]; with 0 `classes` the network learns quarter turns instead."""
    torch.manual_seed(recipe["seed"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    model = new_classifier(images, classes, recipe["dropout"]).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe["learning_rate"], momentum=0.9, nesterov=True, weight_decay=recipe["weight_decay"]
    )
    batch_size = min(recipe["batch_size"], len(images))
    steps = recipe["epochs"] * (len(images) // batch_size)
    steps = max(recipe.get("least_steps", 0), min(steps, recipe.get("most_steps", steps)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["learning_rate"], total_steps=steps, pct_start=0.2)
    mirror = recipe.get("mirror", True)
    with tqdm(total=steps, unit="step", desc="evaluator", dynamic_ncols=True) as bar:
        for batch in islice(batches(len(images), batch_size, generator), steps):
            x = augment(images[batch], generator, mirror)  # before turning: a mirrored quarter turn would be another quarter turn
            x, y = (x, labels[batch]) if classes else turned(x)
            _, logits = model(x.to(device))
            loss = F.cross_entropy(logits, y.to(device), label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return model


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, int64 [size]: all images in random order, then again in another."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].view(-1, size)


def new_classifier(images: Tensor, classes: int, dropout: float = 0.0) -> Classifier:
    return Classifier(classes or TURNS, 1 if images.ndim == 3 else 3, dropout)


def augment(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Shift, partly erase and, with `mirror`, mirror each of the uint8 images [N, H, H] or [N, H, H, 3].

    At 28 pixels they are shifted by up to 2, and a square of 10 is erased; at other sizes as much in proportion.
    """
    n, size = len(images), images.shape[1]
    reach, erase = size // 14, size * 10 // 28
    padded = F.pad(images, (0, 0) * (images.ndim - 3) + (reach,) * 4)
    shift = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(size) + shift[0], torch.arange(size) + shift[1]
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5) & mirror
    columns = torch.where(mirrored, columns.flip(1), columns)
    images = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    corner = torch.randint(-(erase // 2), size - erase // 2, (2, n, 1), generator=generator)
    inside = (torch.arange(size) >= corner) & (torch.arange(size) < corner + erase)  # [2, N, size]
    erased = inside[0][:, :, None] & inside[1][:, None, :]
    return images.masked_fill(erased if images.ndim == 3 else erased.unsqueeze(3), 0)


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images [N, …], each turned by 0 to 3 quarter turns, and the number of turns, int64 [N]."""
    quarters = torch.arange(len(images)) % TURNS
    return torch.stack([image.rot90(int(k)) for image, k in zip(images, quarters, strict=True)]), quarters


def features_and_accuracy(
    model: Classifier, images: Tensor, labels: Tensor, classes: int, device: torch.device = CPU
) -> tuple[Tensor, float]:
    """Features float32 [N, FEATURES], and the share of images whose class, or quarter turn, the model recognises."""
    features, predictions = extract(model, images, device)
    if not classes:
        right = []
        for batch in images.split(1000):  # the set may be larger than memory
            images_turned, quarters = turned(batch)
            right.append(extract(model, images_turned, device).predictions == quarters)
        return features, torch.cat(right).float().mean().item()
    return features, (predictions == labels).float().mean().item()


def evaluate_classifier(model: Classifier, data: Dataset, device: torch.device = CPU) -> dict[str, float]:
    """Accuracies, and two FIDs that should be close: the closer, the less the features have memorised their training set.

    Both are distances to one half of the training set: of its other half, which the classifier has seen, and of the test set,
    which it has not.
    """
    classes = len(data.classes)
    train_features, train_accuracy = features_and_accuracy(model, data.images, data.labels, classes, device)
    test_features, test_accuracy = features_and_accuracy(model, data.test_images, data.test_labels, classes, device)
    seen, unseen = [], []
    for draw in range(FLOOR_DRAWS):  # sets of equal size, with the same number of images of each class
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(draw))
        of_class = [order[data.labels[order] == c] for c in range(max(1, classes))]
        n = data.test_labels.bincount(minlength=len(of_class)).tolist()
        if min(map(len, of_class)) < 2:  # too few to halve
            of_class, n = [order], [len(test_features)]
        half = train_features[torch.cat([c[: len(c) // 2] for c in of_class])]
        others = [c[len(c) // 2 :][:most] for c, most in zip(of_class, n, strict=True)]
        seen.append(fid(train_features[torch.cat(others)], half))
        unseen.append(fid(test_features, half))
    return {
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        "fid_train_half_against_train_half": sum(seen) / FLOOR_DRAWS,
        "fid_test_against_train_half": sum(unseen) / FLOOR_DRAWS,
    }
