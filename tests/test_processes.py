"""The stages by several processes, some of them lost.

One clone serves all tests of this file, in order: the last needs the model that the ones before it train.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from test_pipeline import ENVIRONMENT, edit_params, mlflow_runs, run, start

pytestmark = pytest.mark.pipeline
STEPS = 200  # of that run


@pytest.fixture(scope="module")
def clone(coloured_run: Path) -> Path:
    """A clone whose trainings keep a state after every window of steps."""
    source = coloured_run / "src/ddpm/training.py"
    source.write_text(re.sub(r"(?m)^STATE_SECONDS = .*$", "STATE_SECONDS = 0", source.read_text()))
    return coloured_run


def lose(process: subprocess.Popen, clone: Path, rank: int) -> None:
    """Kill one of the processes that `process` launched, once the first has saved a state since."""

    def states() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in clone.glob(".resume/*/state-*.pt")}

    before = states()
    while states() <= before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [w for w in workers if "src/train.py" in w.cmdline() and w.environ().get("RANK") == str(rank)]
    worker.kill()


def whole(clone: Path, training: mlflow.entities.Run) -> None:
    """It finished, with every step once, and nothing is left of it to go on from."""
    assert training.info.status == "FINISHED"
    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    history = client.get_metric_history(training.info.run_id, "train/loss")
    assert [m.step for m in sorted(history, key=lambda m: (m.timestamp, m.step))] == list(range(1, STEPS + 1))
    assert not [path for path in (clone / ".resume").iterdir() if path.is_dir()]


def test_a_lost_process_ends_the_others_and_the_same_command_goes_on(clone: Path) -> None:
    edit_params(clone, {"train": {"seed": 1}, "runtime": {"processes": 2}})
    for rank in (1, 0):
        process = start(clone, "src/train.py")
        lose(process, clone, rank)
        lost = time.monotonic()
        _, errors = process.communicate(timeout=120)
        assert time.monotonic() - lost < 60
        assert process.returncode == 1
        told = rf"error: process {rank} of 2 was killed by SIGKILL, and all were ended; .* goes on from the last saved state"
        assert re.fullmatch(told, errors.splitlines()[-1]), errors
        assert "Traceback" not in errors
        *_, training = mlflow_runs(clone, "train")
        assert training.info.status == "KILLED"

    edit_params(clone, {"runtime": {"processes": 1}})
    run(clone, sys.executable, "src/train.py")
    *_, finished = mlflow_runs(clone, "train")
    assert finished.info.run_id == training.info.run_id
    whole(clone, finished)


def test_torchrun_restarts_what_was_lost(clone: Path) -> None:
    edit_params(clone, {"train": {"seed": 2}})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = start(clone, *launcher, "src/train.py")
    lose(process, clone, 1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    *_, training = mlflow_runs(clone, "train")
    whole(clone, training)


def test_two_processes_draw_and_judge_the_same(clone: Path) -> None:
    """As one does that has as many threads as each of them."""
    results = []
    for processes in (2, 1):
        edit_params(clone, {"runtime": {"processes": processes}})
        for features in (clone / ".cache").glob("features-*"):
            features.unlink()
        for stage in ("sample", "evaluate"):
            command = [sys.executable, f"src/{stage}.py"]
            environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        outputs = ("samples.npz", "denoising.gif", "generated_samples.png", "metrics/evaluate.json", "nearest_neighbours.png")
        results.append([(clone / "output" / name).read_bytes() for name in outputs])
    assert results[0] == results[1]
    assert [r.info.status for r in mlflow_runs(clone, "evaluate")] == ["FINISHED"] * 3
