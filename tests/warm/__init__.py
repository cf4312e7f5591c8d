"""Makes the `python` of this folder the first on PATH: what tests start with it starts warm, as server.py explains."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent

if "WARM_SERVER" not in os.environ:  # else this is one of the processes of `make test`, which share a server
    path = os.pathsep.join([str(FOLDER), str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.update(WARM_INTERPRETER=sys.executable, WARM_SERVER=f"{tempfile.mkdtemp()}/socket", PATH=path)


def start_server() -> subprocess.Popen:
    """The server, which ends when its standard input is closed."""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen(
        [sys.executable, FOLDER / "server.py", os.environ["WARM_SERVER"]], env=environment, stdin=subprocess.PIPE
    )
