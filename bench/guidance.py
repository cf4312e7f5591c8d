"""Guidance: fidelity against variety, of the model that comes with the repository."""

import torch

from contenders import ROOT
from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.evaluation.features import extract, extract_cached
from ddpm.evaluation.judge import class_balanced
from ddpm.evaluation.metrics import fid, prdc
from measure import evaluator, published, table

SCALES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
COLUMNS = ("fid", "precision", "recall", "class_accuracy")


def run(full: bool) -> dict:
    count, scales = (2000, SCALES) if full else (60, (1.0, 2.0))
    raw, device, classifier = ROOT / "data/FashionMNIST/raw", torch.device("cpu"), evaluator()
    train, _ = extract_cached(classifier, load_split(raw, "train")[0], device, ROOT / ".cache")
    test, test_labels = load_split(raw, "test")
    real, _ = extract(classifier, test[class_balanced(test_labels, torch.arange(count) % len(CLASSES), 0)], device)
    rows = {}
    for scale in scales:
        images, labels = published(count, quick=not full, guidance_scale=scale)
        features, predicted = extract(classifier, images, device)
        shares = prdc(features, real)
        rows[str(scale)] = {
            "fid": fid(features, train),
            "precision": shares["precision"],
            "recall": shares["recall"],
            "class_accuracy": (predicted == labels).float().mean().item(),
        }
        print(f"guidance {scale}: {rows[str(scale)]}", flush=True)
    return {"samples": count, "rows": rows}


def report(result: dict) -> str:
    rows = [[scale, *(f"{r[column]:.3f}" for column in COLUMNS)] for scale, r in result["rows"].items()]
    return table(["`guidance_scale`", *(f"`{c}`" for c in COLUMNS)], rows) + f"\n\n{result['samples']} samples each."


def plot(result: dict, axes) -> None:
    scales = [float(scale) for scale in result["rows"]]
    for column in ("precision", "recall", "class_accuracy"):
        axes.plot(scales, [r[column] for r in result["rows"].values()], marker="o", label=column.replace("_", " "))
    axes.set_xlabel("guidance scale (1: none)")
    axes.set_ylabel("share")
    right = axes.twinx()
    right.plot(scales, [r["fid"] for r in result["rows"].values()], color="black", marker="s", label="FID")
    right.set_ylabel("FID")
    right.set_ylim(bottom=0)
    axes.set_title("More guidance: each sample better, all of them more alike")
    axes.legend(handles=[*axes.lines, *right.lines], loc="center right")
