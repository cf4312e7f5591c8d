"""What DVC and MLflow know of experiments: the rows of `dvc exp show`, and the MLflow runs that evaluated them.

`make compare` and `make report` are made from it. An experiment and its evaluation belong together if they have the same samples.
"""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ddpm.errors import UserError
from ddpm.params import FASHION_MNIST
from ddpm.paths import PARAMS, SAMPLES, project_root
from ddpm.tracking.client import connect
from ddpm.tracking.connection import store_exists, tracking_uri
from ddpm.tracking.provenance import flatten, git
from ddpm.tracking.queries import evaluations

WORKSPACE = "workspace"  # DVC's name for what isn't committed


@dataclass
class Experiment:
    """A DVC experiment, a commit that experiments started from, or uncommitted results in the workspace."""

    name: str  # of the experiment or the branch, else the short revision
    revision: str
    params: dict[str, Any] = field(default_factory=dict)  # by dotted name
    metrics: dict[str, float] = field(default_factory=dict)  # empty unless it is done
    samples_md5: str | None = None  # of output/samples.npz; None unless it is done
    judged_by: tuple[str, str] = ("unknown", "unknown")  # the first digits of the data set's and of the evaluator's SHA-256
    state: str = ""  # queued, running, failed or unreadable; empty if it is done
    base: dict[str, Any] = field(default_factory=dict)  # the parameters of the commit that it started from; empty for a commit

    @property
    def changes(self) -> dict[str, Any]:
        """The parameters that differ from those of the commit that it started from."""
        return {name: value for name, value in self.params.items() if self.base and self.base.get(name) != value}

    @property
    def data_set(self) -> str:
        return self.params.get("data.name", FASHION_MNIST)


def experiments_and_runs() -> tuple[list[Experiment], dict[str, Any]]:
    """The experiments, the best first, and the newest MLflow evaluation of each file of samples by its MD5."""
    root = project_root()
    with ThreadPoolExecutor() as pool:
        if store_exists(tracking_uri(root)):
            pool.submit(connect, root)  # which imports MLflow in the meantime; an error of the store is told below
        found = experiments()
    return found, evaluations(root, {e.data_set for e in found})


def comparable(found: list[Experiment]) -> dict[str, list[Experiment]]:
    """The experiments in groups whose figures can be compared, by a title: the same data set and evaluator judged them.

    Those without figures are in the first group of their data set.
    """
    groups: dict[tuple[str, str, str], list[Experiment]] = {}
    for e in found:
        same_data = (key for key in groups if key[0] == e.data_set)
        key = (e.data_set, *e.judged_by) if "fid" in e.metrics else next(same_data, (e.data_set, "", ""))
        groups.setdefault(key, []).append(e)
    titles = Counter(data_set for data_set, *_ in groups)
    return {
        data_set if titles[data_set] == 1 else f"{data_set} (data {data[:7]}, evaluator {evaluator[:7]})": group
        for (data_set, data, evaluator), group in groups.items()
    }


def experiments() -> list[Experiment]:
    """The last commit and all experiments that `dvc exp show` lists: those with the most samples first, and among them by FID.

    Also the workspace and commits that experiments started from, if their results differ from those of the last commit. Raises
    UserError if DVC fails or there is no commit.
    """
    workspace, *commits = _exp_show()
    rows = [(_experiment(commit, {}), commit["experiments"] or []) for commit in commits]
    head_revision = git("rev-parse", "HEAD")
    head = next((commit for commit, _ in rows if commit.revision == head_revision), None)
    if head is None:
        raise UserError("there is no commit to compare with yet; `git commit` creates one")
    found = []
    uncommitted = _experiment(workspace, head.params)
    if uncommitted.changes or uncommitted.metrics != head.metrics or uncommitted.state:
        found.append(uncommitted)
    for commit, started in rows:
        if commit is head or (started and commit.samples_md5 != head.samples_md5):
            found.append(commit)
        found += [_experiment(row["revs"][0], commit.params, (row["executor"] or {}).get("state")) for row in started]
    return sorted(found, key=lambda e: (e.judged_by != head.judged_by, *_rank(e)))


def _rank(e: Experiment) -> tuple[bool, tuple[str, str], float, float]:
    """Sorts by the number of samples, because FID is higher with fewer, then by FID; unfinished experiments last."""
    is_unfinished = "fid" not in e.metrics
    return is_unfinished, e.judged_by, -e.params.get("sample.count", 0), e.metrics.get("fid", math.inf)


def _exp_show() -> list[dict[str, Any]]:
    """The rows of `dvc exp show --json`: the workspace, then commits, each with the experiments that started from it."""
    revisions = [argument for commit in ("HEAD", *_started_from()) for argument in ("--rev", commit)]
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *revisions]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(errors[0] if errors else "`dvc exp show` failed")
    return json.loads(done.stdout)


def _started_from() -> list[str]:
    """The commits that experiments started from, finished or not. No branch leads to a commit that was amended."""
    references = git("for-each-ref", "--format=%(refname)", "refs/exps") or ""
    commits = {"".join(found) for found in re.findall(r"^refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/", references, re.MULTILINE)}
    for stash in ("stash", "failed"):  # of DVC's queue, whose entries name the commit
        messages = git("reflog", "show", "--format=%gs", f"refs/exps/celery/{stash}") or ""
        commits.update(re.findall(r"dvc-exp:[0-9a-f]+:([0-9a-f]{40}):", messages))
    return sorted(commits)


def _experiment(row: dict[str, Any], base: dict[str, Any], state: str | None = None) -> Experiment:
    """From a row of `dvc exp show`; `base` has the parameters of the commit that it started from."""
    data = row.get("data") or {}
    params = flatten((data.get("params") or {}).get(PARAMS.name, {}).get("data") or {})
    files = (data.get("metrics") or {}).values()
    values = {name: value for file in files for name, value in (file.get("data") or {}).items()}
    metrics = {name: value for name, value in values.items() if not isinstance(value, str) and math.isfinite(value)}
    samples = (data.get("outs") or {}).get(SAMPLES.as_posix()) or {}
    state = "unreadable" if row.get("error") else "" if state in (None, "success") else state
    return Experiment(
        name=row["name"] or (row["rev"] if row["rev"] == WORKSPACE else row["rev"][:7]),
        revision=row["rev"],
        params=params,
        metrics={} if state else metrics,
        samples_md5=None if state else samples.get("hash"),
        judged_by=(values.get("data", "unknown"), values.get("evaluator", "unknown")),
        state=state or "",
        base=base,
    )
