"""Names, tags and descriptions of runs, in real repositories; the commands in them really lead back to the parameters."""

import ast
import os
import random
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from ddpm.tracking.provenance import describe, flatten, setting

ROOT = Path(__file__).resolve().parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "presets").mkdir()
    for path in (ROOT / "presets").glob("*.yaml"):
        (tmp_path / "presets" / path.name).write_bytes(path.read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(changes: dict) -> dict:
    def merge(base: dict, new: dict) -> dict:
        return {**base, **{k: merge(base[k], v) if isinstance(v, dict) else v for k, v in new.items()}}

    return merge(PARAMS, changes)


def test_an_unchanged_run_is_named_by_its_commit(repository):
    commit = git(repository, "rev-parse", "HEAD")
    name, tags = describe("train", PARAMS)
    assert name == f"train @{commit[:7]}"
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["git_dirty"] == "false"
    assert not {"preset", "changed", "dvc_exp_name"} & tags.keys()
    assert f"git checkout {commit[:7]} && dvc repro " in tags["mlflow.note.content"]


def test_a_project_in_a_larger_repository_is_described_as_one_of_its_own(repository, monkeypatch):
    """Its parameters are those of its own folder, and the rest of the repository isn't its business."""
    for path in list(repository.iterdir()):
        if path.name != ".git":
            (repository / "projects/garments").mkdir(parents=True, exist_ok=True)
            path.rename(repository / "projects/garments" / path.name)
    (repository / "other.py").write_text("1\n")
    (repository / "params.yaml").write_text("train: {}\n")
    git(repository, "add", "--all")
    git(repository, "commit", "-qm", "moved")
    monkeypatch.chdir(repository / "projects/garments")
    (repository / "other.py").write_text("2\n")
    name, tags = describe("train", changed({"train": {"seed": 5}}))
    assert (name, tags["changed"], tags["git_dirty"]) == ("train seed=5", "train.seed=5", "false")
    assert "dvc exp run -S train.seed=5" in tags["mlflow.note.content"]
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 0", "seed: 6"))
    Path("code.py").write_text("2\n")
    _, tags = describe("train", PARAMS)
    assert "Uncommitted edits: `code.py`" in tags["mlflow.note.content"]
    assert tags["git_dirty"] == "true"


def test_text_is_read_as_utf_8_whatever_the_locale(repository):
    (repository / "größe.py").write_text("1\n")
    (repository / "params.yaml").write_text("# Größe\n" + (repository / "params.yaml").read_text("utf-8"), "utf-8")
    (repository / "presets/large.yaml").write_text("# Größe\ntrain: {seed: 5}\n", "utf-8")
    git(repository, "add", "--all")
    git(repository, "commit", "-qm", "größer")
    (repository / "größe.py").write_text("2\n")
    program = f"""
import sys, yaml
from ddpm.runtime.cli import clean_errors
from ddpm.tracking.provenance import describe
with clean_errors():
    params = yaml.safe_load(open({str(ROOT / "params.yaml")!r}, encoding="utf-8"))
    name, tags = describe("train", {{**params, "train": {{**params["train"], "seed": 5}}}})
    print(ascii((name, tags["changed"], tags["mlflow.note.content"])))
    print(chr(0x2605), "garments")  # what the terminal lacks becomes a question mark
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    said, shown = done.stdout.decode("ascii").splitlines()
    name, what, note = ast.literal_eval(said)
    assert (name, what) == ("train large", "train.seed=5")
    assert "Uncommitted edits: `größe.py`" in note
    assert shown == "? garments"


def test_a_run_is_named_by_the_changed_parameters_of_its_stages(repository):
    params = changed({"sample": {"steps": 3}, "train": {"model": {"channels": [24, 48]}}, "runtime": {"device": "cpu"}})
    assert describe("train", params)[0] == "train channels=[24,48]"
    name, tags = describe("evaluate", params)
    assert name == "evaluate channels=[24,48], sample.steps=3"
    assert tags["changed"] == "train.model.channels=[24,48], sample.steps=3"
    many = changed({"sample": {"steps": 3, "seed": 4, "eta": 0.5, "clip": False, "count": 20}})
    assert describe("sample", many)[0] == "sample sample.steps=3, eta=0.5, +3"


@pytest.mark.parametrize("content", ["", "- 1", "train: [", "\0"])
def test_a_preset_that_cannot_be_read_stops_nobody(repository, content):
    (repository / "presets/mine.yaml").write_text(content)
    assert describe("train", PARAMS)[0].startswith("train @")


def test_an_experiment_and_a_preset_give_their_names(repository, monkeypatch):
    preset = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())
    name, tags = describe("evaluate", changed(preset))
    assert name == "evaluate smoke"
    assert tags["preset"] == "smoke"
    assert describe("train", changed({**preset, "train": {**preset["train"], "seed": 5}}))[0] == "train smoke, seed=5"
    monkeypatch.setenv("DVC_EXP_NAME", "few-steps")
    name, tags = describe("sample", changed({"sample": {"steps": 5}}))
    assert name == "sample few-steps"
    assert tags["dvc_exp_name"] == "few-steps"
    assert "dvc exp apply few-steps " in tags["mlflow.note.content"]


def test_changes_count_from_the_commit_that_the_experiment_started_from(repository, monkeypatch):
    first = git(repository, "rev-parse", "HEAD")
    (repository / "params.yaml").write_text(yaml.safe_dump(changed({"train": {"steps": 7}})))
    git(repository, "commit", "-qam", "second")
    assert describe("train", changed({"train": {"steps": 7}}))[0].startswith("train @")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", first)
    assert describe("train", changed({"train": {"steps": 7}}))[0] == "train steps=7"


def test_edited_files_are_named_but_not_what_runs_change(repository):
    (repository / "code.py").write_text("2\n")
    (repository / "params.yaml").write_text("{}")
    tags = describe("train", PARAMS)[1]
    assert tags["git_dirty"] == "true"
    assert re.findall(r"Uncommitted edits: (.*)", tags["mlflow.note.content"]) == ["`code.py`"]


def test_outside_a_repository_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, tags = describe("train", PARAMS)
    assert name == "train @unknown"
    assert tags["mlflow.source.git.commit"] == tags["git_dirty"] == "unknown"
    assert "git checkout" not in tags.get("mlflow.note.content", "")


def test_samples_of_another_model_have_no_reproducing_command(repository):
    params = {name: section for name, section in PARAMS.items() if name != "train"}
    for stage in ("sample", "evaluate"):
        name, tags = describe(stage, params)
        assert name.startswith(f"{stage} @")
        assert "dvc" not in tags.get("mlflow.note.content", "")


def test_the_command_in_the_description_makes_the_parameters_again(repository):
    """DVC's own reading of the command, for random changes of every kind of value."""
    draw = random.Random(0)
    values = {
        int: lambda: draw.randrange(1, 99),
        float: lambda: draw.choice([0.0003, 0.25, 3.0]),
        bool: lambda: draw.random() < 0.5,
    }
    others = {
        "sample.classes": [[0, 7], "none"],
        "train.model.channels": [[8], [16, 24]],
        "train.diffusion.min_snr_gamma": [None, 2.5],
    }
    for _ in range(25):
        params = yaml.safe_load(yaml.safe_dump(PARAMS))
        flat = {name: value for name, value in flatten(PARAMS).items() if not name.startswith(("runtime.", "evaluate."))}
        for name in draw.sample(sorted(flat), 6):
            if (new := values.get(type(flat[name]))) is None and name not in others:
                continue
            *sections, key = name.split(".")
            where = params
            for section in sections:
                where = where[section]
            where[key] = draw.choice(others[name]) if name in others else new()
        note = describe("evaluate", params)[1]["mlflow.note.content"]
        command = next(line for line in note.splitlines() if line.startswith("git checkout"))
        words = shlex.split(command.partition("  #")[0])
        file = repository / "again.yaml"
        file.write_bytes((ROOT / "params.yaml").read_bytes())
        if overrides := [word for before, word in pairwise(words) if before == "-S"]:
            apply_overrides(file, overrides)
        assert yaml.safe_load(file.read_text()) == params


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), ([0, 7], "[0,7]"), ("ddim", "ddim"), (0.5, "0.5"), (3, "3")]
)
def test_values_are_written_as_dvc_reads_them(value, text):
    assert setting("a.b", value) == f"a.b={text}"
