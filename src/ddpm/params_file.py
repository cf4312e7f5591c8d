"""Reading params.yaml and presets, and explaining their mistakes."""

import difflib
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ddpm.errors import UserError
from ddpm.params import Params


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


def merge(params: Any, preset: Any, path: str = "") -> Iterator[str]:
    """Put the values of the nested mapping `preset` into `params`; yields a line for each that differed."""
    for key, value in preset.items():
        if isinstance(value, dict) and isinstance(params.setdefault(key, {}), dict):
            yield from merge(params[key], value, f"{path}{key}.")
        elif key not in params or params[key] != value:
            yield f"{path}{key}: {_shown_value(params.get(key))} → {_shown_value(value)}"
            params[key] = value


def _shown_value(value: Any) -> str:
    return "null" if value is None else str(value)
