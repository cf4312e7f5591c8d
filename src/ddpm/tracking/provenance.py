"""Where a run comes from: the commit, the DVC experiment and the changed parameters, as its name, tags and description."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from ddpm.files import file_md5
from ddpm.params import SampleParams
from ddpm.paths import LOCK, MODEL, PRESETS, SAMPLES

SECTIONS = {  # the sections of params.yaml that the result of each stage depends on
    "train": ("data", "train"),
    "sample": ("data", "train", "sample"),
    "evaluate": ("data", "train", "sample", "evaluate"),
}
MAX_CHANGES_IN_NAME = 2
MAX_TAG = 5000  # characters
# What runs and experiments write by themselves, so that it isn't listed among the user's edits
WRITTEN_BY_RUNS = ("params.yaml", "dvc.lock", "data/", "models/diffusion_model", "output/")


def describe(stage: str, params: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The name and the tags of a stage's run with these parameters in the current folder; one tag is its description."""
    experiment = os.environ.get("DVC_EXP_NAME", "")
    head = git("rev-parse", "HEAD")
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or head
    relevant = {name: value for name, value in flatten(params).items() if name.partition(".")[0] in SECTIONS.get(stage, ())}
    changed = _changed(relevant, commit)
    preset, unexplained = _preset(relevant, changed)
    status = git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=no", ".")
    within = git("rev-parse", "--show-prefix") or ""  # in a larger repository: this folder, such as `projects/garments/`
    paths = [entry[3:].removeprefix(within) for entry in (status or "").split("\0") if entry]
    edited = [path for path in paths if not path.startswith(WRITTEN_BY_RUNS)]
    tags = {
        "mlflow.note.content": _note(experiment, commit, preset, changed, edited, "train" in params),
        "mlflow.source.git.commit": head or "unknown",
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("MLFLOW_TRACKING_USERNAME", ""),  # who made the run, if a team shares a server
        "git_dirty": "unknown" if status is None else str(bool(status)).lower(),
        "dvc_exp_name": experiment,
        "preset": preset,
        "changed": ", ".join(setting(name, value) for name, value in changed.items())[:MAX_TAG],
        **_versions(),
    }
    shorter = short_names(relevant)
    name = f"{stage} {_label(experiment, preset, {shorter[name]: value for name, value in unexplained.items()}, commit)}"
    return name, {name: value for name, value in tags.items() if value}


def _changed(params: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Those of the flat parameters that have another value in the commit's params.yaml, or are missing there."""
    text = git("show", f"{commit}:./params.yaml") if commit else None
    try:
        before = flatten(yaml.safe_load(text or ""))
    except (yaml.YAMLError, AttributeError):  # there is no commit, or it has no readable parameters
        return {}
    return {name: value for name, value in params.items() if name not in before or before[name] != value}


def _preset(params: dict[str, Any], changed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the preset that the parameters agree with, or "", and the changes that it doesn't explain."""
    for path in sorted(PRESETS.glob("*.yaml")):
        try:
            values = {name: value for name, value in flatten(yaml.safe_load(path.read_text("utf-8"))).items() if name in params}
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # a broken preset stops no run
            continue
        if values and all(params[name] == value for name, value in values.items()):
            return path.stem, {name: value for name, value in changed.items() if name not in values}
    return "", changed


def _label(experiment: str, preset: str, changes: dict[str, Any], commit: str | None) -> str:
    """What fits the table of runs, such as "few-steps", "smoke", "seed=5, +3", or "@1a2b3c4" if nothing was changed from there.

    The tag `changed` has all that was changed.
    """
    if experiment:
        return experiment
    settings = [setting(name, value) for name, value in list(changes.items())[:MAX_CHANGES_IN_NAME]]
    if len(changes) > MAX_CHANGES_IN_NAME:
        settings.append(f"+{len(changes) - MAX_CHANGES_IN_NAME}")
    return ", ".join(filter(None, [preset, *settings])) or f"@{_short(commit)}"


def _note(experiment: str, commit: str | None, preset: str, changed: dict[str, Any], edited: list[str], trained: bool) -> str:
    """Markdown: the commands that restore or reproduce the run's result, and how its parameters and code differ from the commit.

    DVC can't reproduce samples of a model that was not `trained` here, so then there is no command for that.
    """
    settings = [setting(name, value) for name, value in changed.items()]
    reproduce = "dvc exp run " + " ".join(f"-S {shlex.quote(text)}" for text in settings) if settings else "dvc repro"
    lines = []
    if experiment:
        lines.append(f"dvc exp apply {experiment}  # restores its parameters and results in the workspace")
    if commit and trained:
        lines.append(f"git checkout {_short(commit)} && {reproduce}  # reproduces this run")
    if lines:
        lines = ["```sh", *lines, "```"]
    if preset:
        lines.append(f"Preset: **{preset}**")
    if settings:
        lines += [f"Changed from commit `{_short(commit)}`:", "", *(f"- `{text}`" for text in settings), ""]
    if edited:
        lines.append("Uncommitted edits: " + ", ".join(f"`{path}`" for path in edited))
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}


def _short(commit: str | None) -> str:
    return (commit or "unknown")[:7]


def drawn_from(model: bytes, sampling: SampleParams) -> bool:
    """Whether `dvc.lock` says that the samples in the workspace were drawn from this model with these parameters."""
    try:
        stage = yaml.safe_load(LOCK.read_text("utf-8"))["stages"]["sample"]
        recorded = {item["path"]: item["md5"] for item in stage["deps"] + stage["outs"]}
        present = {MODEL.as_posix(): hashlib.md5(model).hexdigest(), SAMPLES.as_posix(): file_md5(SAMPLES)}
        return present.items() <= recorded.items() and stage["params"]["params.yaml"]["sample"] == sampling.model_dump()
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary with dotted names, such as `train.model.channels`."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def short_names(params: Mapping[str, Any]) -> dict[str, str]:
    """The last part of each flat parameter's name, such as `channels`, where no other one has it; else the whole name."""
    leaves = Counter(name.rpartition(".")[2] for name in params)
    return {name: leaf if leaves[leaf := name.rpartition(".")[2]] == 1 else name for name in params}


def setting(name: str, value: Any) -> str:
    """A parameter as `dvc exp run -S` reads it, such as `train.model.channels=[24,48]`."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


def git(*arguments: str) -> str | None:
    """What a git command prints; None if it fails, or git isn't installed."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=True, timeout=10)
        return done.stdout.decode(errors="replace").rstrip()
    except (OSError, subprocess.SubprocessError):
        return None
