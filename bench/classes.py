"""The published model's classes one by one, and the samples that the evaluator recognises least."""

import torch

from contenders import ROOT
from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.evaluation.features import extract, extract_cached
from ddpm.evaluation.metrics import fid
from ddpm.figures import save_png, sheet
from measure import evaluator, published, table

PICTURE = ROOT / "docs/images/failures.png"
SHOWN = 10


def run(full: bool) -> dict:
    of_each, raw, classifier, device = (1000 if full else 10), ROOT / "data/FashionMNIST/raw", evaluator(), torch.device("cpu")
    (train, train_labels), (test, test_labels) = load_split(raw, "train"), load_split(raw, "test")
    images, labels = published(of_each * len(CLASSES), quick=not full)
    features, predicted = extract(classifier, images, device)
    real, _ = extract_cached(classifier, train, device, ROOT / ".cache")
    unseen, recognised = extract_cached(classifier, test, device, ROOT / ".cache")
    wanted = classifier.head(features).softmax(1).gather(1, labels[:, None])[:, 0]  # the probability of its own class
    rows, worst = {}, []
    for c, name in enumerate(CLASSES):
        mine, reference, other = labels == c, real[train_labels == c], test_labels == c
        rows[name] = {
            "fid": fid(features[mine], reference),
            "floor": fid(unseen[other][:of_each], reference),
            "accuracy": (predicted[mine] == c).float().mean().item(),
            "accuracy_real": (recognised[other] == c).float().mean().item(),
            "taken_for": CLASSES[predicted[mine & (predicted != c)].mode().values] if (predicted[mine] != c).any() else None,
        }
        worst.append(images[mine][wanted[mine].argsort()[:SHOWN]])
    if full:
        save_png(PICTURE, sheet(torch.cat(worst), SHOWN, CLASSES))
    return {"of_each": of_each, "rows": rows}


def report(result: dict) -> str:
    ranked = sorted(result["rows"].items(), key=lambda row: row[1]["fid"])
    rows = [
        [
            name,
            f"{r['fid']:.3f}",
            f"{r['floor']:.3f}",
            f"{r['fid'] / r['floor']:.1f}",
            f"{r['accuracy']:.1%}",
            f"{r['accuracy_real']:.1%}",
            r["taken_for"] or "",
        ]
        for name, r in ranked
    ]
    header = ["class", "FID", "floor", "× floor", "recognised", "of real images", "else mostly taken for"]
    return (
        f"{table(header, rows)}\n\n{result['of_each']} samples of each class against its training images, for the floor as many "
        "test images."
    )
