""""""

import logging
import os
import re
from pathlib import Path
from typing import Any

from ddpm.errors import UserError

EXPERIMENT = "fashion-mnist-ddpm"  # MLFLOW_EXPERIMENT_NAME names another
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # asking again would change nothing
NO_ACCESS = {
    "UNAUTHENTICATED": "it knows no such user and password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "PERMISSION_DENIED": "the user in MLFLOW_TRACKING_USERNAME may not do this there; its administrator can permit it",
}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, a relative sqlite path in it taken from `root`; else the store embedded in the repository."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    prefix = "sqlite:///"
    if not uri:
        return f"{prefix}{root / 'mlflow.db'}"
    if uri.startswith(prefix):
        return f"{prefix}{root / uri.removeprefix(prefix)}"
    return uri


def run_address(uri: str, run: Any) -> str:
    """The run's page: on the server, or on the one that `make ui` starts."""
    server = without_password(uri.rstrip("/")) if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def experiment_id(uri: str) -> str | None:
    """The experiment's on a server; None before the first run. Raises UserError where it is away, or doesn't let us in."""
    import mlflow

    try:
        experiment = mlflow.MlflowClient(uri, uri).get_experiment_by_name(experiment_name())
    except Exception as error:
        raise UserError(f"MLflow at {without_password(uri)}: {root_cause(error)}") from None
    return experiment and experiment.experiment_id


def without_password(uri: str) -> str:
    """To be shown: user and password left out."""
    return re.sub(r"//.*@", "//", uri)


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def quiet() -> None:
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def store_exists(uri: str) -> bool:
    """False where looking would create an empty store."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def root_cause(error: BaseException) -> str:
    """What lies at the root of an error, on one line."""
    if said := NO_ACCESS.get(getattr(error, "error_code", None)):
        return said
    while deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = deeper
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
