"""Which constant learning rate suits whom: as many steps at each, until a higher one is worse. contenders.py has those in use."""

import json
import math
from pathlib import Path

import torch

from contenders import PEERS, ROOT, Ours
from ddpm.data.fashion_mnist import load_split
from ddpm.files import write_atomic
from ddpm.runtime.run_folder import fingerprint
from measure import judge, machine, table
from quality import BATCH, EVALUATIONS, judged, shown, step

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STEPS, COUNT = {Ours: 2900} | dict.fromkeys(PEERS, 300), 500  # some five minutes of training


def run(full: bool) -> dict:
    """`full` or not: two and a half hours. What was judged before an interruption is kept, and not done again."""
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    here, fid = Path(__file__).parent, judge(images)
    of = fingerprint(machine()["versions"], [here / "rates.py", here / "contenders.py"])
    part = ROOT / f".cache/rates-{of}.json"
    rows = json.loads(part.read_text()) if part.exists() else {}
    for contender, steps in STEPS.items():
        row, best = rows.setdefault(contender.name, {}), math.inf
        for rate in RATES:
            if f"{rate:g}" not in row:
                torch.manual_seed(0)
                c = contender()
                c.learning_rate = rate
                c.start(torch.device("cpu"))
                for _ in range(steps):
                    step(c, images, labels)
                row[f"{rate:g}"] = judged(c, COUNT, fid)
                write_atomic(part, json.dumps(rows).encode())
            value = row[f"{rate:g}"]
            print(f"{contender.name}, learning rate {rate:g}: fid {shown(value)}", flush=True)
            value = math.inf if value is None else value
            if value > best:
                break
            best = value
    part.unlink()
    steps = {contender.name: count for contender, count in STEPS.items()}
    return {"steps": steps, "batch": BATCH, "samples": COUNT, "evaluations": EVALUATIONS, "rows": rows}


def report(result: dict) -> str:
    rates = [f"{rate:g}" for rate in RATES]
    rows = [
        [name, result["steps"][name], *(shown(r[rate]) if rate in r else "" for rate in rates)]
        for name, r in result["rows"].items()
    ]
    how = f"`fid` of {result['samples']} samples, {result['evaluations']} network evaluations each"
    return table(["learning rate", "steps", *rates], rows) + f"\n\n{how}, after so many steps of {result['batch']} images."
