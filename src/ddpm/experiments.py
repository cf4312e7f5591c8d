""""""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ddpm.errors import UserError
from ddpm.paths import SAMPLES, project_root
from ddpm.tracking.provenance import flatten, git
from ddpm.tracking.queries import evaluations

WORKSPACE = "workspace"  # as DVC calls it


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
        None if state else ((data.get("outs") or {}).get(SAMPLES.as_posix()) or {}).get("hash"),
        state,
        base,
    )


def run_label(run) -> str:
    """The run's name without what was changed."""
    return run.info.run_name.partition(" (")[0]
