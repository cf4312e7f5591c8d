"""Time to quality: everyone trains from scratch at a constant rate, in turns of a minute, and is judged along the way."""

import time

import torch

from contenders import PEERS, ROOT, Contender, Ours
from ddpm.data import load_split, to_model_range
from measure import judge, table

BATCH, EVALUATIONS = 64, 20
TURN = 60  # seconds


def run(full: bool) -> dict:
    device = torch.device("cpu")
    own_minutes, peer_minutes, count = ((1, 2, 5, 10, 20), (5, 10, 20), 2000) if full else ((1,), (1,), 300)
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    fid = judge(images)
    contenders: list[Contender] = [Ours(), Ours(conditional=False), *(peer() for peer in PEERS)]
    rows = {c.name: {"fid": {}, "classes": c.conditional} for c in contenders}
    for c in contenders:
        c.start(device)
    try:
        for minute in range(1, max(own_minutes) + 1):
            for c in contenders:
                train(c, images, labels, TURN)
                if minute in (own_minutes if isinstance(c, Ours) else peer_minutes):
                    rows[c.name]["fid"][str(minute)] = fid(c.draw(count, EVALUATIONS))
                    rows[c.name]["images_seen"] = c.steps * BATCH
                    print(f"{c.name}, {minute} min, {c.steps} steps: fid {rows[c.name]['fid'][str(minute)]:.4f}", flush=True)
    except KeyboardInterrupt:  # hours are too much to lose
        print("stopped; what was judged so far is kept")
    return {"samples": count, "evaluations": EVALUATIONS, "batch": BATCH, "rows": rows}


def train(c: Contender, images: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        batch = torch.randint(len(images), (BATCH,))
        c.step(to_model_range(images[batch]).to(c.device), labels[batch].to(c.device))


def report(result: dict) -> str:
    minutes = sorted({int(m) for r in result["rows"].values() for m in r["fid"]})
    header = ["", *(f"{m} min" for m in minutes), "images seen"]
    rows = [
        [name, *(f"{r['fid'][str(m)]:.3f}" if str(m) in r["fid"] else "" for m in minutes), f"{r['images_seen']:,}"]
        for name, r in result["rows"].items()
    ]
    return table(header, rows) + f"\n\n`fid` of {result['samples']} samples, {result['evaluations']} network evaluations each."


def plot(result: dict, axes) -> None:
    for name, r in result["rows"].items():
        axes.loglog([int(m) for m in r["fid"]], list(r["fid"].values()), marker="o", label=name)
    axes.set_xlabel("minutes of training on two cores")
    axes.set_ylabel(f"FID, {result['samples']} samples")
    axes.set_title("Quality against training time")
    axes.set_xticks(minutes := [1, 2, 5, 10, 20], [str(m) for m in minutes])
    axes.legend()
