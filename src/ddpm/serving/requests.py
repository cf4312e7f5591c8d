"""Images on request: what a client may ask for, and the answer to it."""

import base64
import difflib
import reprlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from ddpm.data.pixels import to_uint8
from ddpm.errors import UserError
from ddpm.figures import png
from ddpm.params import SampleParams
from ddpm.sampling.pipeline import Pipeline, label_batches

ONE_AT_A_TIME = threading.Lock()  # requests wait for one another: PyTorch uses all processors for one batch
NAMES_OR_NUMBERS: dict[str, Any] = {  # JSON may have numbers, too
    "anyOf": [{"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1}, {"type": "null"}]
}


class Request(BaseModel):
    """Images `0` … `count - 1` of a seed. Omitted values default to those that the model was evaluated with."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    classes: list[str] | None = Field(None, json_schema_extra=NAMES_OR_NUMBERS)  # the images take turns
    count: int = Field(10, ge=1, le=500)
    seed: int = Field(0, ge=0, lt=2**32)
    steps: int | None = Field(None, ge=1, le=10_000)
    guidance_scale: float | None = Field(None, ge=0, le=100)

    @field_validator("classes")
    @classmethod
    def _not_empty(cls, values: list[str] | None) -> list[str] | None:
        if values == []:
            raise PydanticCustomError("allowed", "a list of classes, or left out for all of them")
        return values


def respond(pipeline: Pipeline, sampling: SampleParams, request: Request) -> tuple[Tensor, list[str]]:
    """Images uint8 [N, H, H] or [N, H, H, 3], and the name of each one's class.

    `sampling` has the values that the request omits. Raises UserError if the model can't do what is asked.
    """
    with ONE_AT_A_TIME:
        *_, result = drawing(pipeline, parameters(pipeline, sampling, request), request.count)
    return result


def parameters(pipeline: Pipeline, sampling: SampleParams, request: Request) -> SampleParams:
    """What the request asks for, with the values of `sampling` that it omits. Raises UserError if the model can't do it."""
    changes: dict[str, Any] = request.model_dump(include={"seed", "steps", "sampler", "guidance_scale"}, exclude_none=True)
    if request.classes:
        changes["classes"] = class_numbers(request.classes, pipeline.classes)
    if pipeline.label_dropout == 1:  # trained without classes
        changes.setdefault("classes", "none")
    elif pipeline.label_dropout == 0:  # guidance needs a model that also trained without classes
        changes.setdefault("guidance_scale", 1.0)
    p = sampling.model_copy(update=changes)
    pipeline.check(p)
    return p


def drawing(pipeline: Pipeline, p: SampleParams, count: int) -> Iterator[Any]:
    """Yields "step" after every step, and at last what `respond` returns."""
    images, names = [], []
    for first, labels in label_batches(pipeline.class_ids(p), count):
        for x in pipeline.iter_samples(labels, p, first):  # noqa: B007 -- the last one is used
            yield "step"
        images.append(to_uint8(x).cpu())
        names += class_names(pipeline, labels)
    yield torch.cat(images), names


def class_names(pipeline: Pipeline, labels: Tensor) -> list[str]:
    """For each label the name of its class, which is "none" for the null class."""
    return [[*pipeline.classes, "none"][label] for label in labels]


def encoded(images: Tensor, names: list[str]) -> list[dict[str, str]]:
    """The answer in JSON: for each image its class, and a PNG of its own size in base64."""
    pngs = [png(Image.fromarray(image.numpy())) for image in images]
    return [{"class": name, "png": base64.b64encode(data).decode()} for name, data in zip(names, pngs, strict=True)]


def class_numbers(asked: list[str], classes: Sequence[str]) -> list[int]:
    """The numbers of classes that are given by name, in any case, or by number. Raises UserError if one doesn't exist."""
    numbers = {str(i): i for i in range(len(classes))} | {name.lower(): i for i, name in enumerate(classes)}
    for text in asked:
        if text.strip().lower() not in numbers:
            hint = _hint(text, numbers, classes)
            raise UserError(f"classes: {reprlib.repr(asked)} should be a list of classes, by name or number; {hint}")
    return [numbers[text.strip().lower()] for text in asked]


def _hint(text: str, numbers: dict[str, int], classes: Sequence[str]) -> str:
    """What a user may have meant by `text`, which is no class."""
    if "," in text:
        return "give each class by itself"
    if len(longer := [name for name in numbers if name.startswith(text.strip().lower())]) == 1:
        return f"did you mean {classes[numbers[longer[0]]]}?"
    if not text.strip().isdecimal() and (close := difflib.get_close_matches(text.lower(), numbers, n=1)):
        return f"did you mean {classes[numbers[close[0]]]}?"
    return f"the classes are {', '.join(classes)}" if classes else "this model has no classes"
