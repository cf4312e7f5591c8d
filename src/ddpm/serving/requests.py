"""Images on request: what may be asked for, and the answer."""

import base64
import difflib
import reprlib
import threading
from collections.abc import Sequence
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

ONE_AT_A_TIME = threading.Lock()  # PyTorch uses all processors for one batch


class Request(BaseModel):
    """Images `0` … `count - 1` of a sampling run; what is left out is as in the run that the model was judged by."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    classes: list[str] | None = None  # names or numbers, taken in turn
    count: int = Field(10, ge=1, le=500)
    seed: int = Field(0, ge=0, lt=2**32)
    steps: int | None = Field(None, ge=1, le=10_000)
    guidance_scale: float | None = Field(None, ge=0, le=100)

    @field_validator("classes")
    @classmethod
    def _some(cls, values: list[str] | None) -> list[str] | None:
        if values == []:
            raise PydanticCustomError("allowed", "a list of classes, or left out for all of them")
        return values


def class_numbers(asked: list[str], classes: Sequence[str]) -> list[int]:
    """Which of the `classes` are meant, by name or number. Raises UserError where one is none of them."""
    numbers = {str(i): i for i in range(len(classes))} | {name.lower(): i for i, name in enumerate(classes)}
    for text in asked:
        if text.strip().lower() not in numbers:
            if "," in text:
                hint = "one in each"
            elif len(begun := [name for name in numbers if name.startswith(text.strip().lower())]) == 1:
                hint = f"did you mean {classes[numbers[begun[0]]]}?"
            elif not text.strip().isdecimal() and (close := difflib.get_close_matches(text.lower(), numbers, n=1)):
                hint = f"did you mean {classes[numbers[close[0]]]}?"
            else:
                hint = f"there are {', '.join(classes)}" if classes else "the model knows none"
            raise UserError(f"classes: {reprlib.repr(asked)} should be a list of classes, by name or number; {hint}")
    return [numbers[text.strip().lower()] for text in asked]


def respond(pipeline: Pipeline, sampling: SampleParams, request: Request) -> tuple[Tensor, list[str]]:
    """Images uint8 [N, …] and the names of their classes. Raises UserError where the model can't do that."""
    changes: dict[str, Any] = request.model_dump(include={"seed", "steps", "guidance_scale"}, exclude_none=True)
    if request.classes:
        changes["classes"] = class_numbers(request.classes, pipeline.classes)
    if pipeline.label_dropout == 1:  # it knows no classes
        changes.setdefault("classes", "none")
    elif pipeline.label_dropout == 0:  # it can't be guided
        changes.setdefault("guidance_scale", 1.0)
    p = sampling.model_copy(update=changes)
    pipeline.check(p)
    images, names = [], []
    with ONE_AT_A_TIME:
        for first, labels in label_batches(pipeline.class_ids(p), request.count):
            *_, x = pipeline.iter_samples(labels, p, first)
            images.append(to_uint8(x).cpu())
            names += [[*pipeline.classes, "none"][label] for label in labels]
    return torch.cat(images), names


def encoded(images: Tensor, names: list[str]) -> list[dict[str, str]]:
    """For JSON: each image's class and its PNG, a pixel a pixel, in base64."""
    pngs = [png(Image.fromarray(image.numpy())) for image in images]
    return [{"class": name, "png": base64.b64encode(data).decode()} for name, data in zip(names, pngs, strict=True)]
