"""Which learning rate suits a peer: each trains as many steps at each of three; contenders.py has the one that the others use."""

import torch

from contenders import PEERS, ROOT
from ddpm.data import load_split
from measure import judge, table
from quality import BATCH, EVALUATIONS, judged, shown, step

RATES = (3e-4, 1e-3, 3e-3)
STEPS, COUNT = 300, 500


def run(full: bool) -> dict:
    """`full` or not: an hour."""
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    fid, rows = judge(images), {}
    for peer in PEERS:
        rows[peer.name] = {}
        for rate in RATES:
            torch.manual_seed(0)
            c = peer()
            c.learning_rate = rate
            c.start(torch.device("cpu"))
            for _ in range(STEPS):
                step(c, images, labels)
            rows[c.name][f"{rate:g}"] = judged(c, COUNT, fid)
            print(f"{c.name}, learning rate {rate:g}: fid {shown(rows[c.name][f'{rate:g}'])}", flush=True)
    return {"steps": STEPS, "batch": BATCH, "samples": COUNT, "evaluations": EVALUATIONS, "rows": rows}


def report(result: dict) -> str:
    rates = [f"{rate:g}" for rate in RATES]
    rows = [[name, *(shown(r[rate]) for rate in rates)] for name, r in result["rows"].items()]
    how = f"`fid` of {result['samples']} samples, {result['evaluations']} network evaluations each"
    return table(["learning rate", *rates], rows) + f"\n\n{how}, after {result['steps']} steps of {result['batch']} images."
