"""What was tried, one change at a time: bench/ablations.yaml's rows as DVC experiments, two at once on a core each."""

import json
import os
import subprocess
import time

import yaml

from contenders import ROOT
from measure import table

PLAN = ROOT / "bench/ablations.yaml"
PREFIX = "ablation-"
COLUMNS = ("fid", "fid_test", "recall", "class_accuracy")


def run(full: bool) -> dict:
    """`full` or not: the rows are short already."""
    plan = yaml.safe_load(PLAN.read_text())
    names = {f"{PREFIX}{row['name']}": row for row in plan["rows"]}
    for name, row in names.items():
        changes = [part for change in plan["short"] + row["change"] for part in ("-S", change)]
        dvc("exp", "run", "--queue", "-n", name, *changes)
    dvc("queue", "start", "-j", "2")
    while pending := [n for n, status in queue().items() if n in names and status not in ("Success", "Failed")]:
        print(f"{len(names) - len(pending)} of {len(names)} done", flush=True)
        time.sleep(30)
    shown = {
        e["name"]: e["revs"][0]["data"] for rev in json.loads(dvc("exp", "show", "--json")) for e in rev["experiments"] or []
    }
    rows = {}
    for name, row in names.items():
        metrics = {k: v for file in shown.get(name, {}).get("metrics", {}).values() for k, v in file["data"].items()}
        rows[row["name"]] = {"change": row["change"], "expected": row["expected"], "metrics": metrics}
    return {"short": plan["short"], "rows": rows}


def dvc(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["dvc", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def queue() -> dict[str, str]:
    """The status of each queued experiment by its name."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {entry["name"]: entry["status"] for entry in repo.experiments.celery_queue.status()}


def report(result: dict) -> str:
    rows = [
        [
            f"`{name}`",
            " ".join(f"`{c}`" for c in r["change"]) or "–",
            r["expected"],
            *(f"{r['metrics'][c]:.3f}" for c in (*COLUMNS, "val_loss")),
        ]
        for name, r in result["rows"].items()
    ]
    short = " ".join(f"-S {change}" for change in result["short"])
    return table(["", "change", "expected", *COLUMNS, "validation loss"], rows) + f"\n\nAll with `{short}`."
