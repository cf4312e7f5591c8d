"""How good, how varied and how new samples are: FID, KID, precision/recall, density/coverage, nearest neighbours.

Every figure compares sets of feature vectors [N, D] (or pixels) and is a plain, deterministic function of them.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
ONE_PROCESS: dict[str, Any] = {"sync_on_compute": False}  # rank 0 computes alone: it has gathered all features
ROWS = 1000  # of a distance matrix in memory at a time
HELD = 1 << 28  # bytes of reference points in memory at a time


class _Features(nn.Module):
    """Takes the place of the network that torchmetrics expects, because we pass it features instead of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(samples: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D], [M, D] (Heusel et al. 2017, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import; the user's mistakes are reported before

    metric = FrechetInceptionDistance(_Features(samples.shape[1]), **ONE_PROCESS)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute().item()


def kid(samples: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Kernel distance: the unbiased MMD² under a cubic kernel, mean over random subsets (Bińkowski et al. 2018, sec. 4)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    with warnings.catch_warnings(action="ignore"):  # a warning that it holds all features in memory, which is intended
        network = _Features(samples.shape[1])
        metric = KernelInceptionDistance(network, subsets=KID_SUBSETS, subset_size=size, **ONE_PROCESS)
    metric.update(reference.float(), real=True)
    metric.update(samples.float(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from the global generator
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return mean.item()


def prdc(samples: Tensor, reference: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features [N, D], [M, D].

    A ball around each point reaches to its k-th nearest neighbour in its own set. Precision: the share of samples in
    some reference ball. Recall: the share of references in some sample ball. Density: how many reference balls a sample
    lies in, over k. Coverage: the share of reference balls that hold a sample.
    """
    reference_radii, sample_radii = _kth_neighbour_distance(reference, k), _kth_neighbour_distance(samples, k)
    precise = density = 0
    covered = torch.zeros(len(reference), dtype=torch.bool)
    within_samples = torch.zeros(len(reference), dtype=torch.bool)
    for rows, radii in zip(samples.split(ROWS), sample_radii.split(ROWS), strict=True):
        distance = torch.cdist(rows, reference)
        in_reference = distance <= reference_radii
        precise += int(in_reference.any(1).sum())
        density += int(in_reference.sum())
        covered |= in_reference.any(0)
        within_samples |= (distance <= radii[:, None]).any(0)
    return {
        "precision": precise / len(samples),
        "recall": within_samples.sum().item() / len(reference),
        "density": density / (k * len(samples)),
        "coverage": covered.float().mean().item(),
    }


def nearest(queries: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance [N] to, and index [N] of, the nearest of `reference` [M, …] for each of `queries` [N, …].

    Both are features, float [N, D], or images, uint8 [N, …], whose pixels are scaled to 0 … 1. Only a part of a large reference
    is in memory at a time.
    """
    best = _points(queries[:1]).new_full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    columns = max(1, HELD // (4 * reference[0].numel()))
    parts = torch.arange(len(queries)).split(min(ROWS, columns))
    for start in range(0, len(reference), columns):
        some = _points(reference[start : start + columns])
        for rows in parts:
            distance, found = torch.cdist(_points(queries[rows]), some).min(1)
            closer = distance < best[rows]
            best[rows] = torch.where(closer, distance, best[rows])
            index[rows] = torch.where(closer, found + start, index[rows])
    distance = torch.cat(  # recomputed without the matrix product, whose rounding blurs distances near zero
        [(_points(queries[rows]) - _points(reference[index[rows]])).norm(dim=1) for rows in parts]
    )
    return distance, index


def _points(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.flatten(1).float() / 255


def memorisation(sample_distance: Tensor, test_distance: Tensor) -> tuple[float, float]:
    """Whether samples lie closer to the training set than unseen real images do, from the nearest distances of both.

    Returns the ratio of the medians (copies: well below 1) and the share of samples that are nearer than the nearest 1 % of the
    test images (real images: 0.01).
    """
    ratio = sample_distance.median() / test_distance.median()
    share = (sample_distance < test_distance.quantile(0.01)).float().mean()
    return ratio.item(), share.item()


def _kth_neighbour_distance(x: Tensor, k: int) -> Tensor:
    """Distance [N] from each row of `x` [N, D] to its k-th nearest other row."""
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(ROWS)])
