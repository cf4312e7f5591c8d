"""What dvc.yaml and dvc.lock say of the pipeline, against the code, params.yaml and the files in the tree."""

import ast
import hashlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
TRACKING = SRC / "ddpm" / "tracking"
LOGGING = set(TRACKING.iterdir())  # changes no result: no stage depends on it
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PIPELINE = (ROOT / "dvc.yaml").read_text().replace("${evaluate.classifier}", PARAMS["evaluate"]["classifier"])
PIPELINE = PIPELINE.replace("${data.name}", PARAMS["data"]["name"])
STAGES = yaml.safe_load(PIPELINE)["stages"]
OWN_SECTION = {"download": "data", "train": "train", "sample": "sample", "evaluate": "evaluate"}


def imported_names(path: Path) -> set[str]:
    """The dotted names of all modules, and of what might be modules, that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(SRC).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = [*base, *([node.module] if node.module else [])]
            names |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return names


def imported_files(path: Path) -> set[Path]:
    """The files under src that importing `path`'s imports runs: modules, and the packages that they lie in."""
    files = set()
    for name in imported_names(path):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = SRC.joinpath(*parts[:end])
            files |= {file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file()}
    return files


def closure(script: Path) -> set[Path]:
    found, waiting = set(), {script}
    while waiting:
        path = waiting.pop()
        found.add(path)
        if path not in LOGGING:
            waiting |= imported_files(path) - found
    return found


def outputs(stage: dict) -> dict[str, bool]:
    """A stage's outputs, and for each whether DVC's cache, rather than git, keeps it."""
    cached = {}
    for kind in ("outs", "metrics", "plots"):
        for item in stage.get(kind, []):
            path, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
            cached[path] = options.get("cache", True)
    return cached


KEPT_BY_DVC = {path for stage in STAGES.values() for path, cached in outputs(stage).items() if cached}


def test_the_closure_follows_every_kind_of_import():
    assert {path.name for path in closure(SRC / "train.py")} >= {
        "train.py",
        "__init__.py",
        "training.py",
        "unet.py",
    }
    assert closure(SRC / "ddpm/schedule.py") == {SRC / "ddpm/schedule.py"}


def test_the_stages_are_these_and_run_their_scripts():
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {name: f"python src/{name}.py" for name in OWN_SECTION}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_that_it_runs(stage):
    declared = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    needed = {path.relative_to(ROOT).as_posix() for path in closure(SRC / f"{stage}.py") - LOGGING}
    assert sorted(declared - needed) == [], "declared, but not imported"
    assert sorted(needed - declared) == [], "imported, but not declared"
    assert len(declared) == len([dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")]), "declared twice"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_own_section_of_the_params(stage):
    section = OWN_SECTION[stage]
    assert STAGES[stage].get("params", []) == ([section] if section else [])
    assert section is None or section in PARAMS


def test_what_a_stage_reads_is_an_output_or_a_file_in_git():
    for stage in STAGES.values():
        for dep in stage["deps"]:
            assert dep in KEPT_BY_DVC or (ROOT / dep).is_file(), dep


def test_only_tracking_knows_mlflow():
    knowing = {path for path in SRC.rglob("*.py") if any(n.split(".")[0] == "mlflow" for n in imported_names(path))}
    assert {path.parent for path in knowing} == {TRACKING}


@pytest.mark.parametrize("name", ["schedule", "diffusion", "unet", "samplers"])
def test_the_mathematics_stands_alone(name):
    own = {path.relative_to(SRC).as_posix() for path in imported_files(SRC / f"ddpm/{name}.py")}
    assert own <= {"ddpm/__init__.py", "ddpm/schedule.py", "ddpm/diffusion.py"}


@pytest.fixture(scope="module")
def lock() -> dict:
    path = ROOT / "dvc.lock"
    assert path.is_file(), "dvc.lock is missing: run `dvc repro`, and commit it"
    return yaml.safe_load(path.read_text())["stages"]


def md5(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


@pytest.mark.parametrize("stage", STAGES)
def test_lock_is_of_this_tree(lock, stage):
    declared, locked = STAGES[stage], lock[stage]
    assert locked["cmd"] == declared["cmd"]

    deps = {dep["path"]: dep["md5"] for dep in locked["deps"]}
    assert sorted(deps) == sorted(declared["deps"])
    assert {path: md5(ROOT / path) for path in deps if path not in KEPT_BY_DVC} == {
        path: digest for path, digest in deps.items() if path not in KEPT_BY_DVC
    }

    section = OWN_SECTION[stage]
    assert locked.get("params", {}) == ({"params.yaml": {section: PARAMS[section]}} if section else {})

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
