"""The schema of params.yaml, as frozen pydantic models: one section per stage, and `runtime` for what changes no result.

`params_file.load_params` reads the file. The comments in params.yaml say what each parameter means.
"""

from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

FASHION_MNIST = "FashionMNIST"
DOWNLOADABLE = {FASHION_MNIST: 28, "MNIST": 28, "CIFAR10": 32}  # pixels along a side of their images
MIN_SIZE, MAX_SIZE = 8, 1024  # pixels along a side that data.size can ask for
GROUPS = 8  # of every GroupNorm; every width is a multiple of it
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Probability = Annotated[float, Field(ge=0, le=1)]


def allowed(what: str) -> WrapValidator:
    """For an annotated field: if its value is refused, the message is "… should be `what`" instead of several by pydantic."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        with suppress(ValidationError):
            if type(result := inner(value)) is type(value):  # a Literal with 1 in it accepts true
                return result
        raise PydanticCustomError("allowed", what)

    return WrapValidator(validate)


Width = Annotated[int, Field(ge=GROUPS, le=4096, multiple_of=GROUPS)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=5), allowed("a list of 1 to 5 multiples of 8, at most 4096")]
ClassList = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=256)]
Classes = Annotated[Literal["all", "none"] | ClassList, allowed("all, none or a list of class numbers, which start at 0")]
NoiseLevels = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]
Interval = Annotated[NoiseLevels | None, allowed("null or a list of two noise levels, such as [0.2, 3.2]")]
Pixels = Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)]
Size = Annotated[Literal["auto"] | Pixels, allowed(f"auto or a number of pixels, {MIN_SIZE} to {MAX_SIZE}")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), allowed("auto, cpu, mps, cuda or, for example, cuda:1")]


class Section(BaseModel):
    """Refuses unknown keys, values of other types (an int for a float is fine), nan and inf."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataParams(Section):
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), allowed("the name of a folder: letters, digits, . _ -")
    ]
    folder: Annotated[str, Field(min_length=1)] | None
    size: Size
    mirror: bool

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.name not in DOWNLOADABLE and self.folder is None:
            *names, last = DOWNLOADABLE
            raise ValueError(
                f"folder: only {', '.join(names)} and {last} can be downloaded; set it to the folder that holds {self.name}"
            )
        if self.name == FASHION_MNIST and self.size not in ("auto", DOWNLOADABLE[FASHION_MNIST]):
            raise ValueError(f"size: {self.size}, but {FASHION_MNIST} is always 28×28 pixels, as its evaluator expects; use auto")
        return self

    @property
    def known_size(self) -> int | None:
        """Pixels along a side of the images, if that is known before the data set is there."""
        return DOWNLOADABLE.get(self.name) if self.size == "auto" else self.size


class ModelParams(Section):
    patch_size: Annotated[Literal[1, 2, 4], allowed("1, 2 or 4")]
    channels: Widths
    blocks: Annotated[int, Field(ge=1, le=8)]
    attention: list[int]
    heads: Annotated[int, Field(ge=1, le=64)]
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def check(self, image_size: int, can_resize: bool = True) -> None:
        """Raise ValueError if no such U-Net fits images of `image_size` pixels. The message starts with the wrong key.

        It says which sizes would fit, if the user can choose one.
        """
        size, levels = image_size // self.patch_size, len(self.channels)
        divisor = self.patch_size * 2 ** (levels - 1)
        around = (image_size // divisor * divisor, (image_size // divisor + 1) * divisor)
        fitting = [str(side) for side in around if MIN_SIZE <= side <= MAX_SIZE]
        or_resize = f", or set data.size to {' or '.join(fitting)}" if can_resize and fitting else ""
        if image_size % self.patch_size:
            raise ValueError(
                f"train.model.patch_size: {image_size}×{image_size} pixels can't be divided by {self.patch_size}; "
                f"use a divisor{or_resize}"
            )
        if size % 2 ** (levels - 1):
            raise ValueError(
                f"train.model.channels: {levels} levels would halve {size}×{size} pixels unevenly; use fewer{or_resize}"
            )
        resolutions = [size // 2**level for level in range(levels)]
        for resolution in self.attention:
            if resolution not in resolutions:
                raise ValueError(f"train.model.attention: no level has resolution {resolution}; there are {resolutions}")
        # The middle of the U-Net always has attention.
        attending = {self.channels[resolutions.index(r)] for r in self.attention} | {self.channels[-1]}
        for width in sorted(attending):
            if width % self.heads:
                raise ValueError(f"train.model.heads: {self.heads} heads don't divide {width} channels evenly")


class DiffusionParams(Section):
    timesteps: Annotated[int, Field(ge=4, le=10_000)]
    schedule: Literal["linear", "cosine", "sigmoid"]
    prediction: Literal["eps", "x0", "v"]
    min_snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None


class TrainParams(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    steps: Count
    batch_size: Annotated[int, Field(ge=1, le=60_000)]
    optimizer: Literal["muon", "adamw"]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)]
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    label_dropout: Probability
    precision: Literal["auto", "float32", "bfloat16"]
    report_every: Count
    model: ModelParams
    diffusion: DiffusionParams

    def check(self, processes: int, parts: int) -> None:
        """Raise ValueError if a batch has fewer images than parts to compute. The message starts with the wrong key."""
        if self.batch_size < processes * parts:
            raise ValueError(
                f"train.batch_size: {self.batch_size} images are too few for {processes} processes in {parts} parts each; "
                "lower runtime.processes or runtime.accumulate"
            )


class SampleParams(Section):
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"]
    steps: Annotated[int, Field(ge=1, le=10_000)]
    spacing: Literal["leading", "trailing", "tapered", "linspace"]
    eta: Probability
    variance: Literal["small", "large"]
    clip: bool
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    guidance_interval: Interval
    classes: Classes
    count: Annotated[int, Field(ge=10, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]

    @model_validator(mode="after")
    def _interval_ascends(self) -> Self:
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval: {self.guidance_interval} should be two noise levels, the lower one first")
        return self

    def class_ids(self, classes: int) -> list[int]:
        """The numbers of the classes to draw, for a model with so many `classes`; none to draw without a class."""
        if isinstance(self.classes, list):
            return list(self.classes)
        return list(range(classes)) if self.classes == "all" else []

    def check(self, classes: int, of: str) -> None:
        """Raise ValueError if images of a data set or model, called `of`, with so many classes can't be drawn like this."""
        if isinstance(self.classes, list) and not classes:
            raise ValueError(f"sample.classes: {self.classes}, but {of} has no classes; use all or none")
        asked = self.class_ids(classes)
        if asked and max(asked) >= classes:
            raise ValueError(f"sample.classes: {max(asked)}, but {of} has the classes 0 to {classes - 1}")
        if self.count < len(asked):
            raise ValueError(f"sample.count: {self.count} images are fewer than the {len(asked)} classes; use at least as many")


class EvaluateParams(Section):
    classifier: Annotated[str, Field(min_length=1)]


class RuntimeParams(Section):
    device: Device
    compile: Annotated[Literal["auto", True, False], allowed("auto, true or false")]
    deterministic: bool
    processes: Annotated[int, Field(ge=1, le=64)]
    accumulate: Annotated[int, Field(ge=1, le=10_000)]
    state_seconds: Annotated[float, Field(ge=0)]
    require_mlflow: bool


class Params(Section):
    data: DataParams
    train: TrainParams
    sample: SampleParams
    evaluate: EvaluateParams
    runtime: RuntimeParams

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.data.known_size:  # otherwise training checks this, once it knows the size
            self.train.model.check(self.data.known_size, can_resize=self.data.name != FASHION_MNIST)
        self.train.check(self.runtime.processes, self.runtime.accumulate)
        if self.sample.steps > self.train.diffusion.timesteps:
            raise ValueError(
                f"sample.steps: {self.sample.steps} steps, but the model has train.diffusion.timesteps: "
                f"{self.train.diffusion.timesteps}; use at most as many"
            )
        if self.sample.guidance_scale != 1 and self.train.label_dropout == 0:
            raise ValueError(
                f"sample.guidance_scale: {self.sample.guidance_scale} needs a model that also trained without labels; "
                "set train.label_dropout > 0"
            )
        if self.sample.classes == "none" and self.train.label_dropout == 0:
            raise ValueError("sample.classes: 'none' needs a model that also trained without labels; set train.label_dropout > 0")
        if self.sample.classes != "none" and self.train.label_dropout == 1:
            raise ValueError("sample.classes: train.label_dropout: 1 makes a model without classes; set sample.classes: none")
        return self
