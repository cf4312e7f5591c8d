"""Runs of the pipeline as DVC experiments, for the parts of the bench that compare whole runs."""

import json
import os
import subprocess
import time

from contenders import ROOT


def run_experiments(changes: dict[str, list[str]], jobs: int) -> dict[str, dict[str, float]]:
    """The metrics of each named experiment, which is the default with its changes (`train.seed=1` …), `jobs` at a time.

    A job has an equal share of the processor's cores. Raises SystemExit naming those that failed.
    """
    for name, settings in changes.items():
        dvc("exp", "run", "--queue", "-n", name, *(part for setting in settings for part in ("-S", setting)))
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    dvc("queue", "start", "-j", str(jobs), **environment)
    while pending := [name for name, status in queue().items() if name in changes and status not in ("Success", "Failed")]:
        print(f"{len(changes) - len(pending)} of {len(changes)} done", flush=True)
        time.sleep(30)
    metrics = {
        e["name"]: {name: value for file in e["revs"][0]["data"]["metrics"].values() for name, value in file["data"].items()}
        for revision in json.loads(dvc("exp", "show", "--json"))
        for e in revision["experiments"] or []
        if e["name"] in changes and e["revs"][0]["data"]
    }
    if missing := changes.keys() - metrics.keys():
        raise SystemExit(f"no metrics of {', '.join(sorted(missing))}; `dvc queue logs NAME` says why")
    return metrics


def dvc(*arguments: str, **environment: str) -> str:
    command = ["dvc", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def queue() -> dict[str, str]:
    """The status of each queued experiment by its name."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {entry["name"]: entry["status"] for entry in repo.experiments.celery_queue.status()}
