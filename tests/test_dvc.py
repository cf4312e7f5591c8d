"""What dvc.yaml and dvc.lock say of the pipeline, against the code, params.yaml and the files in the tree."""

import functools
import hashlib
import json
import operator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PIPELINE = (ROOT / "dvc.yaml").read_text().replace("${data.name}", PARAMS["data"]["name"])
STAGES = yaml.safe_load(PIPELINE)["stages"]
READ = {  # the parameters that a stage reads
    "download": ["data.name", "data.folder", "data.size"],
    "train": ["train", "data.mirror"],
    "sample": ["sample"],
    "evaluate": ["evaluate"],
}


def outputs(stage: dict) -> dict[str, bool]:
    """A stage's outputs, and for each whether DVC's cache, rather than git, keeps it."""
    cached = {}
    for kind in ("outs", "metrics", "plots"):
        for item in stage.get(kind, []):
            path, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
            cached[path] = options.get("cache", True)
    return cached


KEPT_BY_DVC = {path for stage in STAGES.values() for path, cached in outputs(stage).items() if cached}


def test_the_stages_are_these_and_run_their_scripts():
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {name: f"python src/{name}.py" for name in READ}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_params_that_it_reads(stage):
    assert STAGES[stage]["params"] == READ[stage]


def test_every_parameter_but_those_of_runtime_is_read_by_one_stage():
    read = [key for keys in READ.values() for key in keys]
    assert len(read) == len(set(read))
    assert {key.split(".")[0] for key in read} == PARAMS.keys() - {"runtime"}
    assert {f"data.{key}" for key in PARAMS["data"]} == {key for key in read if key.startswith("data.")}


def value(key: str) -> object:
    """The value in params.yaml of a section or of one of its keys."""
    return functools.reduce(operator.getitem, key.split("."), PARAMS)


def test_what_a_stage_reads_is_an_output_or_a_file_in_git():
    for stage in STAGES.values():
        for dep in stage["deps"]:
            assert dep in KEPT_BY_DVC or (ROOT / dep).exists(), dep


@pytest.fixture(scope="module")
def lock() -> dict:
    path = ROOT / "dvc.lock"
    assert path.is_file(), "dvc.lock is missing: run `dvc repro`, and commit it"
    return yaml.safe_load(path.read_text())["stages"]


def md5(path: Path) -> str:
    """As DVC computes it; of a folder, from the list of its files and their hashes."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    ignored = [line for line in (ROOT / ".dvcignore").read_text().splitlines() if line[0] != "#"]
    files = [f for f in path.rglob("*") if f.is_file() and not any(fnmatch(part, i) for part in f.parts for i in ignored)]
    listing = [{"md5": md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing.sort(key=lambda item: item["relpath"].split("/"))
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


@pytest.mark.parametrize("stage", STAGES)
def test_lock_is_of_this_tree(lock, stage):
    declared, locked = STAGES[stage], lock[stage]
    assert locked["cmd"] == declared["cmd"]

    deps = {dep["path"]: dep["md5"] for dep in locked["deps"]}
    assert sorted(deps) == sorted(declared["deps"])
    assert {path: md5(ROOT / path) for path in deps if path not in KEPT_BY_DVC} == {
        path: digest for path, digest in deps.items() if path not in KEPT_BY_DVC
    }

    assert locked["params"] == {"params.yaml": {key: value(key) for key in READ[stage]}}

    outs = {out["path"]: out["md5"] for out in locked["outs"]}
    cached = outputs(declared)
    assert sorted(outs) == sorted(cached)
    assert {path: md5(ROOT / path) for path in outs if not cached[path]} == {
        path: digest for path, digest in outs.items() if not cached[path]
    }


def test_lock_has_no_other_stages(lock):
    assert sorted(lock) == sorted(STAGES)


def test_locked_stages_read_what_the_stages_before_them_wrote(lock):
    written = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    read = {(name, dep["path"]): dep["md5"] for name, stage in lock.items() for dep in stage["deps"] if dep["path"] in written}
    assert ("train", "data/FashionMNIST/raw") in read
    assert read == {(name, path): written[path] for name, path in read}
