"""What MLflow's page of the experiment shows: a description, and saved views of its runs.

A view says which runs are listed, in which order, with which columns and charts. MLflow keeps it as a tag of the experiment
(since version 3.15) and opens it at an address with `viewStateShareKey`. Ours are written once for each VERSION. A description
and views that users write stay as they are.
"""

import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import requests

from ddpm.tracking.connection import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

VERSION = 2  # raise it when a view changes, so that experiments get the new one
SINCE = (3, 15)  # MLflow's version
VIEW, NOTE = "mlflow.sharedViewState.", "mlflow.note.content"  # MLflow's tags of an experiment
FIRST_VIEW = "Leaderboard"
BEST_FIRST = {"orderByKey": "metrics.`eval/fid`", "orderByAsc": True}
SAMPLING = [f"params.`sample.{name}`" for name in ("sampler", "steps", "guidance_scale", "count")]
FIGURES = [f"metrics.`eval/{name}`" for name in ("fid", "fid_over_floor", "c2st_auc", "precision", "recall", "class_accuracy")]
VIEWS: dict[str, dict[str, Any]] = {
    FIRST_VIEW: {
        "searchFilter": "tags.stage = 'train'",
        **BEST_FIRST,
        "selectedColumns": [*FIGURES, "metrics.`val/loss`", "tags.`changed`", "attributes.`Duration`"],
    },
    "Curves": {
        "searchFilter": "tags.stage = 'train'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": ["tags.`changed`", "attributes.`Duration`"],
        "chartsSearchFilter": "^val/|train/loss|images",  # a regular expression
    },
    "Evaluations": {
        "searchFilter": "tags.stage = 'evaluate'",
        **BEST_FIRST,
        "selectedColumns": [*SAMPLING, *FIGURES],
    },
}
COMMON = {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"}
DESCRIPTION = """\
Trainings of a diffusion model, and the samplings and evaluations of each model as their children. `dvc repro` makes runs,
`make compare` lists them in the terminal, and the description of a run has the command that makes it again.

The menu at the top right has three views. **Leaderboard**: the trainings, the lowest FID first. **Curves**: losses, speed and
samples during training; choose the charts beside the search field. **Evaluations**: each sampling of each model.

`eval/fid` says how far samples are from the training images; less is better. Real images that the model hasn't seen score
`eval/fid_floor`, and `eval/fid_over_floor` is the FID as a multiple of that: 1 would be perfect. Compare only evaluations with
the same number of samples, `sample.count`, because fewer samples score higher. A training shows its best evaluation.

`eval/c2st_auc` says how well a small network tells samples from real images: 0.5 not at all, 1 always. Fewer than 2,000 samples
lower it.
"""


def view_key(name: str, data_set: str) -> str:
    """What the address of a view has as `viewStateShareKey`."""
    return f"ddpm-{name.lower()}-{data_set}-{VERSION}"


def furnish(client: "MlflowClient", experiment: "Experiment", data_set: str) -> None:
    """Write the description and the data set's views that the experiment doesn't have yet. If that fails, runs work without."""
    from mlflow.exceptions import MlflowException

    is_own = not (os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID"))
    tags = {} if NOTE in experiment.tags else {NOTE: DESCRIPTION}
    for name, view in VIEWS.items():
        if (tag := VIEW + view_key(name, data_set)) not in experiment.tags:
            state = {**COMMON, **view, "searchFilter": f"{view['searchFilter']} and params.`data.name` = '{data_set}'"}
            title = name if is_own else f"{name} ({data_set})"  # the experiment may have other data sets, too
            tags[tag] = json.dumps({"name": title, "createdAt": time.time_ns() // 1_000_000, "state": json.dumps(state)})
    with suppress(MlflowException):  # the user lacks the permission, or the server is unreachable
        for tag, content in tags.items():
            client.set_experiment_tag(experiment.experiment_id, tag, content)


def runs_page(server: str, experiment: "Experiment | None", data_set: str) -> str:
    """The address of the experiment's runs on a server, as the view that we show first. `server` may have a password in it."""
    shown = without_password(server)
    if experiment is None:
        return f"{shown} (no runs yet; `dvc repro` makes the first)"
    page = f"{shown}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    key = view_key(FIRST_VIEW, data_set)
    return f"{page}&viewStateShareKey={key}" if VIEW + key in experiment.tags and shows_views(server) else page


def shows_views(server: str) -> bool:
    """Whether the server's pages know saved views."""
    user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
    login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        version = requests.get(f"{server}/version", auth=login, headers=headers, timeout=5).text
        return tuple(map(int, version.split(".")[:2])) >= SINCE
    except (requests.RequestException, ValueError):
        return False
