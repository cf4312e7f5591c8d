"""`make compare`: experiments side by side, the best first, and the MLflow runs that judged them.

`python src/compare.py few-steps` takes the name of an experiment, or the name or id of the MLflow run that evaluated one, and
says where both are.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.params import UserError, clean_errors, project_root
from ddpm.tracking.provenance import flatten, git, setting
from ddpm.tracking.store import evaluations, run_address, tracking_uri

COLUMNS = {  # heading, metric, digits
    "fid": ("fid", 3),
    "kid": ("kid", 5),
    "prec.": ("precision", 3),
    "recall": ("recall", 3),
    "train": ("train_loss", 4),
    "val.": ("val_loss", 4),
}
SAMPLES = "output/samples.npz"
WORKSPACE = "workspace"  # as DVC calls it
WIDTH = 100  # of the table, and of what is no terminal
SPARED = ("kid", "train", "val.", "prec.", "recall", "× floor")  # where the terminal is narrower, in this order


@dataclass
class Experiment:
    name: str  # of the experiment, the branch or the commit
    revision: str
    params: dict = field(default_factory=dict)  # flat
    metrics: dict = field(default_factory=dict)
    samples: str | None = None  # their MD5
    state: str = ""  # queued, running, failed; empty once it is done
    base: dict = field(default_factory=dict)  # the parameters that an experiment started from; a commit has none

    @property
    def changes(self) -> dict:
        return {name: value for name, value in self.params.items() if self.base and self.base.get(name) != value}


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


def experiments_and_runs() -> tuple[list[Experiment], dict]:
    """What DVC knows, and MLflow's evaluations by the MD5 of their samples."""
    with ThreadPoolExecutor() as pool:  # each takes seconds
        asked = pool.submit(experiments), pool.submit(evaluations, project_root())
    return asked[0].result(), asked[1].result()


def experiments() -> list[Experiment]:
    """All experiments of `dvc exp show` and the last commit; those with most samples first, by `fid`.

    Among them are commits that experiments started from, and the workspace, where they have other results than the last.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", "--all-commits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(said[0] if said else "`dvc exp show` failed")
    rows, head_revision = json.loads(done.stdout), git("rev-parse", "HEAD")
    commits = [(_experiment(commit, {}), commit["experiments"] or []) for commit in rows[1:]]
    head = next((base for base, _ in commits if base.revision == head_revision), None)
    if head is None:
        raise UserError("there is no commit yet to compare with: `git commit` makes the first")
    found, edited = [], _experiment(rows[0], head.params)
    if edited.changes or edited.metrics != head.metrics or edited.state:
        found.append(edited)
    for base, started in commits:
        if base is head or (started and base.samples != head.samples):
            found.append(base)
        for e in started:
            found.append(_experiment(e["revs"][0], base.params, (e["executor"] or {}).get("state")))
    return sorted(found, key=lambda e: (-e.params.get("sample.count", 0) * ("fid" in e.metrics), e.metrics.get("fid", math.inf)))


def _experiment(row: dict, base: dict, state: str | None = None) -> Experiment:
    """From a row of `dvc exp show --json`; `base` are the parameters that it started from."""
    data = row.get("data") or {}
    params = flatten((data.get("params") or {}).get("params.yaml", {}).get("data") or {})
    files = (data.get("metrics") or {}).values()
    metrics = {name: value for file in files for name, value in (file.get("data") or {}).items() if math.isfinite(value)}
    state = "unreadable" if row.get("error") else "" if state in (None, "success") else state
    return Experiment(
        row["name"] or (row["rev"] if row["rev"] == WORKSPACE else row["rev"][:7]),
        row["rev"],
        params,
        {} if state else metrics,
        None if state else ((data.get("outs") or {}).get(SAMPLES) or {}).get("hash"),
        state,
        base,
    )


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


def run_label(run) -> str:
    """The run's name without what was changed."""
    return run.info.run_name.partition(" (")[0]


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
