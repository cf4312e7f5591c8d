"""What was tried, one change at a time: bench/ablations.yaml's rows as DVC experiments, two at once on a core each."""

import yaml

from contenders import ROOT
from experiments import run_experiments
from measure import table

PLAN = ROOT / "bench/ablations.yaml"
COLUMNS = ("fid", "fid_test", "recall", "class_accuracy", "val_loss")


def run(full: bool) -> dict:
    """`full` or not: the rows are short already."""
    plan = yaml.safe_load(PLAN.read_text())
    metrics = run_experiments({f"ablation-{row['name']}": plan["short"] + row["change"] for row in plan["rows"]}, jobs=2)
    rows = {row["name"]: row | {"metrics": metrics[f"ablation-{row['name']}"]} for row in plan["rows"]}
    return {"short": plan["short"], "rows": rows}


def report(result: dict) -> str:
    rows = [
        [
            f"`{name}`",
            " ".join(f"`{c}`" for c in r["change"]) or "–",
            r["expected"],
            *(f"{r['metrics'][c]:.4f}" if c == "val_loss" else f"{r['metrics'][c]:.3f}" for c in COLUMNS),
        ]
        for name, r in result["rows"].items()
    ]
    short = " ".join(f"-S {change}" for change in result["short"])
    return table(["", "change", "expected", *(f"`{c}`" for c in COLUMNS)], rows) + f"\n\nAll with `{short}`."
