"""Whole stages, started as users start them, on what they can't work with: one line, exit status 1, nothing half-written.

The modules' own tests have the many ways in which parameters, data, samples and checkpoints can be wrong.
"""

import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ddpm.checkpoint import save_checkpoint
from ddpm.data.fashion_mnist import FILES
from ddpm.data.idx import TEST, TRAIN, idx_header
from ddpm.diffusion.unet import UNet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
RAW, MODEL, SAMPLES = Path("data/FashionMNIST/raw"), Path("models/diffusion_model.pth"), Path("output/samples.npz")
UNET = {"patch_size": 2, "channels": [8, 16], "blocks": 1, "attention": [], "heads": 2, "dropout": 0.0}
TRAIN_IMAGES = RAW / "train-images-idx3-ubyte"
DIFFUSION = {"timesteps": 5, "schedule": "cosine", "prediction": "v", "min_snr_gamma": 5.0}
REMEDY = "`dvc repro train` makes it"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The repository's code, params and classifier, and nothing that a stage has made."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("classifier.pth", "classifier.json"):
        shutil.copy(ROOT / "models" / name, tmp_path / "models")
    return tmp_path


def run(folder: Path, stage: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    command = ["python", f"src/{stage}.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def params(folder: Path, **changes: object) -> None:
    """Set `section__key` to a value."""
    content = yaml.safe_load((folder / "params.yaml").read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        content[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("program", sorted(path.stem for path in (ROOT / "src").glob("*.py")))
def test_help_is_help_alone(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "presets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / f"src/{program}.py"))["main"]()
    assert f"usage: {program}.py" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*")] == ["presets"]


def small_model(folder: Path) -> None:
    save_checkpoint(folder / MODEL, UNet(**UNET).state_dict(), UNET, DIFFUSION, 0.1)


def no_params(folder: Path) -> None:
    (folder / "params.yaml").unlink()


def number_as_text(folder: Path) -> None:
    params(folder, train__learning_rate="2e-4")


def unknown_key(folder: Path) -> None:
    params(folder, sample__step=10)


def no_data(folder: Path) -> None: ...


def damaged_data(folder: Path) -> None:
    (folder / RAW).mkdir(parents=True)
    for name in FILES:
        (folder / RAW / name).write_bytes(b"\0" * 100)


def other_images(folder: Path, **changes: object) -> None:
    """Ten grey images for training and for testing, without classes, in data/mine."""
    params(folder, data__name="mine", data__folder="/x", **changes)
    raw = folder / "data/mine/raw"
    raw.mkdir(parents=True)
    for prefix in (TRAIN, TEST):
        for kind, shape in (("images-idx3", (10, 20, 20)), ("labels-idx1", (10,))):
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(idx_header(shape) + bytes(math.prod(shape)))
    (raw / "classes.txt").touch()


def no_such_classes(folder: Path) -> None:
    other_images(folder, sample__classes=[12])


def no_folder(folder: Path) -> None:
    params(folder, data__folder="/nope")


def uneven_size(folder: Path) -> None:
    other_images(folder)
    params(
        folder, train__model={"patch_size": 2, "channels": [8, 8, 8], "blocks": 1, "attention": [], "heads": 4, "dropout": 0.0}
    )


def no_cuda(folder: Path) -> None:
    params(folder, runtime__device="cuda")


def cut_model(folder: Path) -> None:
    small_model(folder)
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-500])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("the-code-ran",)


def model_with_code(folder: Path) -> None:
    (folder / MODEL).write_bytes(pickle.dumps({"weights": Payload()}))


def model_with_code_in_an_archive(folder: Path) -> None:
    torch.save({"weights": Payload(), "unet": UNET, "diffusion": DIFFUSION, "label_dropout": 0.1}, folder / MODEL)


def model_of_few_timesteps(folder: Path) -> None:
    small_model(folder)
    params(folder, sample__steps=6)


def no_samples(folder: Path) -> None: ...


def damaged_samples(folder: Path) -> None:
    (folder / "output").mkdir()
    np.savez_compressed(folder / SAMPLES, images=np.zeros((10, 28, 28), np.uint8), labels=np.arange(10))
    (folder / SAMPLES).write_bytes((folder / SAMPLES).read_bytes()[:200])


CASES = [
    ("train", no_params, "params.yaml: there is no such file here; run from the repository's root"),
    ("download", number_as_text, "params.yaml: train.learning_rate: YAML reads '2e-4' as text; write it as 0.0002"),
    ("sample", unknown_key, "params.yaml: sample.step: there is no such key; did you mean steps?"),
    ("train", no_data, f"{TRAIN_IMAGES}: there is no such file; `python src/download.py` downloads it"),
    (
        "train",
        damaged_data,
        f"{TRAIN_IMAGES}: not Fashion-MNIST's bytes (SHA-256 differs); `python src/download.py` downloads it again",
    ),
    pytest.param(
        "train",
        no_cuda,
        "runtime.device: 'cuda', but PyTorch sees no CUDA device here; use auto or cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
    ),
    ("download", no_folder, "data.folder: /nope: there is no such folder"),
    ("train", no_such_classes, "params.yaml: sample.classes: [12], but mine has no classes; use all or none"),
    (
        "train",
        uneven_size,
        "params.yaml: train.model.channels: 3 levels would halve 10×10 pixels unevenly; use fewer, or set data.size to 16 or 24",
    ),
    ("sample", no_data, f"{MODEL}: there is no such file; `dvc repro train` makes it"),
    ("sample", cut_model, f"{MODEL}: corrupt, or not a plain weights file; {REMEDY}"),
    ("sample", model_with_code, f"{MODEL}: corrupt, or not a plain weights file; {REMEDY}"),
    ("sample", model_with_code_in_an_archive, f"{MODEL}: corrupt, or not a plain weights file; {REMEDY}"),
    ("sample", model_of_few_timesteps, f"params.yaml: sample.steps: 6, but {MODEL} has 5 timesteps; use at most as many"),
    ("evaluate", no_samples, f"{SAMPLES}: there is no such file; `dvc repro sample` makes it"),
    ("evaluate", damaged_samples, f"{SAMPLES}: corrupt, or without images and labels; `dvc repro sample` draws them again"),
]


@pytest.mark.parametrize(("stage", "arrange", "line"), CASES)
def test_one_line_status_1_and_nothing_written(folder: Path, stage: str, arrange: Callable[[Path], None], line: str) -> None:
    arrange(folder)
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    done = run(folder, stage)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_another_classifier_is_refused(folder: Path, fashion_mnist: Path) -> None:
    (folder / RAW.parent).mkdir(parents=True)
    (folder / RAW).symlink_to(fashion_mnist)
    (folder / "output").mkdir()
    np.savez_compressed(folder / SAMPLES, images=np.zeros((10, 28, 28), np.uint8), labels=np.arange(10))
    card = folder / "models/classifier.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "sha256": "0" * 64}))
    done = run(folder, "evaluate")
    line = "models/classifier.pth: not the classifier that classifier.json describes (SHA-256 differs); FIDs would not compare"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")
    assert [path.name for path in (folder / "output").iterdir()] == [SAMPLES.name]


def test_an_output_folder_that_can_not_be_written(folder: Path) -> None:
    small_model(folder)
    params(folder, sample__steps=2, sample__count=10)
    (folder / "output").write_text("a file is in the way")
    done = run(folder, "sample")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] in [
        f"error: {SAMPLES}: can't be written ({reason})" for reason in ("Not a directory", "File exists")
    ]
    (folder / "output").unlink()
    assert run(folder, "sample").returncode == 0  # what was drawn is not lost: it goes on from there
    assert sorted(path.name for path in (folder / "output").iterdir()) == [
        "denoising.gif", "denoising.png", "generated_samples.png", "samples.npz",
    ]  # fmt: skip


def test_a_training_that_may_not_fit_into_memory_is_warned_of_and_begins(folder: Path) -> None:
    other_images(folder, train__batch_size=60_000, train__steps=1, train__warmup_steps=0)
    process = subprocess.Popen(
        ["python", "src/train.py"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        line, text = process.stderr.readline(), ""
        while "train:" not in text and process.poll() is None:  # its progress bar
            text += process.stderr.read(1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert re.fullmatch(
        r"warning: training may take [\d.]+ GiB of memory; [\d.]+ are free: lower train\.batch_size or data\.size, "
        r"or raise runtime\.accumulate\n",
        line,
    )
    assert "train:" in text
