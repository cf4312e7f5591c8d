"""`make compare`: experiments side by side, the best first, and the MLflow runs that judged them.

`python src/compare.py few-steps` takes the name of an experiment, or the name or id of the MLflow run that evaluated one, and
says where both are.
"""

import argparse
import math
import shutil
import sys
from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.errors import UserError
from ddpm.experiments import WORKSPACE, Experiment, experiments_and_runs, run_label
from ddpm.paths import project_root
from ddpm.runtime.cli import clean_errors
from ddpm.tracking.connection import run_address, tracking_uri
from ddpm.tracking.provenance import setting

COLUMNS = {  # heading, metric, digits
    "fid": ("fid", 3),
    "kid": ("kid", 5),
    "prec.": ("precision", 3),
    "recall": ("recall", 3),
    "train": ("train_loss", 4),
    "val.": ("val_loss", 4),
}
SAMPLES = "output/samples.npz"
WIDTH = 100  # of the table, and of what is no terminal
SPARED = ("kid", "train", "val.", "prec.", "recall", "× floor")  # where the terminal is narrower, in this order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", help="of an experiment or an MLflow run")
    name = parser.parse_args().name
    found, runs = experiments_and_runs()
    if name:
        print(links(name, found, runs))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        Console(width=width, markup=False, emoji=False).print(table(found, runs, width))


def table(found: list[Experiment], runs: dict, width: int) -> Table:
    hidden = SPARED[: max(0, math.ceil((WIDTH - width) / 7))]
    shown = [heading for heading in ("× floor", *COLUMNS) if heading not in hidden]
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    result.add_column("experiment", overflow="fold")
    result.add_column("changed", overflow="fold", min_width=18)
    for heading in shown:
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("MLflow run", overflow="fold", min_width=12)
    best = found[0] if "fid" in found[0].metrics else None
    for e in found:
        figures = {key: f"{e.metrics[name]:.{digits}f}" for key, (name, digits) in COLUMNS.items() if name in e.metrics}
        if {"fid", "fid_floor"} <= e.metrics.keys():
            figures["× floor"] = f"{e.metrics['fid'] / e.metrics['fid_floor']:.0f}"
        run = runs.get(e.samples)
        result.add_row(
            f"★ {e.name}" if e is best else e.name,
            "\n".join([*shortened(e), *([e.state] if e.state else [])]),
            *(figures.get(heading, "") for heading in shown),
            run_label(run) if run else "",
            style="bold green" if e is best else None,
        )
    return result


def shortened(e: Experiment, most: int = 3) -> list[str]:
    """The changes, without their section where the last part of the name is enough."""
    leaves = Counter(name.rpartition(".")[2] for name in e.params)
    names = {name: leaf if leaves[leaf := name.rpartition(".")[2]] == 1 else name for name in e.changes}
    lines = [setting(names[name], value) for name, value in e.changes.items()]
    return lines if len(lines) <= most + 1 else [*lines[:most], f"and {len(lines) - most} more"]


def links(name: str, found: list[Experiment], runs: dict) -> str:
    """Both ends of the thread that `name` is one end of: DVC's experiment, and the MLflow run that judged it."""
    for e in (e for e in found if "fid" in e.metrics):
        run = runs.get(e.samples)
        runs_names = (run.info.run_name, run_label(run), run.info.run_id) if run else ()
        if name in (e.name, e.revision[:7], e.revision, *runs_names):
            take = f"`dvc exp apply {e.name}`" if e.base else f"`git checkout {e.name}`"
            page = run_address(tracking_uri(project_root()), run) if run else "its evaluation is in no run of this store"
            where = "is at hand, as no commit has it" if e.revision == WORKSPACE else take
            return f"{e.name}: {where}\n{run.info.run_name if run else 'MLflow'}: {page}"
    raise UserError(f"no finished experiment or evaluation is called {name}; `make compare` shows those that are")


if __name__ == "__main__":
    with clean_errors():
        main()
