"""The fixtures that several test files share: real data, and runs of the pipeline, prepared once per session."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import crash
from clones import edit_params
from ddpm.checkpoint import save_checkpoint
from ddpm.data.fashion_mnist import load_split
from ddpm.diffusion.unet import UNet
from ddpm.evaluation.classifier import load_classifier
from ddpm.evaluation.features import extract_cached
from ddpm.paths import CLASSIFIER
from ddpm.sources.download import download
from helpers import COLD, CPU, commit, run, stages_run

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"  # what is in it serves the next time too


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, in whichever of the test session's processes needs it first. It is to stay as it is."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # a failed attempt
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory) -> Path:
    """A folder with Fashion-MNIST's four unpacked files, to read only."""
    return once(tmp_path_factory, "fashion-mnist", lambda folder: download(folder, CACHE))


@pytest.fixture(scope="session")
def real_features(tmp_path_factory, fashion_mnist) -> list[Path]:
    """The files that `evaluate` keeps of Fashion-MNIST's features: a minute's work, which no clone needs to repeat."""

    def make(folder: Path) -> None:
        code = hashlib.sha256()
        for name in ("features", "classifier"):
            code.update((ROOT / f"src/ddpm/evaluation/{name}.py").read_bytes())
        kept = CACHE / f"tests-{code.hexdigest()[:16]}-{torch.get_num_threads()}"  # changed code makes them again
        for split in ("train", "test"):
            extract_cached(load_classifier(ROOT / CLASSIFIER), load_split(fashion_mnist, split)[0], CPU, kept)
        for file in kept.iterdir():
            shutil.copy(file, folder)
            shutil.copy(file, CACHE)  # where the bench looks for them

    return list(once(tmp_path_factory, "features", make).iterdir())


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, fashion_mnist, real_features) -> Path:
    """A clone with the smoke preset after `dvc repro`, all committed. Its files and its commits are to stay as they are."""

    def make(folder: Path) -> None:
        clone = crash.clone(folder)
        edit_params(clone, {"data": {"folder": str(fashion_mnist)}})
        commit(clone, "smoke preset")
        (clone / ".cache").mkdir()
        for file in real_features:
            shutil.copy(file, clone / ".cache")
        assert stages_run(run(clone, "dvc", "repro", environment=COLD)) == ["download", "train", "sample", "evaluate"]
        commit(clone, "smoke run")

    return once(tmp_path_factory, "smoke", make) / "clone"


@pytest.fixture(scope="session")
def coloured_run(tmp_path_factory) -> Path:
    """A clone with three classes of coloured images, 16 × 16 pixels, after `dvc repro`: by the smoke preset and params alone.

    Its files are to stay as they are.
    """

    def make(folder: Path) -> None:
        for i, name in enumerate(("red", "green", "blue")):
            (folder / "colours" / name).mkdir(parents=True)
            for n in range(70):
                array = np.random.default_rng(n).integers(0, 60, (16, 16, 3), np.uint8)
                array[..., i] += 180
                Image.fromarray(array).save(folder / "colours" / name / f"{n}.png")
        clone = crash.clone(folder)
        changes = {
            "data": {"name": "colours", "folder": str(folder / "colours")},
            "train": {"steps": 200, "learning_rate": 0.01},
            "sample": {"count": 30},
        }
        edit_params(clone, changes)
        assert stages_run(run(clone, "dvc", "repro")) == ["download", "train", "sample", "evaluate"]

    return once(tmp_path_factory, "coloured", make) / "clone"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A small model of 50 timesteps that has learned nothing."""
    unet = {"channels": [8, 16], "blocks": 1, "attention": [], "heads": 2, "dropout": 0.0, "patch_size": 2}
    diffusion = {"timesteps": 50, "schedule": "cosine", "prediction": "v", "min_snr_gamma": 5.0}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) * 0.1 for name, w in UNet(**unet).state_dict().items()}
    path = tmp_path_factory.mktemp("model") / "diffusion_model.pth"
    save_checkpoint(path, weights, unet, diffusion, 0.1)
    return path
