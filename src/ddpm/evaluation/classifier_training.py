"""Trains and evaluates the classifier whose features the metrics compare.

Without classes the network learns by which of four quarter turns an image was turned (Gidaris et al. 2018).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.data.dataset import Dataset
from ddpm.evaluation.classifier import TURNS, Classifier
from ddpm.evaluation.features import extract
from ddpm.evaluation.metrics import fid

RECIPE: dict[str, Any] = {
    "seed": 0,
    "epochs": 20,
    "batch_size": 128,
    "learning_rate": 0.1,  # peak of one cycle, SGD with Nesterov momentum 0.9
    "weight_decay": 0.001,
    "label_smoothing": 0.1,
    "dropout": 0.3,
    "augmentation": "shift up to 2 pixels, mirror, erase a square of 10",
}
FLOOR_DRAWS = 5  # a floor is the mean over this many draws
CPU = torch.device("cpu")


def train_classifier(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """Train on uint8 images [N, …] with int64 labels [N]; with 0 `classes` the network learns quarter turns instead."""
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    model = new_classifier(images, classes, RECIPE["dropout"]).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), RECIPE["learning_rate"], momentum=0.9, nesterov=True, weight_decay=RECIPE["weight_decay"]
    )
    batch_size = min(RECIPE["batch_size"], len(images))
    steps = RECIPE["epochs"] * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["learning_rate"], total_steps=steps, pct_start=0.2)
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(RECIPE["epochs"]):
            order = torch.randperm(len(images), generator=generator)
            for batch in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
                x = augment(images[batch], generator)  # before turning: a mirrored quarter turn would be another quarter turn
                x, y = (x, labels[batch]) if classes else turned(x)
                _, logits = model(x)
                loss = F.cross_entropy(logits, y, label_smoothing=RECIPE["label_smoothing"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return model


def new_classifier(images: Tensor, classes: int, dropout: float = 0.0) -> Classifier:
    return Classifier(classes or TURNS, 1 if images.ndim == 3 else 3, dropout)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror and partly erase each of the uint8 images [N, H, H] or [N, H, H, 3]."""
    n, size = len(images), images.shape[1]
    padded = F.pad(images, (0, 0) * (images.ndim - 3) + (2, 2, 2, 2))
    shift = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows, columns = torch.arange(size) + shift[0], torch.arange(size) + shift[1]
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    images = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    corner = torch.randint(-5, size - 5, (2, n, 1), generator=generator)
    inside = (torch.arange(size) >= corner) & (torch.arange(size) < corner + 10)  # [2, N, size]
    erased = inside[0][:, :, None] & inside[1][:, None, :]
    return images.masked_fill(erased if images.ndim == 3 else erased.unsqueeze(3), 0)


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images [N, …], each turned by 0 to 3 quarter turns, and the number of turns, int64 [N]."""
    quarters = torch.arange(len(images)) % TURNS
    return torch.stack([image.rot90(int(k)) for image, k in zip(images, quarters, strict=True)]), quarters


def features_and_accuracy(model: Classifier, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
    """Features float32 [N, FEATURES], and the share of images whose class, or quarter turn, the model recognises."""
    features, predictions = extract(model, images, CPU)
    if not classes:
        right = []
        for batch in images.split(1000):  # the set may be larger than memory
            images_turned, quarters = turned(batch)
            right.append(extract(model, images_turned, CPU).predictions == quarters)
        return features, torch.cat(right).float().mean().item()
    return features, (predictions == labels).float().mean().item()


def evaluate_classifier(model: Classifier, data: Dataset) -> dict[str, float]:
    """Accuracies, and two FIDs that should be close: the closer, the less the features have memorised their training set.

    Both are distances to one half of the training set: of its other half, which the classifier has seen, and of the test set,
    which it has not.
    """
    classes = len(data.classes)
    train_features, train_accuracy = features_and_accuracy(model, data.images, data.labels, classes)
    test_features, test_accuracy = features_and_accuracy(model, data.test_images, data.test_labels, classes)
    seen, unseen = [], []
    for draw in range(FLOOR_DRAWS):  # sets of equal size, with the same number of images of each class
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(draw))
        of_class = [order[data.labels[order] == c] for c in range(max(1, classes))]
        half = train_features[torch.cat([c[: len(c) // 2] for c in of_class])]
        n = len(test_features) // len(of_class)
        seen.append(fid(train_features[torch.cat([c[len(c) // 2 :][:n] for c in of_class])], half))
        unseen.append(fid(test_features, half))
    return {
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        "fid_train_half_against_train_half": sum(seen) / FLOOR_DRAWS,
        "fid_test_against_train_half": sum(unseen) / FLOOR_DRAWS,
    }
