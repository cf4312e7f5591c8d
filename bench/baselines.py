"""Simple baselines: Gaussians fitted to the pixels of each class, and when a diffusion model in training overtakes them."""

import time

import numpy as np
import torch
from torch import Tensor

from contenders import ROOT, SAMPLE_SEED, Ours
from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.evaluation.judge import class_balanced
from ddpm.evaluation.two_sample import c2st
from measure import judge, table
from quality import EVALUATIONS, TURN, train

GAUSSIANS = {  # clusters of each class, and principal components of each cluster: one Gaussian
    "a Gaussian of each class": (1, 784),
    "a mixture of 30 Gaussians of each class": (30, 48),
}
MINUTES = (1, 2, 5, 10)  # of training, after which the diffusion model is judged
COLUMNS = {"fid": "`fid`", "c2st_auc": "`c2st_auc`"}


def run(full: bool) -> dict:
    """`full`: twenty minutes. Everything is fitted in the same run, and the training stops while it is judged."""
    minutes, count = (MINUTES, 2000) if full else ((1,), 300)
    raw, device = ROOT / "data/FashionMNIST/raw", torch.device("cpu")
    (images, labels), (test_images, test_labels) = load_split(raw, "train"), load_split(raw, "test")
    distance = judge(images)
    balanced = class_balanced(test_labels, torch.arange(count) % len(CLASSES), 0)

    def judged(name: str, samples: Tensor) -> dict[str, float]:
        values = {"fid": distance(samples), "c2st_auc": c2st(samples, test_images[balanced], device).auc}
        print(f"{name}: {values}", flush=True)
        return values

    baselines = {}
    for name, (clusters, components) in GAUSSIANS.items():
        began = time.perf_counter()
        samples = gaussians(images, labels, clusters, components, count)
        baselines[name] = {"seconds": time.perf_counter() - began} | judged(name, samples)
    ours = Ours()
    ours.start(device)
    rows = {}
    for minute in range(1, max(minutes) + 1):
        train(ours, images, labels, TURN)
        if minute in minutes:
            rows[str(minute)] = judged(f"{ours.name}, {minute} min", ours.draw(count, EVALUATIONS))
    return {"samples": count, "baselines": baselines, "rows": rows}


def gaussians(images: Tensor, labels: Tensor, clusters: int, components: int, count: int) -> Tensor:
    """Samples uint8 [count, H, W], the classes in turn, of a mixture of Gaussians that is fitted to the images of each class.

    The clusters are those of k-means; a Gaussian has the principal components of its cluster, and no other variance.
    """
    from sklearn.cluster import KMeans  # here, because publish.py imports every part on machines without it
    from sklearn.decomposition import PCA

    random = np.random.default_rng(SAMPLE_SEED)
    pixels, of_class = images.flatten(1).numpy().astype(np.float32), []
    for c in range(len(CLASSES)):
        x, wanted = pixels[labels.numpy() == c], -(-count // len(CLASSES))
        cluster = KMeans(clusters, n_init=1, random_state=SAMPLE_SEED).fit_predict(x)
        chosen = random.choice(cluster, wanted)  # as often as they have images
        drawn = np.empty((wanted, x.shape[1]), np.float32)
        for k in np.unique(chosen):
            members = x[cluster == k]
            pca = PCA(min(components, len(members) - 1), svd_solver="full").fit(members)
            z = random.standard_normal(((chosen == k).sum(), pca.n_components_)) * pca.explained_variance_**0.5
            drawn[chosen == k] = pca.inverse_transform(z)
        of_class.append(drawn)
    in_turn = np.stack(of_class, axis=1).reshape(-1, *images.shape[1:])[:count]
    return torch.from_numpy(in_turn.round().clip(0, 255).astype(np.uint8))


def report(result: dict) -> str:
    rows = [
        [name, f"{r['seconds']:.0f} s", *(f"{r[column]:.3f}" for column in COLUMNS)] for name, r in result["baselines"].items()
    ]
    rows += [
        [f"this project, {minute} min", f"{60 * int(minute)} s", *(f"{r[column]:.3f}" for column in COLUMNS)]
        for minute, r in result["rows"].items()
    ]
    return table(["", "fitted (baselines: and drawn) in", *COLUMNS.values()], rows) + f"\n\n{result['samples']:,} samples each."
