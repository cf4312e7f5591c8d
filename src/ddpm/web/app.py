"""The addresses that the server answers. What can't be answered gets one line as `error`, with a status that tells the kind."""

import base64
import io
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, Query, Response
from fastapi import Request as Http
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from torch import Tensor

from ddpm.data.samples_file import Samples, npz
from ddpm.errors import UserError
from ddpm.figures import gif, png, sheet
from ddpm.params_file import explain
from ddpm.sampling.pictures import animation
from ddpm.serving.requests import Request, drawing, encoded, parameters
from ddpm.web.drawing import Drawing, Plan, Step
from ddpm.web.hosts import OwnHostsOnly
from ddpm.web.models import Model, Models
from ddpm.web.reality import Reality
from ddpm.web.turns import Busy, ClientLeft, Queue, worked_off

PAGE = Path(__file__).with_name("page.html")
COLUMNS = 10
KEPT = 4  # drawings with all their steps, so that a download draws nothing again
HEADERS = {  # the page has all it needs in itself
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
}
KINDS = {"png": "image/png", "gif": "image/gif", "npz": "application/octet-stream"}
Drawn = tuple[Model, Plan, list[Step]]


class Changed(UserError):
    """The model isn't the one that an address was made with."""


class Refusal(BaseModel):
    error: str  # one line


class ImageOfDrawing(Drawing):
    index: int = Field(ge=0, lt=100)


def application(models: Models, hosts: set[str]) -> FastAPI:
    """The server's application; requests must name it by an IP address, by localhost or by one of the `hosts`."""
    app = FastAPI(title=models.first.name, docs_url=None, redoc_url=None)  # these pages load scripts from a CDN
    answers = Answers(models)
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": Refusal} for status in (400, 403, 409, 422, 503)}
    for path, answer, kinds in (
        ("/", answers.page, ["text/html"]),
        ("/about", answers.about, []),
        ("/models", answers.names, []),
        ("/card", answers.card, []),
        ("/examples", answers.examples, []),
        ("/draw", answers.draw, ["text/event-stream"]),
        ("/drawing.{kind}", answers.drawing, [*KINDS.values()]),
        ("/nearest", answers.nearest, []),
        ("/sheet", answers.sheet, [KINDS["png"]]),
    ):
        content: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in kinds}}} if kinds else {}
        app.get(path, responses=refusals | content, response_class=Response if kinds else JSONResponse)(answer)
    app.post("/images", responses=refusals)(answers.images)
    app.add_middleware(OwnHostsOnly, names=hosts)
    app.add_exception_handler(RequestValidationError, lambda _, error: refusal(explained(error)))
    app.add_exception_handler(HTTPException, lambda _, error: refusal(error.detail, error.status_code))
    app.add_exception_handler(Changed, lambda _, error: refusal(str(error), 409))
    app.add_exception_handler(Busy, lambda _, error: refusal(str(error), 503))
    app.add_exception_handler(UserError, lambda _, error: refusal(str(error)))
    app.add_exception_handler(ClientLeft, lambda *_: Response(status_code=499))  # which nobody reads
    return app


class Answers:
    """The answer of each address."""

    def __init__(self, models: Models):
        self.models, self.queue = models, Queue()
        self.reality = Reality(models.params.data.name)
        self.kept: dict[str, Drawn] = {}  # the newest at the end

    def page(self) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text("utf-8"), headers=HEADERS)

    def about(self, model: str | None = None) -> dict:
        """A model: its name, its classes, and what a request may leave out."""
        m = self.models.load(model)
        dropout = m.pipeline.label_dropout
        return {
            "model": m.name,
            "classes": m.pipeline.classes,
            "sampling": m.sampling.model_dump(),
            "request": Request.model_json_schema(),
            "key": m.key,
            "checkpoint": m.checkpoint,
            "image_shape": m.pipeline.image_shape,
            "knows_classes": dropout < 1,
            "guidable": 0 < dropout < 1 or (dropout == 1 and m.pipeline.guide is not None),
        }

    def names(self) -> dict[str, str]:
        """The models that there are, by the key that the other addresses take as `model`."""
        return self.models.names()

    def card(self, model: str | None = None) -> dict[str, Any]:
        """What is known of a model: figures beside those of real images, how it was trained, its run in MLflow."""
        return self.models.card(self.models.load(model))

    async def examples(self, http: Http, model: str | None = None) -> dict[str, Any]:
        """A picture of each class: a real one, or one that the model draws if the data set isn't here."""
        m = await run_in_threadpool(self.models.load, model)
        classes = m.pipeline.classes if m.pipeline.label_dropout < 1 else []
        if not classes:
            return {"real": True, "images": []}
        try:
            images, real = await run_in_threadpool(self.reality.examples, m.pipeline), True
        except UserError:
            (images, _), real = await self._drawn_whole(m, Request.model_validate({"count": len(classes)}), http), False
        return {"real": real, "images": encoded(images, list(classes))}

    async def draw(self, wanted: Annotated[Drawing, Query()], http: Http) -> StreamingResponse:
        """Server-sent events: the place in the queue, then the images after every step, and at the end the seconds."""
        model = await run_in_threadpool(self._model, wanted)
        plan = Plan(model.pipeline, model.sampling, wanted)
        return StreamingResponse(
            self._events(model, plan, http), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def drawing(self, kind: Literal["png", "gif", "npz"], wanted: Annotated[Drawing, Query()], http: Http) -> Response:
        """A drawing as a file."""
        model, plan, steps = await self._drawn(wanted, http)
        images = steps[-1].x
        if kind == "png":
            content = png(sheet(images, min(COLUMNS, len(images))))
        elif kind == "gif":
            content = gif(animation([step.x for step in steps]))
        else:
            labels = plan.labels.masked_fill(plan.labels == plan.pipeline.null_class, -1)
            content = npz(Samples(images, labels, model.sha256))
        name = f'attachment; filename="drawing-{model.checkpoint}-{plan.p.seed}.{kind}"'
        return Response(content, media_type=KINDS[kind], headers={"Content-Disposition": name})

    async def nearest(self, wanted: Annotated[ImageOfDrawing, Query()], http: Http) -> dict[str, Any]:
        """The training image nearest to one of the images, with its distance beside what test images have."""
        if wanted.index >= wanted.count:
            raise UserError(f"index: {wanted.index}, but the drawing has the images 0 to {wanted.count - 1}")
        drawing = Drawing(**wanted.model_dump(exclude={"index"}))
        model, _, steps = await self._drawn(drawing, http)
        found = await run_in_threadpool(self.reality.neighbour, steps[-1].x[wanted.index], model.pipeline)
        (image,) = encoded(found.image[None], [found.name])
        return image | {"distance": found.distance, "test_median": found.test_median, "closer": found.closer}

    async def sheet(self, wanted: Annotated[Request, Query()], http: Http) -> Response:
        """One PNG, with ten images per row."""
        images, _ = await self._drawn_whole(self.models.first, wanted, http)
        return Response(png(sheet(images, min(COLUMNS, len(images)))), media_type="image/png")

    async def images(self, wanted: Request, http: Http) -> dict:
        """Each image as a PNG, and its class."""
        return {"images": encoded(*await self._drawn_whole(self.models.first, wanted, http))}

    def _model(self, wanted: Drawing) -> Model:
        model = self.models.load(wanted.model)
        if wanted.checkpoint not in (None, model.checkpoint):
            raise Changed(
                f"{model.name} is another model now ({model.checkpoint}) than the one of this address ({wanted.checkpoint})"
            )
        return model

    async def _drawn_whole(self, model: Model, wanted: Request, http: Http) -> tuple[Tensor, list[str]]:
        """Images and names, for addresses that show no steps."""
        p = parameters(model.pipeline, model.sampling, wanted)
        async with self.queue.turn(http):
            async for done in worked_off(drawing(model.pipeline, p, wanted.count), http):
                if done != "step":
                    return done
        raise AssertionError("a drawing ends with its images")

    async def _events(self, model: Model, plan: Plan, http: Http) -> AsyncIterator[str]:
        try:
            with self.queue.place() as place:
                async for ahead in self.queue.ahead(place, http):
                    yield event(kind="queue", ahead=ahead)
                began = time.monotonic()
                yield event(
                    kind="start", model=model.name, checkpoint=model.checkpoint, names=plan.names, sampling=plan.p.model_dump()
                )
                steps = []
                async for step in worked_off(plan.steps(), http):
                    steps.append(step)
                    yield event(
                        kind="step", number=step.number, noise_level=step.noise_level, evaluations=step.evaluations,
                        x=sprite(step.x), x0=None if step.x0 is None else sprite(step.x0), seconds=time.monotonic() - began,
                    )  # fmt: skip
                self._keep(model, plan, steps)
                yield event(kind="end", seconds=time.monotonic() - began)
        except ClientLeft:
            return
        except UserError as error:
            yield event(kind="error", error=str(error))

    async def _drawn(self, wanted: Drawing, http: Http) -> Drawn:
        """All steps of a drawing: those that were kept, or drawn again."""
        model = await run_in_threadpool(self._model, wanted)
        plan = Plan(model.pipeline, model.sampling, wanted)
        if kept := self.kept.get(_key(model, plan)):
            return kept
        async with self.queue.turn(http):
            return self._keep(model, plan, [step async for step in worked_off(plan.steps(), http)])

    def _keep(self, model: Model, plan: Plan, steps: list[Step]) -> Drawn:
        self.kept[_key(model, plan)] = drawn = (model, plan, steps)
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return drawn


def _key(model: Model, plan: Plan) -> str:
    """What tells drawings apart."""
    strip = plan.drawing.model_dump(include={"count", "to_class", "to_seed"})
    return json.dumps([model.sha256, plan.p.model_dump(), strip])


def event(**content: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def sprite(images: Tensor) -> str:
    """All images in one PNG of their own size, ten per row, as the address of an <img>."""
    rows = -(-len(images) // COLUMNS)
    blank = images.new_zeros(rows * COLUMNS - len(images), *images.shape[1:])
    tiles = torch.cat([images, blank]).unflatten(0, (rows, COLUMNS))
    pixels = tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def explained(error: RequestValidationError) -> str:
    """A request's mistakes in one line."""
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        return f"not JSON ({faults[0]['ctx']['error']})"
    if faults[0]["loc"] == ("body",):
        return 'the body should be JSON such as {"classes": ["Bag"]}, sent as Content-Type: application/json'
    return "; ".join(explain({**fault, "loc": fault["loc"][1:]}, ImageOfDrawing) for fault in faults)


def refusal(message: str, status: int = 422) -> JSONResponse:
    return JSONResponse({"error": message}, status)
