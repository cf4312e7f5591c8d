"""Quality against network evaluations: every sampler at every budget, from the one checkpoint of the default run."""

from contenders import ROOT
from ddpm.data.fashion_mnist import load_split
from ddpm.params_file import load_params
from ddpm.paths import MODEL
from measure import drawn, judge, table

FULL = {"ddpm": (20, 50, 100, 250, 1000), "ddim": (5, 10, 20, 50, 100), "dpmpp_2m": (5, 10, 20, 50, 100)}
SHORT = {"ddpm": (20, 50), "ddim": (5, 10, 20), "dpmpp_2m": (5, 10, 20)}


def run(full: bool) -> dict:
    count, sampling = 2000 if full else 500, load_params(ROOT / "params.yaml").sample
    fid = judge(load_split(ROOT / "data/FashionMNIST/raw", "train")[0])
    rows = {}
    for sampler, budgets in (FULL if full else SHORT).items():
        for steps in budgets:
            how = {"sampler": sampler, "steps": steps, "spacing": "tapered", "guidance_scale": 1.0}
            images, _ = drawn(MODEL, sampling, count, **how)
            rows.setdefault(sampler, {})[str(steps)] = fid(images)
            print(f"{sampler}, {steps} evaluations: fid {rows[sampler][str(steps)]:.4f}", flush=True)
    return {"samples": count, "rows": rows}


def report(result: dict) -> str:
    budgets = sorted({int(b) for r in result["rows"].values() for b in r})
    rows = [[f"`{name}`", *(f"{r[str(b)]:.3f}" if str(b) in r else "" for b in budgets)] for name, r in result["rows"].items()]
    return (
        table(["network evaluations", *map(str, budgets)], rows) + f"\n\n`fid` of {result['samples']} samples, without guidance."
    )


def plot(result: dict, axes) -> None:
    for name, r in result["rows"].items():
        axes.loglog([int(b) for b in r], list(r.values()), marker="o", label=name)
    axes.set_xlabel("network evaluations an image")
    axes.set_ylabel(f"FID, {result['samples']} samples")
    axes.set_title("Quality against the cost of sampling")
    axes.legend()
