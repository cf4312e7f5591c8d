"""Images on request: what may be asked for, and the answer."""

import base64
import difflib
import threading
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from ddpm.data import CLASSES, to_uint8
from ddpm.figures import png
from ddpm.generation import BATCH, Generator, class_ids, class_labels
from ddpm.params import SampleParams

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
    def _are_classes(cls, values: list[str] | None) -> list[str] | None:
        if values == []:
            raise PydanticCustomError("allowed", "a list of classes, or left out for all of them")
        return values and [_class_name(value) for value in values]


def _class_name(text: str) -> str:
    """The class of that name or number."""
    names = {name.lower(): name for name in CLASSES} | {str(i): name for i, name in enumerate(CLASSES)}
    if name := names.get(text.strip().lower()):
        return name
    if "," in text:
        hint = "one in each"
    elif close := difflib.get_close_matches(text.lower(), names, n=1):
        hint = f"did you mean {names[close[0]]}?"
    else:
        hint = f"there are {', '.join(CLASSES)}"
    raise PydanticCustomError("allowed", f"a list of classes, by name or number; {hint}")


def respond(generator: Generator, sampling: SampleParams, request: Request) -> tuple[Tensor, list[int]]:
    """Images uint8 [N, 28, 28] and their classes, NULL_CLASS for none. Raises UserError where the model can't do that."""
    changes: dict[str, Any] = request.model_dump(include={"seed", "steps", "guidance_scale"}, exclude_none=True)
    if request.classes:
        changes["classes"] = [CLASSES.index(name) for name in request.classes]
    if generator.label_dropout == 1:  # it knows no classes
        changes.setdefault("classes", "none")
    elif generator.label_dropout == 0:  # it can't be guided
        changes.setdefault("guidance_scale", 1.0)
    p = sampling.model_copy(update=changes)
    generator.check(p)
    labels = class_labels(class_ids(p), request.count)
    images = []
    with ONE_AT_A_TIME:
        for first, y in zip(range(0, len(labels), BATCH), labels.split(BATCH), strict=True):
            *_, x = generator.walk(y, p, first)
            images.append(to_uint8(x).cpu())
    return torch.cat(images), labels.tolist()


def encoded(images: Tensor, labels: list[int]) -> list[dict[str, str]]:
    """For JSON: each image's class and its PNG, 28 × 28 pixels, in base64."""
    names = [*CLASSES, "none"]
    pngs = [png(Image.fromarray(image.numpy())) for image in images]
    return [{"class": names[label], "png": base64.b64encode(data).decode()} for label, data in zip(labels, pngs, strict=True)]
