"""How the code is laid out: which part may import which, and that a stage's dependencies in dvc.yaml cover the code it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
LIBRARY = SRC / "ddpm"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
WINGS = {path.name for path in LIBRARY.iterdir() if (path / "__init__.py").exists()}
# What a stage's result doesn't depend on beyond rounding, as the comment at the top of dvc.yaml says: a change reruns nothing.
DECIDES_NOTHING = {"runtime", "tracking", "serving", "stage", "errors", "paths", "params", "params_file", "__init__"}
ONLY_FOR_PREVIEWS = {"train": {"figures"}}

# part → the parts of src/ddpm that it may import, besides itself
STAGE_WINGS = {"sources", "training", "sampling", "evaluation"}
BASE = {"errors", "paths", "params", "params_file", "files", "tensor_files"}
ALLOWED = {
    "errors": set(),
    "paths": set(),
    "params": set(),
    "params_file": {"errors", "paths", "params", "files"},
    "files": {"errors", "paths"},
    "tensor_files": {"errors", "files"},
    "figures": {"errors", "paths", "files"},
    "runtime": {"errors", "files", "paths"},
    "diffusion": set(),
    "data": BASE,
    "checkpoint": BASE | {"data", "diffusion"},
    "sources": BASE | {"data", "runtime"},
    "training": BASE | {"data", "diffusion", "runtime"},
    "sampling": BASE | {"data", "diffusion", "runtime", "checkpoint", "figures"},
    "evaluation": BASE | {"data", "runtime", "figures"},
    "serving": BASE | {"data", "diffusion", "runtime", "checkpoint", "figures", "sampling"},
    "tracking": BASE | {"data", "runtime", "figures", "sampling", "serving"},
    "web": BASE | {"data", "diffusion", "runtime", "figures", "sampling", "evaluation", "serving", "tracking"},
    "stage": BASE | {"runtime", "tracking"},
    "experiments": BASE | {"tracking"},
}


def part_of(path: Path) -> str:
    """The wing or file of src/ddpm that a file belongs to: "training" for src/ddpm/training/loop.py, "files" for files.py."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """The dotted names of all modules, and of what might be modules, that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports aren't used here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_files(path: Path) -> set[Path]:
    """The files under src/ that importing `path`'s imports runs: modules, and the packages that they lie in."""
    files = set()
    for name in imported_names(path):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = SRC.joinpath(*parts[:end])
            files |= {file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file()}
    return files


def code_that_decides(stage: str) -> set[Path]:
    """The script of a stage and every module of ours that it imports, directly or not, but for what decides nothing."""
    found, waiting = set(), {SRC / f"{stage}.py"}
    while waiting:
        path = waiting.pop()
        found.add(path)
        for file in imported_files(path) - found:
            if not file.is_relative_to(LIBRARY) or part_of(file) not in DECIDES_NOTHING | ONLY_FOR_PREVIEWS.get(stage, set()):
                waiting.add(file)
    return found


MODULES = sorted(LIBRARY.rglob("*.py"))
SCRIPTS = sorted(SRC.glob("*.py"))


def test_every_part_has_its_line_in_the_table():
    assert {part_of(path) for path in MODULES} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_it_may(part):
    for path in (path for path in MODULES if part_of(path) == part):
        imported = {part_of(file) for file in imported_files(path) if file.is_relative_to(LIBRARY)} - {part, "__init__"}
        assert sorted(imported - ALLOWED[part]) == [], path.relative_to(ROOT)


def test_the_table_forbids_what_the_design_forbids():
    """Diffusion knows nothing of ours; stages' wings know neither one another nor tracking; tracking knows no training."""
    assert ALLOWED["diffusion"] == set()
    for wing in STAGE_WINGS:
        assert not ALLOWED[wing] & (STAGE_WINGS | {"serving", "tracking"})
    for wing in ("data", "sources"):
        assert not ALLOWED[wing] & {"training", "sampling", "evaluation", "tracking"}
    assert ALLOWED["runtime"] <= {"errors", "files", "paths"}
    assert not ALLOWED["tracking"] & {"training", "evaluation", "diffusion"}
    assert "training" not in ALLOWED["serving"]


def test_the_mathematics_needs_torch_alone():
    for path in (path for path in MODULES if part_of(path) == "diffusion"):
        outside = {name.split(".")[0] for name in imported_names(path)}
        assert outside <= {"ddpm", "torch", "math", "hashlib", "collections", "typing", "dataclasses", "itertools"}, path


@pytest.mark.parametrize("script", ["preset", "compare", "report", "ship", "ui"])
def test_a_script_that_draws_nothing_starts_without_pytorch(script):
    program = f"import sys; sys.path.insert(0, 'src'); import {script}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_no_module_imports_itself_by_way_of_others(path):
    found, waiting = set(), imported_files(path)
    while waiting:
        file = waiting.pop()
        assert file != path, "an import cycle"
        found.add(file)
        waiting |= imported_files(file) - found


@pytest.mark.parametrize("folder", ["src", "src/ddpm", "bench", "release", "tests"])
def test_nothing_imports_a_script(folder):
    scripts = {script.stem for script in SCRIPTS} | {"publish"}
    files = (ROOT / folder).rglob("*.py") if folder == "src/ddpm" else (ROOT / folder).glob("*.py")
    for path in files:
        if folder == "tests" and path.name == "test_publish.py":  # tests the publisher's own functions
            continue
        assert not imported_names(path) & scripts, path.relative_to(ROOT)


def test_no_test_imports_another():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")} | {"conftest"}
    for path in (ROOT / "tests").glob("*.py"):
        assert not imported_names(path) & tests, path.name


def test_the_closure_follows_imports_to_their_end():
    assert {path.name for path in code_that_decides("train")} >= {"train.py", "loop.py", "muon.py", "unet.py", "fashion_mnist.py"}
    assert not {path.name for path in code_that_decides("train")} & {"run.py", "cli.py", "figures.py", "judge.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_dependencies_of_a_stage_cover_the_code_that_decides_its_result(stage):
    declared = [ROOT / dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")]
    needed = code_that_decides(stage)
    lacking = [path for path in needed if not any(path == dep or path.is_relative_to(dep) for dep in declared)]
    assert lacking == [], "imported, but not declared"
    unused = [dep for dep in declared if not any(path == dep or path.is_relative_to(dep) for path in needed)]
    assert unused == [], "declared, but not imported"
    assert len(declared) == len(set(declared)), "declared twice"


def test_what_decides_nothing_is_no_dependency():
    declared = {Path(dep).relative_to("src/ddpm").parts[0].removesuffix(".py")
                for stage in STAGES.values() for dep in stage["deps"] if dep.startswith("src/ddpm/")}  # fmt: skip
    assert not declared & DECIDES_NOTHING


def test_compiled_python_changes_no_dependency():
    assert "__pycache__" in (ROOT / ".dvcignore").read_text().splitlines()


def test_only_tracking_knows_mlflow():
    knowing = {path for path in SRC.rglob("*.py") if any(name.split(".")[0] == "mlflow" for name in imported_names(path))}
    assert {path.parent for path in knowing} == {LIBRARY / "tracking"}


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: path.relative_to(SRC).as_posix())
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_wing_says_what_it_is_for(wing):
    assert len((ast.get_docstring(ast.parse((LIBRARY / wing / "__init__.py").read_text())) or "").splitlines()) >= 3


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: path.relative_to(SRC).as_posix())
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_a_served_model_brings_the_packages_that_it_imports():
    """MLflow installs registry.SERVING_NEEDS before it loads served_model.py and what that imports of ours."""
    from ddpm.tracking.registry import SERVING_NEEDS

    found, waiting, outside = set(), {LIBRARY / "tracking/served_model.py"}, set()
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= imported_files(path) - found
        outside |= {name.split(".")[0] for name in imported_names(path)}
    packages = {"PIL": "pillow", "yaml": "pyyaml"}
    needed = {packages.get(name, name) for name in outside - {"ddpm"} - sys.stdlib_module_names - {"pydantic_core"}}
    assert needed == set(SERVING_NEEDS)
