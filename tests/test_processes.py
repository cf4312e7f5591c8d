"""The stages by several processes, some of them lost."""

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest

import warm
from clones import edit_params
from ddpm.training.state import load_state
from helpers import ENVIRONMENT, copied, mlflow_runs, start

pytestmark = pytest.mark.slow
WARM = {"WARM_EXECUTABLE": str(warm.FOLDER / "python")}  # with which a launcher that starts warm starts its workers
STEPS = 200  # of that run


@pytest.fixture
def clone(tmp_path: Path, coloured_run: Path) -> Path:
    return copied(coloured_run, tmp_path)


def after_a_state(process: subprocess.Popen, clone: Path) -> list[psutil.Process]:
    """The workers that `process` launched, once the first has saved a state since."""

    def newest() -> int:
        times = [0]
        for path in clone.glob(".resume/*/state-*.pt"):
            with suppress(FileNotFoundError):  # an older state, removed meanwhile
                times.append(path.stat().st_mtime_ns)
        return max(times)

    before = newest()
    while newest() == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    workers = {}
    for worker in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "src/train.py" in worker.cmdline() and worker.cwd() == str(clone) and "RANK" in worker.environ():
                workers[worker.environ()["RANK"]] = worker
    return [workers["0"], workers["1"]]


def whole(clone: Path, training: mlflow.entities.Run) -> None:
    """It finished, with every step once, and nothing is left of it to go on from."""
    assert training.info.status == "FINISHED"
    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    history = client.get_metric_history(training.info.run_id, "train/loss")
    assert [m.step for m in sorted(history, key=lambda m: (m.timestamp, m.step))] == list(range(1, STEPS + 1))
    assert not [path for path in (clone / ".resume").iterdir() if path.is_dir()]


def first_step(errors: str) -> int:
    """The one that the progress bar began at."""
    return int(re.search(rf"(\d+)/{STEPS} ", errors)[1])


RESUME = "Run the same command again to resume from the last saved state."
LOST = f"error: process {{}} of 2 was killed by SIGKILL, and the others were stopped. {RESUME}"


def test_a_lost_process_ends_all_and_training_resumes(clone: Path) -> None:
    edit_params(clone, {"train": {"seed": 1}, "runtime": {"processes": 2}})
    reached, run_id = 0, None
    for victim, number, status, told in (
        (1, signal.SIGKILL, 1, LOST.format(1)),
        (0, signal.SIGKILL, 1, LOST.format(0)),
        ("launcher", signal.SIGKILL, -signal.SIGKILL, None),
        ("launcher", signal.SIGTERM, 128 + signal.SIGTERM, f"Stopped. {RESUME}"),
    ):
        is_cold = told is None  # the workers watch the launcher
        process = start(clone, sys.executable, "src/train.py") if is_cold else start(clone, "python", "src/train.py", **WARM)
        workers = after_a_state(process, clone)
        (process if victim == "launcher" else workers[victim]).send_signal(number)
        ended = time.monotonic()
        _, errors = process.communicate(timeout=120)
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        assert time.monotonic() - ended < 60
        assert process.returncode == status
        assert told is None or errors.splitlines()[-1] == told
        assert "Traceback" not in errors
        *_, training = mlflow_runs(clone, "train")
        assert run_id in (None, training.info.run_id)
        assert training.info.status == "KILLED" or told is None  # then there may be nobody left to say so
        assert reached == 0 or first_step(errors) >= reached
        run_id, reached = training.info.run_id, max(load_state(f)["step"] for f in clone.glob(".resume/*/") if load_state(f))

    edit_params(clone, {"runtime": {"processes": 1}})
    process = start(clone, "python", "src/train.py")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert first_step(errors) == reached
    *_, training = mlflow_runs(clone, "train")
    assert training.info.run_id == run_id
    whole(clone, training)


def test_torchrun_restarts_what_was_lost(clone: Path) -> None:
    """What is killed is the client of tests/warm that torchrun started, whose script is killed with it."""
    edit_params(clone, {"train": {"seed": 2}})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = start(clone, "python", *launcher, "src/train.py", **WARM)
    after_a_state(process, clone)[1].kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    _, _, restarted = errors.partition("failed (exitcode: -9)")
    assert first_step(restarted) > 0
    *_, training = mlflow_runs(clone, "train")
    whole(clone, training)


def test_what_is_wrong_is_told_once(clone: Path) -> None:
    edit_params(clone, {"runtime": {"processes": 2, "require_mlflow": True}})
    environment = ENVIRONMENT | WARM | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run(["python", "src/train.py"], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    mend = "fix the connection, or set runtime.require_mlflow: false"
    assert done.stderr == f"error: MLflow at http://127.0.0.1:9: Connection refused; {mend}\n"


def test_two_processes_draw_and_judge_the_same(clone: Path) -> None:
    """As one does that has as many threads as each of them."""
    results = []
    for processes in (2, 1):
        edit_params(clone, {"runtime": {"processes": processes}})
        for features in (clone / ".cache").glob("features-*"):
            features.unlink()
        for stage in ("sample", "evaluate"):
            command = ["python", f"src/{stage}.py"]
            environment = {**ENVIRONMENT, **WARM, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        outputs = ("samples.npz", "denoising.gif", "generated_samples.png", "metrics/evaluate.json", "nearest_neighbours.png")
        results.append([(clone / "output" / name).read_bytes() for name in outputs])
    assert results[0] == results[1]
    assert [r.info.status for r in mlflow_runs(clone, "evaluate")] == ["FINISHED"] * 3
