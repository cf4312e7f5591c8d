"""Makes the `python` of this folder the first on PATH: what tests start with it starts warm, as server.py explains."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent

if "WARM_SERVER" not in os.environ:  # else this is one of the processes of `make test`, which share a server
    path = os.pathsep.join([str(FOLDER), str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.update(WARM_INTERPRETER=sys.executable, WARM_SERVER=f"{tempfile.mkdtemp()}/socket", PATH=path)
SESSION = Path(os.environ["WARM_SERVER"]).parent  # a folder that is removed at the end


def start_server() -> subprocess.Popen:
    """The server, once it listens. It ends, with all that it runs, when its standard input is closed."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads should not fork
    environment = {**os.environ, **one_thread, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, FOLDER / "server.py", os.environ["WARM_SERVER"]]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    while not Path(os.environ["WARM_SERVER"]).exists():
        assert server.poll() is None
        time.sleep(0.01)
    return server
