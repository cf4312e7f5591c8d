"""What an unfinished run keeps to go on with: a folder named by all that its result depends on, and the states in it.

The folders lie in `.resume/` of the main repository: DVC deletes a stage's outputs before it runs the stage, and the
workspace of `dvc exp run --temp` when the experiment has ended.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm.errors import UserError
from ddpm.files import file_sha256, writing

KEPT_DAYS = 30  # without a write; by then nobody goes on with the run


def fingerprint(params: dict, files: list[Path]) -> str:
    """Names a run by what its result depends on: parameters, and the bytes of the files that it reads, its code among them."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in files:
        digest.update(path.name.encode() + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()[:16]


def imported_source() -> list[Path]:
    """The project's files that this program runs: all that are imported by now, but for logging, which changes no result."""
    files = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    own = Path(__file__).resolve().parents[1]
    return sorted(path for path in files if path.resolve().is_relative_to(own) and path.parent.name != "tracking")


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """`folder`, or one of folder-2, folder-3 … where a running process holds it; nobody else's for as long as it lasts.

    What an interrupted run left in one of them is gone on with first. Raises UserError where none can be made.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _forget_old_states(folder.parent)
    numbered = [folder.with_name(f"{folder.name}-{n}") for n in range(2, 100)]
    for candidate in sorted([folder, *numbered], key=lambda path: not path.exists()):
        lock = _lock(candidate)
        with writing(candidate):
            try:
                lock.acquire()
            except Timeout:  # an OSError too
                continue
        try:
            with writing(candidate):
                candidate.mkdir(exist_ok=True)
            yield candidate
        finally:
            lock.release()
        return
    raise UserError(f"{folder}: 99 runs of the same configuration are under way")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep runs out of the folder; raises UserError where one is in it."""
    lock = _lock(folder)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: its run is under way") from None
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_suffix(".lock"), timeout=0)


def _forget_old_states(resume: Path) -> None:
    """Remove the states that nobody went on from for KEPT_DAYS. Journals are small, and stay: MLflow may lack them."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for folder in resume.iterdir():
        states = list(folder.glob("*.pt"))
        if states and max(_modified(path) for path in states) < oldest:
            with suppress(Timeout), _lock(folder):
                for path in states:
                    path.unlink(missing_ok=True)
                print(f"removed the states in {folder}: nobody went on with that run for {KEPT_DAYS} days", file=sys.stderr)


def _modified(path: Path) -> float:
    """When it was last written; now, where it has just been removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
