"""A process that has imported what takes a stage seconds to import, and runs scripts in forks of itself.

`tests/warm/python` is its client: as the first `python` on the PATH of a test's commands it hands over its arguments, folder,
environment and standard streams. The script then runs as in a new interpreter, in a process and a session of its own; only the
packages of others (PyTorch, MLflow, torchmetrics …) are there already, ours come from the script's own folder. Signals that the
client gets are passed on, and if the client is killed, the script is killed as well.

`python tests/warm/server.py SOCKET` serves until its standard input is closed. It imports nothing before the first client calls.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PACKAGES = (
    *("torch", "torch._dynamo", "torchmetrics.image.fid", "torchmetrics.image.kid"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc", "pandas"),
    *("torch.distributed.run", "dvc.cli", "dvc.commands.repro", "dvc.repo.experiments.queue.celery"),
    *("hypothesis", "scipy.stats", "PIL.Image", "pydantic", "filelock", "psutil", "requests"),
    *("rich.table", "ruamel.yaml", "tqdm", "yaml"),
)


def run(request: dict, streams: list[int]) -> None:
    """Run the script as an interpreter does that is started with the request's arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    sys.modules["torch"].set_num_threads(int(threads))  # which reads the variable only when it is imported
    os.getppid = parent_of(request["client"])  # which a training with several processes watches
    sys.executable = os.environ.get("WARM_EXECUTABLE", sys.executable)  # with which the script starts others
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    shadowed = {file.stem for path in more for file in Path(path).glob("*.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in shadowed]:
        del sys.modules[name]
    sys.argv = request["arguments"]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[:1] = ["", *more]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        sys.path[:1] = ["", *more]
        exec(code, {"__name__": "__main__"})
    else:
        sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), *more]
        runpy.run_path(sys.argv[0], run_name="__main__")


def parent_of(pid: int) -> Callable[[], int]:
    """What `os.getppid` returns in the process `pid`."""
    return lambda: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def exit_after(work: Callable, *arguments: object) -> NoReturn:
    """Exit as an interpreter does at its end, but without taking down all that was imported, which takes seconds."""
    status = 0
    try:
        work(*arguments)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def receive(client: socket.socket) -> tuple[dict, list[int]]:
    """The request and the client's standard streams. Raises OSError if the client was killed while it called."""
    client.settimeout(10)
    content, streams, _, _ = socket.recv_fds(client, 4, 3)
    while len(content) < 4 or len(content) < 4 + struct.unpack("!I", content[:4])[0]:
        if not (more := client.recv(1 << 16)):
            raise ConnectionResetError
        content += more
    return json.loads(content[4:]), streams


class Server:
    def __init__(self, address: str):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.start)
        self.selector.register(sys.stdin, selectors.EVENT_READ, self.end)
        self.running: set[int] = set()  # process IDs

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self.selector.select():
                if self.selector.get_map().get(key.fd) is key:  # not ended by one of the others
                    key.data()

    def end(self) -> NoReturn:
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def start(self) -> None:
        client, _ = self.listener.accept()
        try:
            request, streams = receive(client)
        except OSError:
            client.close()
            return
        for package in PACKAGES:
            importlib.import_module(package)
        gc.freeze()  # so that a fork doesn't touch, and so copy, all of it
        if not (pid := os.fork()):
            for key in self.selector.get_map().values():
                os.close(key.fd)  # and not `unregister`, which would do so for the server as well
            os.close(client.fileno())
            os.setsid()
            exit_after(run, request, streams)
        for stream in streams:
            os.close(stream)
        self.running.add(pid)
        ended = os.pidfd_open(pid)
        self.selector.register(client, selectors.EVENT_READ, lambda: self.hear(client, pid))
        self.selector.register(ended, selectors.EVENT_READ, lambda: self.report(client, pid, ended))

    def hear(self, client: socket.socket, pid: int) -> None:
        """Pass the client's signals on."""
        try:
            number = client.recv(1)
        except OSError:
            number = b""
        if not number:
            self.selector.unregister(client)
        with suppress(ProcessLookupError):
            os.kill(pid, number[0] if number else signal.SIGKILL)

    def report(self, client: socket.socket, pid: int, ended: int) -> None:
        """Tell the client how the script ended."""
        _, status = os.waitpid(pid, 0)
        self.running.remove(pid)
        self.selector.unregister(ended)
        os.close(ended)
        if client.fileno() in self.selector.get_map():
            self.selector.unregister(client)
        with suppress(OSError):
            client.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
        client.close()


if __name__ == "__main__":
    Server(sys.argv[1]).serve()
