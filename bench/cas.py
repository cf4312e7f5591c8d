"""Classification accuracy score (Ravuri and Vinyals 2019): what a classifier that saw only samples knows of real images."""

import torch

from contenders import ROOT
from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.evaluation.classifier_training import features_and_accuracy, new_classifier, train_classifier
from measure import published, table


def run(full: bool) -> dict:
    count, tested = (10_000, 10_000) if full else (100, 1000)
    raw = ROOT / "data/FashionMNIST/raw"
    images, labels = load_split(raw, "train")
    test_images, test_labels = load_split(raw, "test")
    chosen = torch.cat([(labels == c).nonzero()[: count // len(CLASSES), 0] for c in range(len(CLASSES))])
    accuracy = {}
    samples = published(count, quick=not full)
    for source, (seen, classes) in {"samples": samples, "real images": (images[chosen], labels[chosen])}.items():
        model = new_classifier(seen, len(CLASSES))
        model.load_state_dict(train_classifier(seen, classes, len(CLASSES)).state_dict())
        _, accuracy[source] = features_and_accuracy(model.eval(), test_images[:tested], test_labels[:tested], len(CLASSES))
        print(f"trained on {source}: {accuracy[source]:.2%}", flush=True)
    return {"count": count, "tested": tested, "accuracy": accuracy}


def report(result: dict) -> str:
    rows = [[f"{result['count']:,} {source}", f"{value:.2%}"] for source, value in result["accuracy"].items()]
    return table(["a classifier trained on", f"accuracy on the {result['tested']:,} real test images"], rows)
