"""The default run's model under other samplers, spacings, steps and guidance: DVC experiments that train nothing."""

from contenders import ROOT
from ddpm.params_file import load_params
from experiments import run_experiments
from measure import table

SHORT = ["sample.count=2000", "sample.seed=1"]  # another seed than the one that the default run is reported with
ROWS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 1.25},
    {"guidance_scale": 1.5},
    {"guidance_scale": 2.0},
    {"clip": False},
    {"spacing": "trailing"},
    {"spacing": "trailing", "steps": 15},
    {"sampler": "ddim"},
    {"sampler": "ddpm"},
]
SETTINGS = ("sampler", "spacing", "steps", "guidance_scale", "clip")
COLUMNS = ("fid", "recall", "coverage", "class_accuracy")


def run(full: bool) -> dict:
    """`full` or not: the rows are short."""
    default = load_params(ROOT / "params.yaml").sample.model_dump()
    rows = {f"sampler-{n}": row for n, row in enumerate(ROWS)}
    metrics = run_experiments(
        {name: SHORT + [f"sample.{key}={value}" for key, value in row.items()] for name, row in rows.items()}, jobs=2
    )
    settings = {name: {key: default[key] for key in SETTINGS} | row for name, row in rows.items()}
    return {"short": SHORT, "rows": [settings[name] | {c: metrics[name][c] for c in COLUMNS} for name in rows]}


def report(result: dict) -> str:
    rows = [[*(r[key] for key in SETTINGS), *(f"{r[c]:.3f}" for c in COLUMNS)] for r in result["rows"]]
    short = " ".join(f"-S {change}" for change in result["short"])
    return table([f"`{name}`" for name in (*SETTINGS, *COLUMNS)], rows) + f"\n\nAll with `{short}`; the first is the default."
