"""Time to quality: everyone trains from scratch, in turns of a minute, and is judged along the way."""

import time
from collections.abc import Callable

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
    rows = {c.name: {"fid": {}, "images_seen": 0, "classes": c.conditional} for c in contenders}
    for c in contenders:
        c.start(device)
    try:
        for minute in range(1, max(own_minutes) + 1):
            for c in contenders:
                train(c, images, labels, TURN)
                rows[c.name]["images_seen"] = c.steps * BATCH
                if minute in (own_minutes if isinstance(c, Ours) else peer_minutes):
                    value = judged(c, count, fid)
                    rows[c.name]["fid"][str(minute)] = value
                    print(f"{c.name}, {minute} min, {c.steps} steps: fid {shown(value)}", flush=True)
    except KeyboardInterrupt:  # hours are too much to lose
        print("stopped; what was judged so far is kept")
    return {"samples": count, "evaluations": EVALUATIONS, "batch": BATCH, "rows": rows}


def train(c: Contender, images: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        step(c, images, labels)


def step(c: Contender, images: torch.Tensor, labels: torch.Tensor) -> None:
    batch = torch.randint(len(images), (BATCH,))
    c.step(to_model_range(images[batch]).to(c.device), labels[batch].to(c.device))


def judged(c: Contender, count: int, fid: Callable[[torch.Tensor], float]) -> float | None:
    """The FID of its samples; None, and a line that says why, where the guard finds them to be garbage."""
    try:
        return fid(c.draw(count, EVALUATIONS))
    except SystemExit as garbage:
        print(garbage, flush=True)
        return None


def shown(value: float | None) -> str:
    return "garbage" if value is None else f"{value:.3f}"


def report(result: dict) -> str:
    minutes = sorted({int(m) for r in result["rows"].values() for m in r["fid"]})
    header = ["", *(f"{m} min" for m in minutes), "images seen"]
    rows = [
        [name, *(shown(r["fid"][str(m)]) if str(m) in r["fid"] else "" for m in minutes), f"{r['images_seen']:,}"]
        for name, r in result["rows"].items()
    ]
    note = f"`fid` of {result['samples']} samples, {result['evaluations']} network evaluations each: half as many steps with "
    note += "guidance, or as many without, where there are no classes. The learning rate stays constant after its warm-up."
    if any(value is None for r in result["rows"].values() for value in r["fid"].values()):
        note += " Garbage: more than a twentieth of them were blank, or not numbers."
    return table(header, rows) + "\n\n" + note


def plot(result: dict, axes) -> None:
    for name, r in result["rows"].items():
        known = {int(m): value for m, value in r["fid"].items() if value is not None}
        axes.loglog(known.keys(), known.values(), marker="o", label=name)
    axes.set_xlabel("minutes of training on two cores")
    axes.set_ylabel(f"FID, {result['samples']} samples")
    axes.set_title("Quality against training time")
    axes.set_xticks(minutes := [1, 2, 5, 10, 20], [str(m) for m in minutes])
    axes.legend()
