"""The bench's runs of whole pipelines, through DVC's real queue and workers, on a pipeline of one quick stage."""

import subprocess
from pathlib import Path

import pytest

import experiments

pytestmark = pytest.mark.slow

STAGE = """
import json, yaml
p = yaml.safe_load(open("params.yaml"))
assert p["b"] != 13
json.dump({"sum": p["a"] + p["b"]}, open("metrics.json", "w"))
"""
PIPELINE = """
stages:
  add:
    cmd: python add.py
    deps: [add.py]
    params: [a, b]
    metrics: [{metrics.json: {cache: false}}]
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in (("add.py", STAGE), ("dvc.yaml", PIPELINE), ("params.yaml", "a: 1\nb: 2\n")):
        (tmp_path / name).write_text(content)
    for command in ("git init -q", "dvc init -q", "git add -A", "git -c user.name=t -c user.email=t@localhost commit -qm 1"):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "POLL_SECONDS", 1)
    return tmp_path


def test_experiments_give_their_metrics_and_names_may_be_reused(pipeline):
    run = experiments.run_experiments
    assert run({"x": ["a=10"], "y": ["a=20", "b=5"]}, jobs=2) == {"x": {"sum": 12}, "y": {"sum": 25}}
    with pytest.raises(SystemExit, match=r"^failed: z;"):
        run({"z": ["b=13"], "y": ["b=1"]}, jobs=1)
    assert run({"x": ["b=7"], "z": ["b=12"]}, jobs=1) == {"x": {"sum": 8}, "z": {"sum": 13}}


def test_missing_workers_are_noticed(pipeline):
    with pytest.raises(SystemExit, match="workers are gone, and these are not done: x"):
        experiments.run_experiments({"x": ["a=10"]}, jobs=0)
