"""How MLflow is reached: the address of the store, the addresses of its pages, and its errors in one line.

Every module that sends to MLflow or asks it imports this one first: MLflow reads the defaults below from the environment.
"""

import logging
import os
import re
import socket
import traceback
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.params import FASHION_MNIST
from ddpm.paths import CACHE

if TYPE_CHECKING:
    from mlflow.entities import Run

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # what fails stays in the run's queue, which is sent again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # seconds

EXPERIMENT, MODEL_NAME = "fashion-mnist-ddpm", "fashion-ddpm"  # of Fashion-MNIST
SQLITE = "sqlite:///"
UI_HOST, UI_PORT = "127.0.0.1", 5000
UI_PORT_FILE = CACHE / "ui-port"  # while `make ui` runs
ACCESS_ERRORS = {  # by HTTP status
    401: "login failed; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    403: "the user in MLFLOW_TRACKING_USERNAME lacks the permission; ask the server's administrator for it",
}


class Answer(Enum):
    """What an error means for what was being sent."""

    LATER = auto()  # there was no answer, or one that will be another later
    DENIED = auto()  # not to this user
    REFUSED = auto()  # not this
    LACKING = auto()  # the server is too old for it


LATER_STATUSES = (408, 425, 429)
UNKNOWN_ADDRESS = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "INTERNAL_ERROR")  # MLflow's codes for answers that aren't MLflow's


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


def experiment_name(data_set: str) -> str:
    """The MLflow experiment that the runs of a data set belong to."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or (EXPERIMENT if data_set == FASHION_MNIST else _own_name(data_set))


def model_name(data_set: str) -> str:
    """The registered model whose versions were trained on a data set."""
    return MODEL_NAME if data_set == FASHION_MNIST else _own_name(data_set)


def _own_name(data_set: str) -> str:
    name = f"{data_set}-ddpm"
    return f"{data_set}-images-ddpm" if name in (EXPERIMENT, MODEL_NAME) else name


def without_password(uri: str) -> str:
    """The URI without its user and password, so that it can be printed."""
    return re.sub(r"//.*@", "//", uri)


def run_address(root: Path, run: "Run") -> str:
    """The address of the run's page, on the tracking server or on the server that `make ui` starts."""
    uri = tracking_uri(root)
    server = without_password(uri.rstrip("/")) if uri.startswith("http") else f"http://{UI_HOST}:{ui_port(root)}"
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def ui_port(root: Path) -> int:
    """The port that the repository's `make ui` uses, or would use."""
    try:
        port = int((root / UI_PORT_FILE).read_text())
    except (OSError, ValueError):  # none runs
        return UI_PORT
    with socket.socket() as probe:
        return port if probe.connect_ex((UI_HOST, port)) == 0 else UI_PORT  # else it was killed


def hide_info_logs() -> None:
    """Let MLflow, and the library that creates its database, log warnings and errors only."""
    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status of a server's answer, or what it would be if the store is no server; None if there was no answer."""
    while error:
        response = getattr(error, "response", None)  # of requests or boto, which send and fetch files
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for frame, _ in traceback.walk_tb(error.__traceback__):  # MLflow's exceptions don't have it, but what raised them does
            response = frame.f_locals.get("response") if response is None else response
        if isinstance(status := getattr(response, "status_code", None), int):
            return status
        if getattr(error, "error_code", "INTERNAL_ERROR") != "INTERNAL_ERROR":  # which MLflow has for everything else
            return error.get_http_status_code()  # type: ignore[attr-defined]
        error = error.__cause__ or error.__context__
    return None


def answer(error: BaseException) -> Answer:
    """What an error means that was raised while something was sent to the store."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    status = http_status(error)
    if status in ACCESS_ERRORS:
        return Answer.DENIED
    if status in (404, 405, 501) and getattr(error, "error_code", None) in UNKNOWN_ADDRESS:
        return Answer.LACKING
    if status is not None:
        return Answer.REFUSED if 400 <= status < 500 and status not in LATER_STATUSES else Answer.LATER
    if isinstance(error, MlflowException | RequestException | HTTPError | ConnectionError | TimeoutError):
        return Answer.LATER
    return Answer.REFUSED  # a folder that can't be written, a library that is missing, or a value that nobody expected


def root_cause(error: BaseException) -> str:
    """The innermost cause of an error, on one line of at most 200 characters."""
    if explanation := ACCESS_ERRORS.get(http_status(error) or 0):
        return explanation
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = getattr(error, "strerror", None) or str(error)
    if filename := getattr(error, "filename", None):
        text = f"{filename}: {text}"
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
