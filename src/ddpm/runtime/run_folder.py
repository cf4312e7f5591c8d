"""The folder of an unfinished run: its name is a hash of everything the result depends on; it keeps the states to resume from.

The folders are in `.resume/` of the main repository, because DVC deletes a stage's outputs before it runs the stage, and the
workspace of `dvc exp run --temp` when the experiment ends.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpm.errors import UserError
from ddpm.files import file_sha256, sync, writing
from ddpm.paths import SOURCE, TRACKING

KEPT_DAYS = 30  # a state that was last written longer ago is removed
MOST_AT_ONCE = 99  # runs of the same configuration


def fingerprint(params: dict[str, Any], files: list[Path]) -> str:
    """The name of a run: a hash of its parameters and of the names and bytes of the files that it reads, its code included."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in files:
        digest.update(path.name.encode() + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()[:16]


def imported_source() -> list[Path]:
    """The files under src/ that this program has imported so far, except tracking's: logging changes no result."""
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name) for name in names if name}
    return sorted(path for path in files if path.resolve().is_relative_to(SOURCE) and path.resolve().parent != TRACKING)


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """`folder`, or folder-2, folder-3 … if another process holds it. No other run gets it before the block ends.

    Folders that an interrupted run left are taken first, so that it is resumed. Raises UserError if no folder can be created.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_states(folder.parent)
    numbered = [folder.with_name(f"{folder.name}-{n}") for n in range(2, MOST_AT_ONCE + 1)]
    for candidate in sorted([folder, *numbered], key=lambda path: not path.exists()):
        lock = _lock(candidate)
        with writing(candidate):
            try:
                lock.acquire()
            except Timeout:  # caught here because it is an OSError, too
                continue
        try:
            with writing(candidate):
                candidate.mkdir(exist_ok=True)
            yield candidate
        finally:
            lock.release()
        return
    raise UserError(f"{folder}: {MOST_AT_ONCE} runs of the same configuration are already running")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep runs out of the folder until the block ends. Raises UserError if a run is using it."""
    lock = _lock(folder)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is still running this") from None
    try:
        yield
    finally:
        lock.release()


def remove_states(folder: Path) -> None:
    """Delete the states in the folder of a finished run. They don't come back after a power cut."""
    for state in folder.glob("*.pt"):
        state.unlink()
    sync(folder)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_suffix(".lock"), timeout=0)


def _remove_old_states(resume: Path) -> None:
    """Delete the states of runs that were not resumed for KEPT_DAYS. Journals are small and stay: MLflow may not have them."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for folder in resume.iterdir():
        states = list(folder.glob("*.pt"))
        if states and max(_modified(path) for path in states) < oldest:
            with suppress(Timeout), _lock(folder):
                for path in states:
                    path.unlink(missing_ok=True)
                print(f"removed the states in {folder}: that run was not resumed for {KEPT_DAYS} days", file=sys.stderr)


def _modified(path: Path) -> float:
    """When the file was last written; now, if another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
