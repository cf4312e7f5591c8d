"""`make serve`: a small HTTP server that draws images with MLflow's champion.

Without a champion it takes the model in the workspace, and in a fresh clone the one that comes with the repository.

    curl -o bags.png 'http://127.0.0.1:8000/sheet?classes=Bag&count=8&seed=1'
    curl -H 'Content-Type: application/json' -d '{"classes": ["Bag", 7], "count": 4}' http://127.0.0.1:8000/images

`python src/serve.py models/diffusion_model.pth --port 8001` serves that file on another port.
"""

import argparse
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Query, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ddpm.errors import Stopped, UserError
from ddpm.figures import png, sheet
from ddpm.params import FASHION_MNIST, Params, SampleParams
from ddpm.params_file import explain, load_params
from ddpm.paths import MODEL, PRETRAINED, project_root
from ddpm.runtime.cli import between, clean_errors
from ddpm.runtime.device import select_device
from ddpm.sampling.pipeline import Pipeline
from ddpm.serving.pretrained import pretrained_sampling
from ddpm.serving.requests import Request, encoded, respond
from ddpm.tracking.registry import champion

HOST, PORT = "127.0.0.1", 8000
COLUMNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help=f"model checkpoint, such as {MODEL} (default: the champion)")
    parser.add_argument("--port", type=between(1, 65535), default=PORT)
    options = parser.parse_args()
    with socket.socket() as probe:
        if probe.connect_ex((HOST, options.port)) == 0:
            raise UserError(f"port {options.port} is taken; choose another: python src/serve.py --port {options.port + 1}")
    params = load_params()
    name, checkpoint, sampling = chosen(options.model, params)
    pipeline = Pipeline(checkpoint, select_device(params.runtime.device, deterministic=params.runtime.deterministic))
    app = application(pipeline, sampling, name)
    ready = f"{name}, at http://{HOST}:{options.port}; Ctrl-C stops it"
    with suppress(Stopped):
        Server(uvicorn.Config(app, host=HOST, port=options.port, log_level="warning"), ready).run()


def chosen(file: Path | None, params: Params) -> tuple[str, Path, SampleParams]:
    """The model to serve: its name, its checkpoint, and the sampling parameters that requests may omit."""
    if file is None and (registered := champion(project_root(), params.data.name)):
        return registered
    if file is None and not MODEL.exists() and params.data.name != FASHION_MNIST:
        raise UserError(f"there is no model of {params.data.name} yet; `dvc repro` trains one")
    checkpoint = file or (MODEL if MODEL.exists() else PRETRAINED)
    return str(checkpoint), checkpoint, pretrained_sampling() if checkpoint == PRETRAINED else params.sample


class Server(uvicorn.Server):
    """Prints the line `ready` once it answers requests."""

    def __init__(self, config: uvicorn.Config, ready: str):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)


def application(pipeline: Pipeline, sampling: SampleParams, name: str) -> FastAPI:
    """The addresses that the server answers. A request that can't be answered gets one line as `error`, with status 422."""
    app = FastAPI(title=name, docs_url=None, redoc_url=None)  # these pages load scripts from a CDN

    @app.get("/")
    def about() -> dict:
        about = {"model": name, "classes": pipeline.classes, "sampling": sampling.model_dump()}
        return about | {"request": Request.model_json_schema()}

    @app.get("/sheet")
    def get_sheet(request: Annotated[Request, Query()]) -> Response:
        """One PNG, with ten images per row."""
        images, _ = respond(pipeline, sampling, request)
        return Response(png(sheet(images, min(COLUMNS, len(images)))), media_type="image/png")

    @app.post("/images")
    def post_images(request: Request) -> dict:
        """Each image as a PNG, and its class."""
        return {"images": encoded(*respond(pipeline, sampling, request))}

    @app.exception_handler(RequestValidationError)
    def invalid(_: object, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        if faults[0]["type"] == "json_invalid":
            return refusal(f"not JSON ({faults[0]['ctx']['error']})")
        if faults[0]["loc"] == ("body",):
            return refusal('the body should be JSON such as {"classes": ["Bag"]}, sent as Content-Type: application/json')
        return refusal("; ".join(explain({**fault, "loc": fault["loc"][1:]}, Request) for fault in faults))

    @app.exception_handler(HTTPException)
    def refused(_: object, error: HTTPException) -> JSONResponse:
        return refusal(error.detail, error.status_code)

    @app.exception_handler(UserError)
    def impossible(_: object, error: UserError) -> JSONResponse:
        return refusal(str(error))

    return app


def refusal(message: str, status: int = 422) -> JSONResponse:
    return JSONResponse({"error": message}, status)


if __name__ == "__main__":
    with clean_errors():
        main()
