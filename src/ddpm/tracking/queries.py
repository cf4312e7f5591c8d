"""What is looked up in MLflow's store: the experiment, single runs, and the evaluations that `make compare` and reports show."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.errors import UserError
from ddpm.tracking.client import connect, find_experiment
from ddpm.tracking.connection import root_cause, store_exists, tracking_uri, without_password
from ddpm.tracking.views import furnish

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

MAX_RUNS = 5000  # evaluations, the newest


def evaluations(root: Path, data_sets: Iterable[str]) -> dict[str, "Run"]:
    """The newest finished evaluation of each file of samples, by the MD5 that `dvc.lock` has for the file.

    Empty if there is no store, and, after a warning, if it can't be reached.
    """
    uri = tracking_uri(root)
    if not store_exists(uri):
        return {}
    try:
        client = connect(root)
        if not (experiments := _experiments(client, data_sets)):
            return {}
        runs = client.search_runs(
            experiments,
            "tags.stage = 'evaluate' and attributes.status = 'FINISHED'",
            max_results=MAX_RUNS,
            order_by=["attributes.start_time DESC"],
        )
    except Exception as error:
        print(f"warning: MLflow at {without_password(uri)}: {root_cause(error)}; continuing without its runs", file=sys.stderr)
        return {}
    return {run.data.tags["samples_md5"]: run for run in reversed(runs) if "samples_md5" in run.data.tags}


def evaluation_of(root: Path, data_set: str, checkpoint_sha256: str) -> "Run | None":
    """The evaluation of a model with the lowest FID; None if the store has none, or can't be reached."""
    if not store_exists(tracking_uri(root)):
        return None
    try:
        client = connect(root)
        if not (experiment := find_experiment(client, data_set)):
            return None
        condition = (
            f"tags.stage = 'evaluate' and attributes.status = 'FINISHED' and tags.checkpoint_sha256 = '{checkpoint_sha256}'"
        )
        order = ["metrics.`eval/fid` ASC"]
        found = client.search_runs([experiment.experiment_id], condition, max_results=1, order_by=order)
    except Exception:  # a store that is down; figures are left out
        return None
    return found[0] if found else None


def _experiments(client: "MlflowClient", data_sets: Iterable[str]) -> list[str]:
    """The ids of the data sets' experiments. There is a warning for one that was deleted."""
    found = set()
    for name in data_sets:
        try:
            if experiment := find_experiment(client, name):
                found.add(experiment.experiment_id)
        except UserError as error:
            print(f"warning: MLflow: {error}", file=sys.stderr)
    return sorted(found)


def experiment_with_views(root: Path, data_set: str) -> "Experiment | None":
    """The data set's experiment, with our views if the store takes them; None before the first run.

    Raises UserError if the store is unreachable or denies access, or if the experiment was deleted.
    """
    uri = tracking_uri(root)
    if not store_exists(uri):
        return None
    try:
        client = connect(root)
        if experiment := find_experiment(client, data_set):
            furnish(client, experiment, data_set)
            experiment = client.get_experiment(experiment.experiment_id)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {without_password(uri)}: {root_cause(error)}") from None
    return experiment


def newest_run(client: "MlflowClient", experiment: str, condition: str, deleted: bool = False) -> "Run | None":
    """The newest run of an experiment (its id) that meets a condition in MLflow's search language; None if there is none.

    Runs that were deleted in MLflow count only if they are asked for.
    """
    from mlflow.entities import ViewType

    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    runs = client.search_runs([experiment], condition, view, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None
