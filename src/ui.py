"""`make ui`: the MLflow UI over this repository's store, for this machine alone.

Prints the address of the runs when it is ready. `python src/ui.py --port 5001` uses another port. Where MLFLOW_TRACKING_URI
names a server it starts nothing: the address is that server's.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import requests

from ddpm.errors import Stopped, UserError
from ddpm.paths import project_root
from ddpm.runtime.cli import between, clean_errors
from ddpm.tracking.connection import experiment_id, experiment_name, tracking_uri, without_password

HOST, PORT = "127.0.0.1", 5000
READY_SECONDS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=between(1, 65535), default=PORT)
    port = parser.parse_args().port
    root = project_root()
    uri = tracking_uri(root)
    if uri.startswith("http"):
        print(page(without_password(uri.rstrip("/")), experiment_id(uri)))
        return
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise UserError(f"port {port} is taken, perhaps by another `make ui`; choose one: python src/ui.py --port {port + 1}")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--artifacts-destination", str(root / "mlartifacts")),
    ]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not among the arguments: it may have a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would take 40 s and 2.6 GB
    }
    server = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through us, and it leaves nobody behind
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        print(f"{started(server, port)}\nCtrl-C ends it", flush=True)
        with suppress(Stopped):
            server.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def page(server: str, experiment: str | None) -> str:
    """Of the runs on a server."""
    if experiment is None:
        return f"{server} (no runs yet: `dvc repro` makes the first)"
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def started(server: subprocess.Popen, port: int) -> str:
    """The page of the runs, once the server that we started answers."""
    address, session = f"http://{HOST}:{port}", requests.Session()
    session.trust_env = False  # a proxy has no business here
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            command = f"MLFLOW_BACKEND_STORE_URI=… {shlex.join(server.args)}"
            raise UserError(f"the MLflow server ended with status {server.returncode}; `{command}` says why")
        try:
            answer = session.get(
                f"{address}/api/2.0/mlflow/experiments/get-by-name", {"experiment_name": experiment_name()}, timeout=5
            )
        except requests.RequestException:
            time.sleep(0.2)
            continue
        if answer.ok:
            return page(address, answer.json()["experiment"]["experiment_id"])
        if answer.status_code == 404:
            return page(address, None)
        return address
    raise UserError(f"the MLflow server doesn't answer at {address} within {READY_SECONDS} s")


if __name__ == "__main__":
    with clean_errors():
        main()
