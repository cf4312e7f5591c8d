"""How long the commands take that one waits for: each from its start to its end, imports included."""

import statistics
import tempfile
from pathlib import Path

from clones import edit_params, plain_clone, timed
from contenders import ROOT
from ddpm.params_file import load_params
from ddpm.paths import MODEL
from measure import table

PIPELINE, NOTHING = "the whole pipeline of the preset `smoke`", "`dvc repro` with nothing to do"
GRID, DEMO = "`python src/sample.py`, a grid of 100 images", "`python src/demo.py`, the larger model"
REPEATS = 5


def run(full: bool) -> dict:
    """Medians, but for the pipeline, which runs once; in a clone, with the model of the default run."""
    repeats, seconds = REPEATS if full else 1, {}
    with tempfile.TemporaryDirectory() as folder:
        clone = plain_clone(Path(folder))
        edit_params(clone, {"data": {"folder": str(ROOT / "data/FashionMNIST/raw")}})
        seconds[PIPELINE] = [timed(clone, "dvc", "repro")]
        seconds[NOTHING] = [timed(clone, "dvc", "repro") for _ in range(repeats)]
        edit_params(clone, {"sample": load_params(ROOT / "params.yaml").sample.model_dump() | {"count": 100}})
        seconds[GRID] = [timed(clone, "python", "src/sample.py", str(ROOT / MODEL)) for _ in range(repeats)]
        seconds[DEMO] = [timed(clone, "python", "src/demo.py") for _ in range(repeats)]
    return {"seconds": {what: statistics.median(values) for what, values in seconds.items()}, "repeats": repeats}


def report(result: dict) -> str:
    rows = [[what, f"{value:.1f}"] for what, value in result["seconds"].items()]
    return table(["", "seconds"], rows) + f"\n\nMedians of {result['repeats']}, but for the first, which is a single run."
