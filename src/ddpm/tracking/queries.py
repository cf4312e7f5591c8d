""""""

import sys
from pathlib import Path
from typing import Any

from ddpm.tracking.connection import experiment_name, quiet, root_cause, store_exists, tracking_uri, without_password


def evaluations(root: Path) -> dict[str, Any]:
    """The newest finished evaluation of each file of samples, by the MD5 that `dvc.lock` has of it.

    None, and a warning, where the store can't be reached.
    """
    uri = tracking_uri(root)
    if not store_exists(uri):
        return {}
    import mlflow

    quiet()
    client = mlflow.MlflowClient(uri)
    try:
        experiment = client.get_experiment_by_name(experiment_name())
        runs = experiment and client.search_runs(
            [experiment.experiment_id],
            "tags.stage = 'evaluate' and attributes.status = 'FINISHED'",
            max_results=5000,
            order_by=["attributes.start_time DESC"],
        )
    except Exception as error:
        print(f"warning: MLflow at {without_password(uri)}: {root_cause(error)}; its runs are left out", file=sys.stderr)
        return {}
    return {run.data.tags["samples_md5"]: run for run in reversed(runs or []) if "samples_md5" in run.data.tags}
