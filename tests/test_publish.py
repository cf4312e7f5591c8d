"""What makes the repository's model, as on a machine lent for its GPU: without DVC, MLflow, the peers and a network."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import publish
import warm
from ddpm.files import file_sha256

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("dvc", "mlflow", "ruamel", "fastapi", "diffusers", "denoising_diffusion_pytorch", "smalldiffusion")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory, fashion_mnist, real_features) -> Path:
    """What the command makes of the smoke preset; it is stopped once while it trains, and started again."""
    folder = tmp_path_factory.mktemp("publish")
    repository, out, absent = folder / "repository", folder / "out", folder / "absent"
    absent.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    publish.copy(ROOT, repository)
    arguments = ["release/publish.py", "make", out, "--preset", "smoke", "--count", "100", "--data", fashion_mnist]
    environment = {**os.environ, "PYTHONPATH": str(absent), "WARM_EXECUTABLE": str(warm.FOLDER / "python")}

    options = {"cwd": repository, "env": environment, "text": True}
    stopped = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    while not list(repository.glob(".cache/publish-*/.resume/*/journal.jsonl")):
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert not out.exists()
    (work,) = repository.glob(".cache/publish-*/")
    for file in real_features:
        (work / ".cache").mkdir(exist_ok=True)
        shutil.copy(file, work / ".cache")
    done = subprocess.run(["python", *arguments], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "| smoke, n = 100 |" in done.stdout
    return out


def test_the_copy_and_its_fingerprint_cover_every_file_of_the_library(tmp_path):
    library = {path.relative_to(ROOT) for path in (ROOT / "src/ddpm").rglob("*.py")}
    publish.copy(ROOT, tmp_path)
    assert library <= {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    assert library <= {path.relative_to(ROOT) for path in publish.code_files()}


def test_all_of_it_is_there_and_small(made):
    names = {"fashion_ddpm.pth", "card.json", "samples.npz", "runs.zip", "pictures.zip", "results.zip", "publish.log"}
    assert {path.name for path in made.iterdir()} == names
    assert max(path.stat().st_size for path in made.iterdir()) <= publish.LIMIT


def test_the_card_is_of_what_was_made(made):
    card = json.loads((made / "card.json").read_text())
    content = torch.load(made / "fashion_ddpm.pth", weights_only=True)
    assert card["sha256"] == file_sha256(made / "fashion_ddpm.pth")
    assert {w.dtype for w in content["weights"].values()} == {torch.float16}
    assert card["preset"] == "smoke"
    assert card["params"]["sample"]["count"] == len(np.load(made / "samples.npz")["images"]) == 100
    assert card["metrics"]["fid_floor"] > 0
    assert card["metrics"]["fid"] == pytest.approx(card["metrics_as_trained"]["fid"], rel=0.05)
    assert card["images_seen"] == 60 * card["params"]["train"]["batch_size"]
    log = (made / "publish.log").read_text()
    assert log.count(" train: python src/train.py") == 2  # stopped, and gone on with
    assert log.count(" train: ") == 3  # and once its time


def test_the_journals_are_of_three_runs_without_the_model(made):
    with zipfile.ZipFile(made / "runs.zip") as archive:
        names = archive.namelist()
        journals = [archive.read(f"{n}/journal.jsonl").decode().splitlines() for n in range(3)]
    assert [json.loads(lines[0])["start"]["stage"] for lines in journals] == ["train", "sample", "evaluate"]
    assert [json.loads(lines[-1])["end"] for lines in journals] == ["FINISHED"] * 3
    steps = [json.loads(line)["step"] for line in journals[0] if '"train/loss"' in line]
    assert steps == list(range(1, 61))
    assert not [name for name in names if name.endswith(".pth")]
    assert [name for name in names if name.endswith("generated_samples.png")]


def test_a_checkout_takes_it(made, tmp_path):
    publish.copy(ROOT, tmp_path)
    take = ["python", "release/publish.py", "take", made]
    done = subprocess.run(take, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "not measured yet: `python bench/run.py --full guidance classes cas` does it"
    assert "Ankle boot" not in (tmp_path / "docs/RESULTS.md").read_text()  # what is told of classes was another model's
    card = json.loads((tmp_path / "models/pretrained/card.json").read_text())
    assert card["sha256"] == file_sha256(tmp_path / "models/pretrained/fashion_ddpm.pth")
    assert card["sha256"] in (tmp_path / "models/pretrained/README.md").read_text()
    assert "| smoke, n = 100 |" in (tmp_path / "docs/RESULTS.md").read_text()
    subprocess.run(["python", "src/demo.py", "Bag"], cwd=tmp_path, capture_output=True, check=True)

    damaged = tmp_path / "damaged"
    shutil.copytree(made, damaged)
    content = (damaged / "fashion_ddpm.pth").read_bytes()
    (damaged / "fashion_ddpm.pth").write_bytes(content[:-1])
    done = subprocess.run(
        ["python", "release/publish.py", "take", damaged], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {damaged}/fashion_ddpm.pth: not the file that ")
