"""params.yaml as typed, validated, frozen objects: a section a stage, and `runtime` for what doesn't change results."""

import difflib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

IMAGE_SIZE = 28
GROUPS = 8  # of every GroupNorm: widths are multiples of it

Count = Annotated[int, Field(ge=1, le=10_000_000)]
Probability = Annotated[float, Field(ge=0, le=1)]


class UserError(Exception):
    """A mistake that the user can mend: shown as it is, without a traceback."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelParams(Section):
    patch_size: Literal[1, 2, 4]
    channels: list[Annotated[int, Field(ge=GROUPS, le=4096, multiple_of=GROUPS)]] = Field(min_length=1, max_length=5)
    blocks: Annotated[int, Field(ge=1, le=8)]
    attention: list[int]
    heads: Annotated[int, Field(ge=1, le=64)]
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def resolutions(self) -> list[int]:
        """The U-Net's resolution at each level, in pixels."""
        return [IMAGE_SIZE // self.patch_size // 2**level for level in range(len(self.channels))]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        size = IMAGE_SIZE // self.patch_size
        if size % 2 ** (len(self.channels) - 1):
            raise ValueError(f"channels: {len(self.channels)} levels would halve {size}×{size} pixels unevenly; use fewer")
        for resolution in self.attention:
            if resolution not in self.resolutions:
                raise ValueError(f"attention: no level has resolution {resolution}; there are {self.resolutions}")
        # the middle of the U-Net always attends
        attending = {self.channels[self.resolutions.index(r)] for r in self.attention} | {self.channels[-1]}
        for width in sorted(attending):
            if width % self.heads:
                raise ValueError(f"heads: {self.heads} heads don't divide {width} channels evenly")
        return self


class DiffusionParams(Section):
    timesteps: Annotated[int, Field(ge=2, le=100_000)]
    schedule: Literal["linear", "cosine", "sigmoid"]
    prediction: Literal["eps", "x0", "v"]
    min_snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None


class TrainParams(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    steps: Count
    batch_size: Annotated[int, Field(ge=1, le=60_000)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)]
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    grad_clip: Annotated[float, Field(gt=0, le=1e6)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    label_dropout: Probability
    precision: Literal["auto", "float32", "bfloat16"]
    report_every: Count
    model: ModelParams
    diffusion: DiffusionParams


class SampleParams(Section):
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    spacing: Literal["leading", "trailing", "linspace"]
    eta: Probability
    variance: Literal["small", "large"]
    clip: bool
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    classes: Literal["all", "none"] | Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=1, max_length=10)]
    count: Annotated[int, Field(ge=10, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


class EvaluateParams(Section):
    classifier: str


class RuntimeParams(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    compile: Literal["auto", True, False]
    data_folder: str | None


class Params(Section):
    train: TrainParams
    sample: SampleParams
    evaluate: EvaluateParams
    runtime: RuntimeParams

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.sample.steps > self.train.diffusion.timesteps:
            raise ValueError(
                f"sample.steps: {self.sample.steps} steps, but the model has train.diffusion.timesteps: "
                f"{self.train.diffusion.timesteps}; use at most as many"
            )
        if self.sample.guidance_scale != 1 and self.train.label_dropout == 0:
            raise ValueError(
                "sample.guidance_scale: guidance needs a model that also trained without labels; set train.label_dropout > 0"
            )
        if self.sample.classes == "none" and self.train.label_dropout == 0:
            raise ValueError("sample.classes: 'none' needs a model that also trained without labels; set train.label_dropout > 0")
        if self.sample.classes != "none" and self.train.label_dropout == 1:
            raise ValueError("sample.classes: train.label_dropout: 1.0 makes a model without classes; set sample.classes: none")
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate `path`. Raises UserError with a line for each fault: the key's path, the value, what is allowed."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file here; run from the repository's root") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or 'unreadable characters'})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: empty, or not a list of sections; it wants {', '.join(Params.model_fields)}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(fault) for fault in error.errors())
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None


def _explain(fault: dict[str, Any]) -> str:
    """One fault that pydantic found, as one line."""
    keys = [str(key) for key in fault["loc"] if not (isinstance(key, str) and ("[" in key or key == "str"))]
    where, value, kind = ".".join(keys), fault["input"], fault["type"]
    message = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}.{message}" if where else message
    if kind == "missing":
        return f"{where}: missing"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], _known_keys(keys[:-1]), n=1)
        return f"{where}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")
    if kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        return f"{where}: {value!r} is text to YAML; write it as {float(value):.10f}".rstrip("0").rstrip(".")
    return f"{where}: {value!r} should be {message}"


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Params
    for key in path:
        section = section.model_fields[key].annotation
    return list(section.model_fields)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def project_root() -> Path:
    """The main repository's root, where stores, caches and training states lie.

    In the temporary workspace of `dvc exp run --temp` or `--queue` that is not the working directory, which is deleted
    with all that it holds when the experiment ends; DVC names the main repository in DVC_ROOT.
    """
    root = os.environ.get("DVC_ROOT")
    if root and (Path(root) / ".dvc").is_dir():
        return Path(root).resolve()
    return Path(__file__).resolve().parents[2]


@contextmanager
def clean_errors() -> Iterator[None]:
    """End the program with one line and exit status 1 where the user's mistake, not the code's, is the cause."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
