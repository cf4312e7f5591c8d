"""`python src/preset.py smoke`: write the values of presets/smoke.yaml into params.yaml, and print which ones changed.

Comments and layout stay. `git checkout params.yaml` undoes it.
"""

import argparse

from ddpm.errors import UserError
from ddpm.params_file import apply_preset
from ddpm.paths import PARAMS, PRESETS
from ddpm.runtime.cli import clean_errors

NEXT_STEPS = f"Next: `dvc repro` runs the pipeline with these values, `git checkout {PARAMS}` undoes them."


def main() -> None:
    if not PRESETS.is_dir():
        raise UserError(f"{PRESETS}: there is no such folder here; run from the repository's root")
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("preset", choices=names, help="the name of a file in presets/")
    name = parser.parse_args().preset
    if changes := apply_preset(name):
        print(*changes, NEXT_STEPS, sep="\n")
    else:
        print(f"{PARAMS} has the values of {name} already")


if __name__ == "__main__":
    with clean_errors():
        main()
