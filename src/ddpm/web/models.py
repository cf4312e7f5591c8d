"""The models that the server can draw with: the champion, the workspace's, DVC's experiments, and the one that comes along."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpm.data.samples_file import read_samples
from ddpm.errors import UserError
from ddpm.files import file_md5, file_sha256
from ddpm.params import FASHION_MNIST, Params, SampleParams
from ddpm.paths import CACHE, EVALUATION_METRICS, LOCK, MODEL, PARAMS, PRETRAINED, PRETRAINED_CARD, SAMPLES
from ddpm.sampling.pipeline import Pipeline
from ddpm.serving.pretrained import pretrained_sampling
from ddpm.tracking.connection import run_address
from ddpm.tracking.provenance import git
from ddpm.tracking.queries import evaluation_of
from ddpm.tracking.registry import ADDED, champion

DIGITS = 12  # of a checkpoint's SHA-256, in addresses
IN_MEMORY = 3  # models
CHAMPION, FILE, WORKSPACE, ALONG = "champion", "file", "workspace", "pretrained"
EXPERIMENT = "experiment/"  # before the name of one
FIGURES = {  # on a model's card: the metric, its name there, and the same metric of real images
    "fid": ("FID (less is better)", "fid_floor"),
    "c2st_auc": ("two-sample AUC (0.5 is best)", "c2st_auc_real"),
    "precision": ("precision", "precision_real"),
    "recall": ("recall", "recall_real"),
    "class_accuracy": ("class accuracy", "class_accuracy_real"),
}


@dataclass(frozen=True)
class Model:
    """A model that is ready to draw."""

    key: str
    name: str
    sha256: str
    pipeline: Pipeline
    sampling: SampleParams  # what a drawing may omit

    @property
    def checkpoint(self) -> str:
        return self.sha256[:DIGITS]


class Models:
    """Finds and loads models. `file` is one that was asked for by name. Its methods may be called from several threads."""

    def __init__(self, root: Path, params: Params, device: torch.device, file: Path | None = None):
        self.root, self.params, self.device, self.file = root, params, device, file
        self.lock = threading.RLock()
        self.loaded: dict[str, Pipeline] = {}  # by SHA-256, the last one used at the end
        self.hashes: dict[tuple, str] = {}  # of files, by what tells that they have changed
        if file:  # which needs no MLflow
            first = FILE
        elif champion(root, params.data.name):  # raises what is wrong with MLflow; later on, its model is just left out
            first = CHAMPION
        else:
            first = next(iter(self.names()))
        self.first = self.load(first)

    def names(self) -> dict[str, str]:
        """The models there are, by the key to load each with: first the one to start with."""
        with self.lock:
            found: dict[str, str] = {}
            if self.file:
                found[FILE] = str(self.file)
            with suppress(UserError):
                if best := champion(self.root, self.params.data.name):
                    found[CHAMPION] = f"{best[0]} (champion)"
            if MODEL.exists():
                found[WORKSPACE] = f"{MODEL}, in the workspace"
            if PRETRAINED.exists() and (found or self.params.data.name == FASHION_MNIST):
                found[ALONG] = "the model that comes with the repository"
            found |= {EXPERIMENT + name: f"experiment {name}" for name in _experiments()}
        if not found:
            raise UserError(f"there is no model of {self.params.data.name} yet; `dvc repro` trains one")
        return found

    def load(self, key: str | None = None) -> Model:
        """The model with this key; without one, the model that the server started with. Raises UserError if there is none."""
        if key is None:
            return self.first
        with self.lock:
            name, path, sampling = self._find(key)
            stat = path.stat() if path.exists() else None
            version = (path, stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino))
            sha256 = self.hashes.get(version) or (file_sha256(path) if stat else "")
            pipeline = self.loaded.pop(sha256, None) or Pipeline(path, self.device)
            self.hashes[version], self.loaded[sha256] = sha256, pipeline
            while len(self.loaded) > IN_MEMORY:
                del self.loaded[next(iter(self.loaded))]
        return Model(key, name, sha256, pipeline, sampling)

    def _find(self, key: str) -> tuple[str, Path, SampleParams]:
        """The name of a model, its file, and its sampling parameters."""
        if key == CHAMPION and (best := champion(self.root, self.params.data.name)):
            return best
        if key == FILE and self.file:
            return str(self.file), self.file, pretrained_sampling() if self.file == PRETRAINED else self.params.sample
        if key == WORKSPACE:
            return str(MODEL), MODEL, self.params.sample
        if key == ALONG:
            return str(PRETRAINED), PRETRAINED, pretrained_sampling()
        name = key.removeprefix(EXPERIMENT)
        if key.startswith(EXPERIMENT) and (revision := _experiments().get(name)):
            try:
                sampling = SampleParams.model_validate(
                    ADDED | yaml.safe_load(git("show", f"{revision}:{PARAMS}") or "")["sample"]
                )
            except (TypeError, LookupError, ValueError, yaml.YAMLError):
                raise UserError(f"experiment {name}: its {PARAMS} is of another version of the pipeline") from None
            return f"experiment {name}", self._checkpoint_of(name, revision), sampling
        raise UserError(f"model: there is no {key!r}; /models lists those there are")

    def _checkpoint_of(self, name: str, revision: str) -> Path:
        """A copy of an experiment's model, from DVC's cache or its remote."""
        path = self.root / CACHE / "experiments" / f"{revision}.pth"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "dvc", "get", str(self.root), str(MODEL), "--rev", revision, "--out", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not path.exists():
                raise UserError(f"experiment {name}: its model is neither in DVC's cache nor in a remote")
        return path

    def card(self, model: Model) -> dict[str, Any]:
        """What is known of a model: its size, figures beside those of real images, how it was trained, its run in MLflow."""
        pipeline = model.pipeline
        run = evaluation_of(self.root, self.params.data.name, model.sha256)
        metrics, training = self._recorded(model)
        if run and not metrics:
            metrics = {name.removeprefix("eval/"): value for name, value in run.data.metrics.items()}
        return {
            "model": model.name,
            "checkpoint": model.sha256,
            "weights": sum(w.numel() for w in pipeline.model.parameters()),
            "figures": [
                {"name": name, "samples": metrics[metric], "real": metrics.get(real)}
                for metric, (name, real) in FIGURES.items()
                if metric in metrics
            ],
            "training": training or ({k: v for k, v in run.data.params.items() if k.startswith("train.")} if run else {}),
            "sampling": model.sampling.model_dump(),
            "run": run_address(self.root, run) if run else None,
        }

    def _recorded(self, model: Model) -> tuple[dict[str, float], dict[str, Any]]:
        """The metrics and the training parameters of a model, as far as files or commits have them."""
        try:
            if model.key == ALONG:
                card = json.loads(PRETRAINED_CARD.read_text())
                return card["metrics"], {"device": card["device"], "seconds": card["seconds"]["train"], **card["params"]["train"]}
            if model.key.startswith(EXPERIMENT):
                revision = _experiments()[model.key.removeprefix(EXPERIMENT)]
                params = yaml.safe_load(git("show", f"{revision}:{PARAMS}") or "")
                return json.loads(git("show", f"{revision}:{EVALUATION_METRICS}") or "{}"), params["train"]
            judged = {dep["path"]: dep["md5"] for dep in yaml.safe_load(LOCK.read_text())["stages"]["evaluate"]["deps"]}
            if read_samples(SAMPLES).checkpoint_sha256 == model.sha256 and judged[str(SAMPLES)] == file_md5(SAMPLES):
                return json.loads(EVALUATION_METRICS.read_text()), {}
        except (OSError, UserError, ValueError, LookupError, TypeError, yaml.YAMLError):
            pass
        return {}, {}


def _experiments() -> dict[str, str]:
    """The commits of DVC's experiments, by name."""
    listed = git("for-each-ref", "--sort=-committerdate", "--format=%(objectname) %(refname)", "refs/exps") or ""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        revision, _, reference = line.partition(" ")
        _, _, *base, name = reference.split("/")
        if len(base) == 2 and len(base[0]) == 2 and len(base[1]) == 38:  # not the references of DVC's queue
            found.setdefault(name, revision)
    return found
