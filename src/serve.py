"""`make serve`: a page to draw on, and a small HTTP server that draws images with MLflow's champion.

Without a champion it takes the model in the workspace, and in a fresh clone the one that comes with the repository. The page is
at http://127.0.0.1:8000; programs ask for pictures like this:

    curl -o bags.png 'http://127.0.0.1:8000/sheet?classes=Bag&count=8&seed=1'
    curl -H 'Content-Type: application/json' -d '{"classes": ["Bag", 7], "count": 4}' http://127.0.0.1:8000/images

`python src/serve.py models/diffusion_model.pth --port 8001` serves that file on another port.
"""

import argparse
import errno
import ipaddress
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn

from ddpm.errors import Stopped, UserError
from ddpm.params_file import load_params
from ddpm.paths import MODEL, project_root
from ddpm.runtime.cli import between, clean_errors
from ddpm.runtime.device import select_device
from ddpm.web.app import application
from ddpm.web.models import Models

HOST, PORT = "127.0.0.1", 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help=f"model checkpoint, such as {MODEL} (default: the champion)")
    parser.add_argument(
        "--host", default=HOST, help="the address to listen on; in a container 0.0.0.0 (default: this machine alone)"
    )
    parser.add_argument("--port", type=between(1, 65535), default=PORT)
    options = parser.parse_args()
    listening = listen(options.host, options.port)
    params = load_params()
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    models = Models(project_root(), params, device, options.model)
    app = application(models, {options.host, socket.gethostname()})
    if not is_this_machine(options.host):
        print(
            f"warning: whoever reaches {options.host} port {options.port} can draw with your models, and sees the names of your "
            "experiments; there is no password",
            file=sys.stderr,
        )
    ready = f"{models.first.name}, at {address(options.host, options.port)}; Ctrl-C stops it"
    with suppress(Stopped), listening:
        config = uvicorn.Config(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=3)
        Server(config, ready).run([listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError if that is impossible, before anything is loaded."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except socket.gaierror:
        raise UserError(f"--host: {host!r} is no address of this machine; 127.0.0.1 and 0.0.0.0 always are") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is taken; choose another: python src/serve.py --port {port + 1}") from None
        raise UserError(f"{host} port {port} can't be used ({error.strerror})") from None
    return listening


def is_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address(host: str, port: int) -> str:
    name = HOST if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


class Server(uvicorn.Server):
    """Prints the line `ready` once it answers requests."""

    def __init__(self, config: uvicorn.Config, ready: str):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)


if __name__ == "__main__":
    with clean_errors():
        main()
