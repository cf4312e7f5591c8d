"""How MLflow is reached: the address of the store, the addresses of its pages, and its errors in one line.

Every module that sends to MLflow or asks it imports this one first: MLflow reads the defaults below from the environment.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Run

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # what fails stays in the run's queue, which is sent again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # seconds

EXPERIMENT = "fashion-mnist-ddpm"  # the default of MLFLOW_EXPERIMENT_NAME
SQLITE = "sqlite:///"
PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # MLflow's codes; retrying is useless
ACCESS_ERRORS = {
    "UNAUTHENTICATED": "login failed; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "PERMISSION_DENIED": "the user in MLFLOW_TRACKING_USERNAME lacks the permission; ask the server's administrator for it",
}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, with a relative SQLite path resolved against `root`; if it isn't set, the repository's own store."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"{SQLITE}{root / 'mlflow.db'}"
    if uri.startswith(SQLITE):
        return f"{SQLITE}{root / uri.removeprefix(SQLITE)}"
    return uri


def store_exists(uri: str) -> bool:
    """False if opening the store would create an empty one."""
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).exists()


def experiment_name() -> str:
    """The MLflow experiment that all runs belong to."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def without_password(uri: str) -> str:
    """The URI without its user and password, so that it can be printed."""
    return re.sub(r"//.*@", "//", uri)


def run_address(uri: str, run: "Run") -> str:
    """The address of the run's page, on the tracking server or on the server that `make ui` starts."""
    server = without_password(uri.rstrip("/")) if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def hide_info_logs() -> None:
    """Let MLflow, and the library that creates its database, log warnings and errors only."""
    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)


def root_cause(error: BaseException) -> str:
    """The innermost cause of an error, on one line of at most 200 characters."""
    if explanation := ACCESS_ERRORS.get(getattr(error, "error_code", "")):
        return explanation
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
