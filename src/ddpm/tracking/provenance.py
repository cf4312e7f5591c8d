"""Where a run comes from: git's commit, DVC's experiment, the parameters that were changed; as name, tags and description."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from ddpm.files import file_md5
from ddpm.params import SampleParams
from ddpm.paths import LOCK, MODEL, PRESETS, SAMPLES

SECTIONS = {  # of the parameters that a stage's result hangs on
    "train": ("data", "train"),
    "sample": ("data", "train", "sample"),
    "evaluate": ("data", "train", "sample", "evaluate"),
}
SHOWN = 3  # changes in a name
MADE = ("params.yaml", "dvc.lock", "data/", "models/diffusion_model", "output/")  # what runs and experiments change by themselves


def describe(stage: str, params: dict) -> tuple[str, dict[str, str]]:
    """The name and the tags, a description among them, of a stage's run with these parameters in the current folder."""
    experiment = os.environ.get("DVC_EXP_NAME", "")
    head = git("rev-parse", "HEAD")
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or head
    flat = {name: value for name, value in flatten(params).items() if name.partition(".")[0] in SECTIONS.get(stage, ())}
    changed = _changed(flat, commit)
    preset, others = _preset(flat, changed)

    label = " ".join(filter(None, (experiment, preset)))
    few = [setting(name, value) for name, value in list(others.items())[:SHOWN]]
    if len(others) > SHOWN:
        few.append(f"and {len(others) - SHOWN} more")
    text = ", ".join(few)
    what = f"{label} ({text})" if label and text else label or text or f"@{(commit or 'unknown')[:7]}"
    status = git("status", "--porcelain", "--untracked-files=no")
    edited = [line[2:].strip() for line in (status or "").splitlines() if not line[2:].strip().startswith(MADE)]
    tags = {
        "mlflow.note.content": _note(experiment, commit, preset, changed, edited, "train" in params),
        "mlflow.source.git.commit": head or "unknown",
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("MLFLOW_TRACKING_USERNAME", ""),  # whose run it is, where a team shares a server
        "git_dirty": "unknown" if status is None else str(bool(status)).lower(),
        "dvc_exp_name": experiment,
        "preset": preset,
        "changed": ", ".join(setting(name, value) for name, value in changed.items())[:5000],
        **_versions(),
    }
    return f"{stage} {what}", {name: value for name, value in tags.items() if value}


def flatten(params: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping from dotted names."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def setting(name: str, value: Any) -> str:
    """As `dvc exp run -S` takes it."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


def _changed(flat: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Those of the parameters that the commit has otherwise."""
    text = git("show", f"{commit}:params.yaml") if commit else None
    try:
        before = flatten(yaml.safe_load(text or ""))
    except (yaml.YAMLError, AttributeError):  # no commit, or none that has parameters
        return {}
    return {name: value for name, value in flat.items() if name not in before or before[name] != value}


def _preset(flat: dict[str, Any], changed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset whose values these are, and the changes that it doesn't explain."""
    for path in sorted(PRESETS.glob("*.yaml")):
        try:
            values = {name: value for name, value in flatten(yaml.safe_load(path.read_text())).items() if name in flat}
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # not ours to complain about
            continue
        if values and all(flat[name] == value for name, value in values.items()):
            return path.stem, {name: value for name, value in changed.items() if name not in values}
    return "", changed


def drawn_from(model: bytes, sampling: SampleParams) -> bool:
    """Whether DVC has it that the samples at hand were drawn from this model, in this way."""
    try:
        stage = yaml.safe_load(LOCK.read_text())["stages"]["sample"]
        made = {item["path"]: item["md5"] for item in stage["deps"] + stage["outs"]}
        now = {MODEL.as_posix(): hashlib.md5(model).hexdigest(), SAMPLES.as_posix(): file_md5(SAMPLES)}
        return now.items() <= made.items() and stage["params"]["params.yaml"]["sample"] == sampling.model_dump()
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False


def _note(experiment: str, commit: str | None, preset: str, changed: dict[str, Any], edited: list[str], trained: bool) -> str:
    """Markdown: the commands that bring the run's result back or make it again, and what is special about it.

    Nothing that DVC knows makes again what was drawn from a model that wasn't `trained` here.
    """
    short = (commit or "unknown")[:7]
    settings = [setting(name, value) for name, value in changed.items()]
    again = "dvc exp run " + " ".join(f"-S {shlex.quote(text)}" for text in settings) if settings else "dvc repro"
    lines = []
    if experiment:
        lines.append(f"dvc exp apply {experiment}  # its parameters and results, into the workspace")
    if commit and trained:
        lines.append(f"git checkout {short} && {again}  # the same again")
    if lines:
        lines = ["```sh", *lines, "```"]
    if preset:
        lines.append(f"The preset **{preset}**.")
    if settings:
        lines += [f"Changed from commit `{short}`:", "", *(f"- `{text}`" for text in settings), ""]
    if edited:
        lines.append("Edited files, as no commit has them: " + ", ".join(f"`{path}`" for path in edited))
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}


def git(*arguments: str) -> str | None:
    """What the command prints; None where it fails, or there is no git."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None
