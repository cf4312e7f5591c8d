"""`make ui`: the MLflow UI of this repository's store, for this machine only.

Prints the address of the leaderboard as soon as the server is ready. `python src/ui.py --port 5001` uses another port. If
MLFLOW_TRACKING_URI names a server, it starts none and prints that server's address.
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
from ddpm.files import write_atomic
from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import project_root
from ddpm.runtime.cli import between, clean_errors
from ddpm.tracking.client import ARTIFACTS
from ddpm.tracking.connection import UI_HOST, UI_PORT, UI_PORT_FILE, tracking_uri, ui_port
from ddpm.tracking.queries import experiment_with_views
from ddpm.tracking.views import runs_page

READY_SECONDS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=between(1, 65535), default=UI_PORT)
    port = parser.parse_args().port
    root = project_root()
    uri, data_set = tracking_uri(root), FASHION_MNIST
    try:
        data_set = load_params().data.name
    except UserError as error:  # old runs can be looked at all the same
        print(f"note: {error}; showing the runs of {data_set}", file=sys.stderr)
    if uri.startswith("http"):
        print(runs_page(uri.rstrip("/"), experiment_with_views(root, data_set), data_set))
        return
    with socket.socket() as probe:
        if probe.connect_ex((UI_HOST, port)) == 0:
            another = f"to use another port: python src/ui.py --port {port + 1}"
            raise UserError(f"port {port} is already in use, perhaps by another `make ui`; {another}")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", UI_HOST, "--port", str(port), "--workers", "1"),
        *("--artifacts-destination", str(root / ARTIFACTS)),
    ]
    experiment = None
    try:
        experiment = experiment_with_views(root, data_set)
    except UserError as error:  # such as that it was deleted, which can be undone on the server's pages
        print(f"note: {error}", file=sys.stderr)
    server = start_server(command, uri)
    try:
        address = f"http://{UI_HOST}:{port}"
        wait_until_ready(server, address, command)
        write_atomic(root / UI_PORT_FILE, str(port).encode())
        print(f"{runs_page(address, experiment, data_set)}\nPress Ctrl-C to stop the server.", flush=True)
        with suppress(Stopped):
            server.wait()
    finally:
        if ui_port(root) == port:
            (root / UI_PORT_FILE).unlink(missing_ok=True)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def start_server(command: list[str], uri: str) -> subprocess.Popen[bytes]:
    """An MLflow server for the store `uri`, in a session of its own: Ctrl-C doesn't reach it, and its workers end with it."""
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which other users could see: it may have a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nothing here uses it; it takes 40 s to start and 2.6 GB of memory
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_until_ready(server: subprocess.Popen[bytes], address: str, command: list[str]) -> None:
    """Return once the server answers. Raises UserError if it exits or takes too long."""
    session = requests.Session()
    session.trust_env = False  # never through a proxy
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            by_hand = f"MLFLOW_BACKEND_STORE_URI=… {shlex.join(command)}"
            raise UserError(f"the MLflow server exited with status {server.returncode}; run `{by_hand}` to see why")
        try:
            if session.get(f"{address}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise UserError(f"the MLflow server did not answer at {address} within {READY_SECONDS} s")


if __name__ == "__main__":
    with clean_errors():
        main()
