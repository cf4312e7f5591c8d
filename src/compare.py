"""`make compare`: a table of the experiments, the best first, with the MLflow runs that evaluated them.

`python src/compare.py few-steps` prints where to find one experiment and its evaluation. It takes the name of the experiment, or
the name or id of the MLflow run.
"""

import argparse
import math
import shutil
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.errors import UserError
from ddpm.experiments import WORKSPACE, Experiment, comparable, experiments_and_runs
from ddpm.paths import project_root
from ddpm.runtime.cli import clean_errors
from ddpm.tracking.connection import run_address
from ddpm.tracking.provenance import setting, short_names

FLOORS = "× floor"  # FID as a multiple of what real images score
COLUMNS = {  # heading: metric, digits
    "fid": ("fid", 3),
    "c2st": ("c2st_auc", 3),
    "prec.": ("precision", 3),
    "recall": ("recall", 3),
    "train": ("train_loss", 4),
    "val.": ("val_loss", 4),
}
WIDTH = 100  # characters of the whole table
COLUMN_WIDTH = 7
HIDDEN_FIRST = ("train", "val.", "prec.", "recall", "c2st", FLOORS)  # on narrower terminals, in this order
LEGEND = """\
★  the lowest FID among those with the most samples
× floor  FID divided by the FID of as many real images
c2st     how well a network tells samples from real images: 0.5 not at all, 1 always"""
MOST_CHANGES = 3  # changed parameters in a row, and one more if that is the last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", help="of an experiment, or of the MLflow run that evaluated it")
    name = parser.parse_args().name
    found, runs = experiments_and_runs()
    if name:
        print(links(name, found, runs))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        console, tables = Console(width=width, markup=False, emoji=False, highlight=False), comparable(found)
        for title, group in tables.items():
            if len(tables) > 1:
                console.print(f"\n{title}")
            console.print(table(group, runs, width))
        console.print(LEGEND)


def table(found: list[Experiment], runs: dict[str, Any], width: int) -> Table:
    """One row per experiment, in at most `width` characters if possible. The first one is the best and has a star."""
    hidden = HIDDEN_FIRST[: max(0, math.ceil((WIDTH - width) / COLUMN_WIDTH))]
    headings = [heading for heading in (FLOORS, *COLUMNS) if heading not in hidden]
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    result.add_column("experiment", overflow="fold")
    result.add_column("changed", overflow="fold", min_width=18)
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("MLflow run", overflow="fold", min_width=12)
    best = found[0] if "fid" in found[0].metrics else None
    for e in found:
        run, texts = runs.get(e.samples_md5 or ""), figures(e)
        result.add_row(
            f"★ {e.name}" if e is best else e.name,
            "\n".join([*changes(e), *([e.state] if e.state else [])]),
            *(texts.get(heading, "") for heading in headings),
            run.info.run_name if run else "",
            style="bold green" if e is best else None,
        )
    return result


def figures(e: Experiment) -> dict[str, str]:
    """The metrics of an experiment as text, by heading."""
    texts = {heading: f"{e.metrics[name]:.{digits}f}" for heading, (name, digits) in COLUMNS.items() if name in e.metrics}
    if {"fid", "fid_floor"} <= e.metrics.keys():
        texts[FLOORS] = f"{e.metrics['fid'] / e.metrics['fid_floor']:.0f}"
    return texts


def changes(e: Experiment) -> list[str]:
    """The changed parameters, one per line. The section is left out if the rest of the name is unique."""
    names = short_names(e.params)
    lines = [setting(names[name], value) for name, value in e.changes.items()]
    if len(lines) <= MOST_CHANGES + 1:
        return lines
    return [*lines[:MOST_CHANGES], f"and {len(lines) - MOST_CHANGES} more"]


def links(name: str, found: list[Experiment], runs: dict[str, Any]) -> str:
    """Two lines: how to get the experiment called `name` into the workspace, and the address of the run that evaluated it.

    `name` may be that of the run, too. Raises UserError if nothing that is finished is called so.
    """
    for e in (e for e in found if "fid" in e.metrics):
        run = runs.get(e.samples_md5 or "")
        names_of_run = (run.info.run_name, run.info.run_id) if run else ()
        if name in (e.name, e.revision[:7], e.revision, *names_of_run):
            if e.revision == WORKSPACE:
                where = "uncommitted results in your workspace"
            else:
                where = f"`dvc exp apply {e.name}`" if e.base else f"`git checkout {e.name}`"
            page = run_address(project_root(), run) if run else "no run in this store evaluated it"
            return f"{e.name}: {where}\n{run.info.run_name if run else 'MLflow'}: {page}"
    raise UserError(f"no finished experiment or evaluation is called {name}; `make compare` lists them")


if __name__ == "__main__":
    with clean_errors():
        main()
