"""Clones of the repository that the bench and the tests run commands in: how to make one, change its parameters, time it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from contenders import ROOT
from ddpm.params_file import merge
from measure import own_environment

AS_SOMEBODY = ("-c", "user.name=t", "-c", "user.email=t@localhost")


def plain_clone(folder: Path) -> Path:
    """The repository's files as they are now, in `folder`, with one commit as their history and the smoke preset applied."""
    clone = folder / "clone"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    for command in (["init", "--quiet"], ["add", "--all"], [*AS_SOMEBODY, "commit", "--quiet", "--message", "as cloned"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    subprocess.run([sys.executable, "src/preset.py", "smoke"], cwd=clone, stdout=subprocess.DEVNULL, check=True)
    return clone


def edit_params(clone: Path, changes: dict) -> None:
    """Write the nested `changes` into the clone's params.yaml; its comments are lost."""
    path = clone / "params.yaml"
    params = yaml.safe_load(path.read_text())
    list(merge(params, changes))  # merges in place, and yields a line per change
    path.write_text(yaml.safe_dump(params))


def environment() -> dict[str, str]:
    """`own_environment`, with the folder of this Python first on PATH, so that `dvc` and `python` are found there.

    The tests put another `python` before it (tests/warm).
    """
    clean = own_environment()
    if "WARM_SERVER" in clean:
        return clean
    return {**clean, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"}


def timed(folder: Path, *command: str) -> float:
    """The seconds that the command takes in `folder`. Raises SystemExit with the end of its output if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-1000:]}")
    return time.perf_counter() - began
