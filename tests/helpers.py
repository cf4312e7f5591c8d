"""What several test files share: commands in clones of the repository, MLflow servers and runs, and a tiny training."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
import torch
import yaml
from PIL import Image

import crash  # which puts src/ and bench/ on the path
import warm  # which changes PATH
from clones import AS_SOMEBODY
from ddpm.data.dataset import Dataset
from ddpm.diffusion.process import Diffusion
from ddpm.params import TrainParams
from ddpm.tracking.client import relocate
from ddpm.tracking.connection import EXPERIMENT, experiment_name

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Commands in a clone of the repository

# `python` on this PATH, and so in what DVC runs, is that of tests/warm; with COLD, and as `sys.executable`, it is the real one.
ENVIRONMENT = {**crash.environment(), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}  # the preset is over before the usual ten
COLD = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT['PATH']}"}


def run(clone: Path, *command: str, environment: dict[str, str] = ENVIRONMENT) -> str:
    """What the command prints. Fails the test if the command fails."""
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(clone: Path, *command: str, **environment: str) -> subprocess.Popen:
    """A process that runs on; its standard error can be read."""
    return subprocess.Popen(
        command, cwd=clone, env=ENVIRONMENT | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def stages_run(output: str) -> list[str]:
    """The stages that `dvc repro` ran, by its output."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def mlflow_runs(clone: Path, stage: str) -> list:
    """Runs of a stage on the clone's data set, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    data_set = yaml.safe_load((clone / "params.yaml").read_text())["data"]["name"]
    experiment = client.get_experiment_by_name(experiment_name(data_set))
    return client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'", order_by=["attributes.start_time ASC"])


def commit(clone: Path, message: str) -> None:
    run(clone, "git", "add", "--all")
    run(clone, "git", *AS_SOMEBODY, "commit", "--quiet", "--message", message)


def copied(source: Path, folder: Path) -> Path:
    """A copy of a clone, with an MLflow store of its own, to change at will."""
    clone = folder / "clone"
    shutil.copytree(source, clone, symlinks=True)
    relocate(clone / "mlflow.db", clone)
    return clone


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of `make serve` in a folder, once it answers. At the end the server stops without a traceback."""
    port = free_port()
    process = start(folder, "python", "src/serve.py", *arguments, "--port", str(port))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            requests.get(f"http://127.0.0.1:{port}/about", timeout=60)
            break
        except requests.ConnectionError:
            time.sleep(0.1)
    else:
        raise AssertionError(process.communicate()[1])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors


# MLflow servers and the runs in them

PARAMS = {"train": {"steps": 40, "model": {"channels": [8, 16]}, "gamma": None}, "runtime": {"device": "cpu"}}
TRACKING_VARIABLES = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"),
    *("DVC_EXP_NAME", "DVC_ROOT"),
)
TRACKING_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in TRACKING_VARIABLES} | {
    "PYTHONPATH": str(ROOT / "src"),
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
}


def python(script: str, *arguments: object, **environment: str) -> subprocess.Popen:
    path = Path(tempfile.mkdtemp(dir=warm.SESSION)) / "script.py"
    path.write_text(script)
    command = ["python", path, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=TRACKING_ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def runs(client, condition: str, experiment: str = EXPERIMENT) -> list:
    """Newest first."""
    experiment = client.get_experiment_by_name(experiment)
    return client.search_runs([experiment.experiment_id], condition, order_by=["attributes.start_time DESC"])


def artifacts(client, run, folder: str | None = None) -> list[str]:
    return [file.path for file in client.list_artifacts(run.info.run_id, folder)]


class Server:
    """An MLflow server at `address`, its artifacts and whatever else it writes in `folder`; ready once entered."""

    def __init__(
        self, address: str, folder: Path, store_uri: str, *options: str, python: Path | str = sys.executable, **environment: str
    ):
        self.address, self.folder, self.options, self.python = address, folder, options, python
        self.environment = {
            **TRACKING_ENVIRONMENT,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_BACKEND_STORE_URI": store_uri,
            **environment,
        }

    def __enter__(self):
        self.process = subprocess.Popen(
            [
                *(self.python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]),
                *("--workers", "1", "--artifacts-destination", self.folder / "artifacts", *self.options),
            ],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(600):
            assert self.process.poll() is None
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1)
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"{self.address} doesn't answer")

    def signal(self, number: int) -> None:
        """To all its processes."""
        os.killpg(self.process.pid, number)

    def __exit__(self, *_):
        self.signal(signal.SIGKILL)
        self.process.wait()


# A tiny training

CPU = torch.device("cpu")
TINY = {
    "seed": 3,
    "steps": 60,
    "batch_size": 8,
    "optimizer": "muon",
    "learning_rate": 0.003,
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "ema_decay": 0.9,
    "label_dropout": 0.1,
    "precision": "float32",
    "report_every": 30,
    "model": {"patch_size": 2, "channels": [8, 16], "blocks": 1, "attention": [7], "heads": 2, "dropout": 0.1},
    "diffusion": {"timesteps": 20, "schedule": "cosine", "prediction": "v", "min_snr_gamma": 5.0},
}


def params(**changes) -> TrainParams:
    """TINY with changes; `model__heads` is `model.heads`."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY.items()}
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return TrainParams.model_validate(values)


def class_images(n: int = 200, noise: int = 20) -> Dataset:
    """Images that are constant but for a little noise, one grey value per class."""
    g = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 10
        images = (labels * 25)[:, None, None] + torch.randint(0, noise, (count, 28, 28), generator=g)
        return images.to(torch.uint8), labels

    return Dataset(*split(n), *split(40))


class Recorder:
    """A Log that keeps what it is told, and sends this process `number` once it is told of step `stop_at`."""

    def __init__(self, stop_at: int | None = None, number: int = signal.SIGTERM):
        self.values, self.previews = {}, {}
        self.stop_at, self.number = stop_at, number

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            assert (name, step) not in self.values
            self.values[name, step] = value
        if step == self.stop_at:
            self.stop_at = None
            os.kill(os.getpid(), self.number)

    def preview(self, step: int, images: torch.Tensor) -> None:
        assert step not in self.previews
        self.previews[step] = images

    def sync(self) -> None:
        self.synced = len(self.values)

    def without_speed(self) -> dict:
        return {key: value for key, value in self.values.items() if key[0] != "train/images_per_second"}


def noise_in(d: Diffusion, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The noise that x_t holds if x0 is the clean image."""
    alpha, sigma = (level[t].view(-1, 1, 1, 1) for level in (d.alpha, d.sigma))
    return (x_t - alpha * x0) / sigma
