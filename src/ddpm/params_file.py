"""Reading params.yaml, explaining the mistakes in it, and applying presets to it."""

import difflib
import io
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.params import Params
from ddpm.paths import PARAMS, PRESETS


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate `path`. Raises UserError with one line per mistake: the key, its value, and what is allowed."""
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
    """The validated parameters in the YAML `text`. Raises UserError as `load_params` does, with messages that name `path`."""
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


class _Loader(yaml.SafeLoader):
    """Loads YAML's plain types. A section with the same key twice is an error; PyYAML itself would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


SHOULD_BE = {  # pydantic's type of error → what the value should be
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section of keys",
}


def explain(fault: Mapping[str, Any], schema: type[BaseModel] = Params) -> str:
    """One line for one of pydantic's errors, as `ValidationError.errors()` lists them, about input for `schema`."""
    keys = [str(key) if str(key).isprintable() else repr(key) for key in fault["loc"]]
    where, value, kind = ".".join(keys), fault["input"], fault["type"]
    if kind == "value_error":  # from a validator of ours, whose message starts with a key
        message = fault["msg"].removeprefix("Value error, ")
        return f"{where}.{message}" if where else message
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("extra_forbidden", "invalid_key"):
        close = difflib.get_close_matches(keys[-1], _known_keys(schema, keys[:-1]), n=1)
        return f"{where}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")
    if kind in ("float_type", "int_type") and isinstance(value, str) and (number := _plain_number(value)):
        return f"{where}: YAML reads {value!r} as text; write it as {number}"
    message = SHOULD_BE.get(kind) or fault["msg"].removeprefix("Input should be ")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"{where}: {_short(value)} should be {message}"


def _known_keys(schema: Any, path: list[str]) -> list[str]:
    for key in path:
        schema = schema.model_fields[key].annotation
    return list(schema.model_fields)


def _plain_number(text: str) -> str | None:
    """The number in `text` as YAML reads it: 0.0002 for 2e-4. None if it is no number, or one that takes over 20 characters."""
    try:
        plain = f"{float(text):.10f}".rstrip("0").rstrip(".")
        return plain if math.isfinite(float(text)) and float(plain) == float(text) and len(plain) <= 20 else None
    except ValueError:
        return None


def _short(value: Any) -> str:
    """`value` in one short line."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of so many digits
        return "this number"
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def apply_preset(name: str) -> list[str]:
    """Write the values of presets/`name`.yaml into params.yaml, whose comments and layout stay.

    Returns one line per value that changed. Raises UserError, and writes nothing, if params.yaml is invalid or would be so with
    the preset.
    """
    from ruamel.yaml import (
        YAML,  # imported here: only presets need it, and the machine that release/publish.py runs on may not have it
    )
    from ruamel.yaml.error import MarkedYAMLError

    load_params(PARAMS)  # or the preset could hide a mistake of the user's
    path = PRESETS / f"{name}.yaml"
    editor = YAML()  # keeps comments, order and notation
    editor.width = 200
    editor.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    params = editor.load(PARAMS)
    try:
        preset = editor.load(path)
    except MarkedYAMLError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: not YAML ({error.problem})") from None
    if not isinstance(preset, dict):
        raise UserError(f"{path}: has no sections; it needs some of those of {PARAMS}")
    changes = list(merge(params, preset))
    text = io.StringIO()
    editor.dump(params, text)
    parse_params(text.getvalue(), path)
    write_atomic(PARAMS, text.getvalue().encode())
    return changes


def merge(params: Any, preset: Any, path: str = "") -> Iterator[str]:
    """Copy the values of the nested mapping `preset` into `params`, in place. Yields one line per value that differed."""
    for key, value in preset.items():
        if isinstance(value, dict) and isinstance(params.setdefault(key, {}), dict):
            yield from merge(params[key], value, f"{path}{key}.")
        elif key not in params or params[key] != value:
            yield f"{path}{key}: {_as_in_yaml(params.get(key))} → {_as_in_yaml(value)}"
            params[key] = value


def _as_in_yaml(value: Any) -> str:
    return "null" if value is None else str(value)
