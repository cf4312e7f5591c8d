import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadFileScheduling

import crash
from clones import edit_params
from ddpm.checkpoint import save_checkpoint
from ddpm.data.fashion_mnist import FILES
from ddpm.diffusion.unet import UNet
from ddpm.files import file_sha256
from ddpm.sources.download import download
from helpers import run, smoke_clone, stages_run

ROOT = Path(__file__).resolve().parents[1]
# `make test` runs a process a core. A file's tests stay in one, and so do those of files that share a run of the pipeline.
SHARED = {"test_team.py": "test_pipeline.py", "test_views.py": "test_pipeline.py", "test_processes.py": "test_folder.py"}
LONGEST = "test_pipeline.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that the other processes do the rest meanwhile."""
    items.sort(key=lambda item: SHARED.get(item.path.name, item.path.name) != LONGEST)


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadFileScheduling:
    class LoadSharedScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = super()._split_scope(nodeid).rpartition("/")[2]
            return SHARED.get(name, name)

    return LoadSharedScheduling(config, log)


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory) -> Path:
    """A folder with Fashion-MNIST's four unpacked files, to read only."""
    cache = ROOT / ".cache"
    if all((cache / name).is_file() and file_sha256(cache / name) == digest for name, digest in FILES.items()):
        return cache
    raw = tmp_path_factory.mktemp("fashion-mnist")
    download(raw, cache)
    return raw


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, fashion_mnist) -> Path:
    """A clone with the smoke preset after `dvc repro`, all committed. Its files and its commit are to stay as they are.

    test_views.py and test_team.py add experiments, runs and a remote; test_pipeline.py, which comes before, works on a copy.
    """
    clone = smoke_clone(tmp_path_factory.mktemp("smoke"), fashion_mnist)
    assert stages_run(run(clone, "dvc", "repro")) == ["download", "train", "sample", "evaluate"]
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", "smoke run")
    return clone


@pytest.fixture(scope="session")
def coloured_run(tmp_path_factory) -> Path:
    """A clone with three classes of coloured images, 16 × 16 pixels, after `dvc repro`: by the smoke preset and params alone.

    test_folder.py looks at it, and then test_processes.py trains in it.
    """
    folder = tmp_path_factory.mktemp("coloured")
    for i, name in enumerate(("red", "green", "blue")):
        (folder / "colours" / name).mkdir(parents=True)
        for n in range(70):
            array = np.random.default_rng(n).integers(0, 60, (16, 16, 3), np.uint8)
            array[..., i] += 180
            Image.fromarray(array).save(folder / "colours" / name / f"{n}.png")
    clone = crash.clone(folder)
    changes = {
        "data": {"name": "colours", "folder": str(folder / "colours")},
        "evaluate": {"classifier": "models/classifier-colours.pth"},
        "train": {"steps": 200, "learning_rate": 0.01},
        "sample": {"count": 30},
    }
    edit_params(clone, changes)
    run(clone, "dvc", "repro", "download")
    run(clone, sys.executable, "src/train_classifier.py", "--out", "models/classifier-colours.pth")
    assert stages_run(run(clone, "dvc", "repro")) == ["train", "sample", "evaluate"]
    return clone


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
