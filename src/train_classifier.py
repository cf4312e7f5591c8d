"""Train the evaluator of params.yaml's data set, once, by hand: `python src/train_classifier.py`.

No stage of the pipeline: figures compare only under the same frozen features. Prints, and writes beside the weights,
the test accuracy and two floors that should be close: the FID between halves of the training set, which the classifier
has seen, and between the test set, which it has not, and the training set. Without classes the network learns by which of
four quarter turns an image has been turned (Gidaris et al. 2018), and is judged by that.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddpm.data import load_data
from ddpm.features import TURNS, Classifier, extract
from ddpm.files import serialise, sha256, write_atomic
from ddpm.metrics import fid
from ddpm.params import FASHION_MNIST, clean_errors, load_params

RECIPE = {
    "seed": 0,
    "epochs": 20,
    "batch_size": 128,
    "learning_rate": 0.1,  # peak of one cycle, SGD with Nesterov momentum 0.9
    "weight_decay": 0.001,
    "label_smoothing": 0.1,
    "dropout": 0.3,
    "augmentation": "shift up to 2 pixels, mirror, erase a square of 10",
}

FLOOR_DRAWS = 5
CPU = torch.device("cpu")


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
    """The images, each turned by one of four quarter turns, and by which."""
    quarters = torch.arange(len(images)) % TURNS
    return torch.stack([image.rot90(int(k)) for image, k in zip(images, quarters, strict=True)]), quarters


def train(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """`classes` of 0: the network learns turns."""
    torch.manual_seed(RECIPE["seed"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    model = blank(images, classes, RECIPE["dropout"]).to(memory_format=torch.channels_last).train()
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
                x = augment(images[batch], generator)  # first: a mirrored quarter turn is another quarter turn
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


def blank(images: Tensor, classes: int, dropout: float = 0.0) -> Classifier:
    return Classifier(classes or TURNS, 1 if images.ndim == 3 else 3, dropout)


def features_and_accuracy(model: Classifier, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
    features, predictions = extract(model, images, CPU)
    if not classes:
        right = []
        for batch in images.split(1000):  # of a set that may be larger than memory
            batch, quarters = turned(batch)
            right.append(extract(model, batch, CPU)[1] == quarters)
        return features, torch.cat(right).float().mean().item()
    return features, (predictions == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="models/classifier.pth, or models/classifier-NAME.pth for other data")
    out, name = parser.parse_args().out, load_params().data.name
    out = out or Path(f"models/classifier{'' if name == FASHION_MNIST else f'-{name}'}.pth")
    data = load_data(name)
    classes = len(data.classes)

    weights = train(data.images, data.labels, classes).state_dict()
    weights = {name: w.half().contiguous() if w.is_floating_point() else w for name, w in weights.items()}
    model = blank(data.images, classes)
    model.load_state_dict(weights)  # judged as it will be used: from half precision, in float32
    model.eval()
    train_features, train_accuracy = features_and_accuracy(model, data.images, data.labels, classes)
    test_features, test_accuracy = features_and_accuracy(model, data.test_images, data.test_labels, classes)
    seen, unseen = [], []
    for draw in range(FLOOR_DRAWS):  # equal n, the same number of each class, against the same half of the training set
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(draw))
        of_class = [order[data.labels[order] == c] for c in range(max(1, classes))]
        half = train_features[torch.cat([c[: len(c) // 2] for c in of_class])]
        n = len(test_features) // len(of_class)
        seen.append(fid(train_features[torch.cat([c[len(c) // 2 :][:n] for c in of_class])], half))
        unseen.append(fid(test_features, half))
    content = serialise({"weights": weights})
    card = {
        "sha256": sha256(content),
        "data": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        # the closer these two, the less the features know their training set
        "fid_train_half_against_train_half": sum(seen) / FLOOR_DRAWS,
        "fid_test_against_train_half": sum(unseen) / FLOOR_DRAWS,
        "recipe": RECIPE,
    }
    print(json.dumps(card, indent=2))
    write_atomic(out, content)
    write_atomic(out.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())


if __name__ == "__main__":
    with clean_errors():
        main()
