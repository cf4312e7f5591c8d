"""`python src/preset.py smoke`: write the values of presets/smoke.yaml into params.yaml, and say which ones changed.

Comments and layout stay. `git checkout params.yaml` takes it back.
"""

import argparse
import io

from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.params_file import load_params, merge, parse_params
from ddpm.paths import PARAMS, PRESETS
from ddpm.runtime.cli import clean_errors


def main() -> None:
    if not PRESETS.is_dir():
        raise UserError(f"{PRESETS}: there is no such folder here; run from the repository's root")
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("preset", choices=names, help="a file of presets/")
    name = parser.parse_args().preset
    from ruamel.yaml import YAML  # `merge` does without
    from ruamel.yaml.error import MarkedYAMLError

    load_params(PARAMS)  # a fault of the user's own is named before a preset hides it
    path = PRESETS / f"{name}.yaml"
    yaml = YAML()  # the round-trip kind: comments, order and the way of writing stay
    yaml.width = 200
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    params = yaml.load(PARAMS)
    try:
        preset = yaml.load(path)
    except MarkedYAMLError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: not YAML ({error.problem})") from None
    if not isinstance(preset, dict):
        raise UserError(f"{path}: has no sections; it needs some of those of {PARAMS}")
    changes = list(merge(params, preset))
    text = io.StringIO()
    yaml.dump(params, text)
    parse_params(text.getvalue(), path)
    write_atomic(PARAMS, text.getvalue().encode())
    print("\n".join(changes) or f"{PARAMS} has the values of {name} already")


if __name__ == "__main__":
    with clean_errors():
        main()
