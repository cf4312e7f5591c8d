"""The default run's model under other samplers, spacings, steps and guidance: DVC experiments that train nothing."""

from contenders import ROOT
from ddpm.params_file import load_params
from experiments import run_experiments
from measure import table

SHORT = ["sample.count=2000", "sample.seed=1"]  # another seed than the one that the default run is reported with
ROWS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 1.75},
    {"guidance_scale": 2.75},
    {"guidance_interval": None},
    {"steps": 7},
    {"steps": 12},
    {"clip": False},
    {"spacing": "trailing"},
    {"sampler": "ddim"},
    {"sampler": "ddpm"},
]
SETTINGS = ("sampler", "spacing", "steps", "guidance_scale", "guidance_interval", "clip")
COLUMNS = ("fid", "recall", "coverage", "class_accuracy", "c2st_auc")


def run(full: bool) -> dict:
    """`full` or not: the rows are short."""
    default = load_params(ROOT / "params.yaml").sample.model_dump()
    rows = {f"sampler-{n}": row for n, row in enumerate(ROWS)}
    changes = {
        name: SHORT + [f"sample.{key}={'null' if value is None else value}" for key, value in row.items()]
        for name, row in rows.items()
    }
    metrics = run_experiments(changes, jobs=2)
    settings = {name: {key: default[key] for key in SETTINGS} | row for name, row in rows.items()}
    return {"short": SHORT, "rows": [settings[name] | {c: metrics[name][c] for c in COLUMNS} for name in rows]}


def report(result: dict) -> str:
    names = list(result["rows"][0])  # an earlier run had fewer
    rows = [[f"{r[name]:.3f}" if name in COLUMNS else r[name] for name in names] for r in result["rows"]]
    short = " ".join(f"-S {change}" for change in result["short"])
    return table([f"`{name}`" for name in names], rows) + f"\n\nAll with `{short}`; the first is the default."
