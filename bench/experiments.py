"""Runs of the pipeline as DVC experiments, for the parts of the bench that compare whole runs."""

import json
import os
import subprocess
import time
from collections.abc import Iterable

from contenders import ROOT

POLL_SECONDS = 30
SILENCES = 5  # looks at which no worker answers, until they count as dead


def run_experiments(changes: dict[str, list[str]], jobs: int) -> dict[str, dict[str, float]]:
    """The metrics of each named experiment, which is the default with its changes (`train.seed=1` …), `jobs` at a time.

    A job has an equal share of the processor's cores. Experiments of the same names are replaced. Raises SystemExit naming
    those that failed.
    """
    base = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if queued := changes.keys() & queue().keys():
        dvc("queue", "remove", *queued)
    if kept := changes.keys() & set(dvc("exp", "list", "--name-only").split()):
        dvc("exp", "remove", *kept)
    for name, settings in changes.items():
        dvc("exp", "run", "--queue", "-n", name, *(part for setting in settings for part in ("-S", setting)))
    environment = os.environ | ({"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {})
    start = ["dvc", "queue", "start", "-j", str(jobs)]
    subprocess.run(start, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)  # the workers would hold a pipe open
    silences = 0  # a busy worker may not answer every time
    while pending := unfinished(changes):
        silences = 0 if workers() else silences + 1
        if silences == SILENCES:  # DVC starts none where an earlier one is just about to end
            subprocess.run(start, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        if silences == 2 * SILENCES:
            raise SystemExit(f"DVC's workers are gone, and these are not done: {', '.join(pending)}; see `dvc queue status`")
        print(f"{len(changes) - len(pending)} of {len(changes)} done", flush=True)
        time.sleep(POLL_SECONDS)
    if failed := [name for name, status in queue().items() if name in changes and status == "Failed"]:
        raise SystemExit(f"failed: {', '.join(failed)}; `dvc queue logs NAME` says why")
    shown = [e for revision in json.loads(dvc("exp", "show", "--json", "--rev", base)) for e in revision["experiments"] or []]
    return {
        e["name"]: {name: value for file in e["revs"][0]["data"]["metrics"].values() for name, value in file["data"].items()}
        for e in shown
        if e["name"] in changes
    }


def unfinished(names: Iterable[str]) -> list[str]:
    """Those that have not ended. (One that a worker is just taking is on no list of the queue.)"""
    status = queue()
    return [name for name in names if status.get(name) not in ("Success", "Failed")]


def dvc(*arguments: str) -> str:
    return subprocess.run(["dvc", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def queue() -> dict[str, str]:
    """The status of each queued experiment by its name."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {entry["name"]: entry["status"] for entry in repo.experiments.celery_queue.status()}


def workers() -> int:
    """How many of the queue's workers answer."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return len(repo.experiments.celery_queue.worker_status())
