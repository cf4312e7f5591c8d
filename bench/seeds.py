"""How much of a figure is luck: the default run under three training seeds."""

import statistics

from experiments import run_experiments
from measure import table

SEEDS = (0, 1, 2)
COLUMNS = ("fid", "fid_test", "kid", "precision", "recall", "density", "coverage", "class_accuracy", "val_loss")


def run(full: bool) -> dict:
    """`full` or not: three whole runs."""
    metrics = run_experiments({f"seed-{seed}": [f"train.seed={seed}"] for seed in SEEDS}, jobs=1)
    return {"rows": {str(seed): metrics[f"seed-{seed}"] for seed in SEEDS}}


def report(result: dict) -> str:
    rows = []
    for column in COLUMNS:
        values = [r[column] for r in result["rows"].values()]
        rows.append([f"`{column}`", *(f"{v:.4g}" for v in [*values, statistics.mean(values), statistics.stdev(values)])])
    floor = next(iter(result["rows"].values()))["fid_floor"]
    mean = statistics.mean(r["fid"] for r in result["rows"].values())
    header = ["", *(f"seed {seed}" for seed in result["rows"]), "mean", "deviation"]
    return table(header, rows) + f"\n\nMean `fid`: {mean / floor:.0f} × the floor of real images, {floor:.4f}."
