"""params.yaml as typed, validated, frozen objects: a section a stage, and `runtime` for what doesn't change results."""

import argparse
import difflib
import math
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

FASHION_MNIST = "FashionMNIST"  # the data set that can be downloaded, of 28×28 pixels
GROUPS = 8  # of every GroupNorm: widths are multiples of it

Count = Annotated[int, Field(ge=1, le=10_000_000)]
Probability = Annotated[float, Field(ge=0, le=1)]


class UserError(Exception):
    """A mistake that the user can mend: shown as it is, without a traceback."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C asked the program to stop; no `except Exception` holds it up."""

    def __init__(self, number: int, message: str = "stopped; the same command goes on"):
        super().__init__(message)
        self.exit_status = 128 + number


def allowed(what: str) -> WrapValidator:
    """One message, that the value should be `what`, in place of all that pydantic has to say of it."""

    def validate(value: Any, inner: Any) -> Any:
        with suppress(ValidationError):
            if type(result := inner(value)) is type(value):  # a Literal takes true for 1
                return result
        raise PydanticCustomError("allowed", what)

    return WrapValidator(validate)


Width = Annotated[int, Field(ge=GROUPS, le=4096, multiple_of=GROUPS)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=5), allowed("a list of 1 to 5 multiples of 8, at most 4096")]
ClassList = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=256)]
Classes = Annotated[Literal["all", "none"] | ClassList, allowed("all, none or a list of classes by number, the first being 0")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), allowed("auto, cpu, cuda, mps or, say, cuda:1")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataParams(Section):
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), allowed("the name of a folder: letters, digits, . _ -")
    ]
    folder: Annotated[str, Field(min_length=1)] | None

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.name != FASHION_MNIST and self.folder is None:
            raise ValueError(f"folder: only {FASHION_MNIST} can be downloaded; say which folder {self.name} is in")
        return self


class ModelParams(Section):
    patch_size: Annotated[Literal[1, 2, 4], allowed("1, 2 or 4")]
    channels: Widths
    blocks: Annotated[int, Field(ge=1, le=8)]
    attention: list[int]
    heads: Annotated[int, Field(ge=1, le=64)]
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def check(self, image_size: int) -> None:
        """Raise ValueError, with the key that is at fault, where no such U-Net fits square images of `image_size` pixels."""
        size, levels = image_size // self.patch_size, len(self.channels)
        if image_size % self.patch_size:
            raise ValueError(
                f"train.model.patch_size: {image_size}×{image_size} pixels don't divide by {self.patch_size}; use a divisor"
            )
        if size % 2 ** (levels - 1):
            raise ValueError(f"train.model.channels: {levels} levels would halve {size}×{size} pixels unevenly; use fewer")
        resolutions = [size // 2**level for level in range(levels)]
        for resolution in self.attention:
            if resolution not in resolutions:
                raise ValueError(f"train.model.attention: no level has resolution {resolution}; there are {resolutions}")
        # the middle of the U-Net always attends
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
        """Raise ValueError, with the key that is at fault, where a batch has no image for each part of each process."""
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
    classes: Classes
    count: Annotated[int, Field(ge=10, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


class EvaluateParams(Section):
    classifier: Annotated[str, Field(min_length=1)]


class RuntimeParams(Section):
    device: Device
    compile: Annotated[Literal["auto", True, False], allowed("auto, true or false")]
    deterministic: bool
    processes: Annotated[int, Field(ge=1, le=64)]
    accumulate: Annotated[int, Field(ge=1, le=10_000)]
    require_mlflow: bool


class Params(Section):
    data: DataParams
    train: TrainParams
    sample: SampleParams
    evaluate: EvaluateParams
    runtime: RuntimeParams

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.data.name == FASHION_MNIST:  # of another data set training will know the size
            self.train.model.check(28)
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


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that a section has twice, of which PyYAML would take the last, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {key.value} a second time", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate `path`. Raises UserError with a line for each fault: the key's path, the value, what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file here; run from the repository's root") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    return parse_params(text, path)


def parse_params(text: str, path: Path) -> Params:
    """The parameters that the YAML in `text` spells; `path` is what errors call it. Raises UserError as `load_params`."""
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # 2020-99-99: a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters or values"
        raise UserError(f"{path}{where}: not YAML ({problem})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: has no sections; it needs {', '.join(Params.model_fields)}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = dict.fromkeys(explain(fault) for fault in error.errors())
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None


KINDS = {  # pydantic's names of faults, and what the value should be
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section of keys",
}


def explain(fault: dict[str, Any], schema: type[BaseModel] = Params) -> str:
    """One fault that pydantic found in what should have been of `schema`, as one line."""
    keys = [str(key) if str(key).isprintable() else repr(key) for key in fault["loc"]]
    where, value, kind = ".".join(keys), fault["input"], fault["type"]
    if kind == "value_error":  # its message starts with a key
        message = fault["msg"].removeprefix("Value error, ")
        return f"{where}.{message}" if where else message
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("extra_forbidden", "invalid_key"):
        close = difflib.get_close_matches(keys[-1], _known_keys(schema, keys[:-1]), n=1)
        return f"{where}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")
    if kind in ("float_type", "int_type") and isinstance(value, str) and (number := _plain_number(value)):
        return f"{where}: {value!r} is text to YAML; write it as {number}"
    message = KINDS.get(kind) or fault["msg"].removeprefix("Input should be ")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"{where}: {_shown(value)} should be {message}"


def _shown(value: Any) -> str:
    """`value` on one short line."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "this number"
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _known_keys(section: Any, path: list[str]) -> list[str]:
    for key in path:
        section = section.model_fields[key].annotation
    return list(section.model_fields)


def _plain_number(text: str) -> str | None:
    """The number that `text` spells, as YAML reads it: 2e-4 as 0.0002. None where it spells none, or none so short."""
    try:
        plain = f"{float(text):.10f}".rstrip("0").rstrip(".")
        return plain if math.isfinite(float(text)) and float(plain) == float(text) and len(plain) <= 20 else None
    except ValueError:
        return None


def project_root() -> Path:
    """The main repository's root, where stores, caches and training states lie.

    In the temporary workspace of `dvc exp run --temp` or `--queue` that is not the working directory, which is deleted
    with all that it holds when the experiment ends; DVC names the main repository in DVC_ROOT.
    """
    root = os.environ.get("DVC_ROOT")
    if root and (Path(root) / ".dvc").is_dir():
        return Path(root).resolve()
    return Path(__file__).resolve().parents[2]


def between(low: int, high: int) -> Callable[[str], int]:
    """For argparse: what reads a whole number in this range, or refuses with a line that says so."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} should be a whole number from {low} to {high}")
        return int(text)

    return read


@contextmanager
def clean_errors() -> Iterator[None]:
    """End the program with one line where the user's mistake (exit status 1) or a signal (143, 130) is the cause.

    A signal waits until imports are done, which would else keep a lock that other threads then wait for, or tell an importer
    that can do without that there is no such library. Where it strikes in a callback of the garbage collector, which lets no
    exception out, it strikes again.
    """

    def again(number: int) -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    def stop(number: int, frame: FrameType | None) -> None:
        if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
            again(number)
        else:
            raise Stopped(number)

    def lost(ignored: "sys.UnraisableHookArgs") -> None:
        if isinstance(ignored.exc_value, Stopped):
            again(ignored.exc_value.exit_status - 128)
        else:
            before(ignored)

    before, sys.unraisablehook = sys.unraisablehook, lost
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_status)
