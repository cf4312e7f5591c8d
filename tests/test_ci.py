"""The files for a container and for GitHub's CI, against what they repeat from elsewhere in the tree."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}


def commands(workflow: str) -> list[str]:
    (job,) = WORKFLOWS[workflow]["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_what_ci_runs():
    script = (ROOT / ".ci/run").read_text()
    (packages,) = re.findall(r'^packages="(.+)"$', script, re.M)
    (installed,) = [command for command in commands("ci") if "apt-get" in command]
    assert installed.partition("--yes ")[2] == packages
    assert [c for c in commands("ci") if c.startswith("make")] == re.findall(r"^make .+$", script, re.M)


def test_make_targets_of_the_workflows_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [c.split()[1] for workflow in WORKFLOWS for c in commands(workflow) if c.startswith("make")]
    assert len(named) == 3
    assert set(named) <= targets


def test_an_image_holds_nothing_that_git_ignores():
    kept_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    listing = ["git", "ls-files", "*.gitignore"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        path = ROOT / name
        for line in path.read_text().splitlines():
            ignored = (path.parent.relative_to(ROOT) / line.strip("/")).as_posix()
            assert ignored in kept_out, f"{ignored}, of {name}"
