"""The trained model that comes with the repository: what its card says of it, and what draws with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm import paths
from ddpm.data.fashion_mnist import CLASSES
from ddpm.errors import UserError
from ddpm.evaluation.features import extract
from ddpm.files import file_sha256
from ddpm.serving import pretrained
from measure import evaluator, published

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / paths.PRETRAINED_FOLDER
STEPS = 6
CARD = json.loads((ROOT / paths.PRETRAINED_CARD).read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of the repository the demo needs; its card asks for few steps, because each takes a second."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(FOLDER, tmp_path / paths.PRETRAINED_FOLDER)
    few = {"sample": CARD["params"]["sample"] | {"steps": STEPS}}
    (tmp_path / paths.PRETRAINED_CARD).write_text(json.dumps(CARD | {"params": few}))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def demo(folder: Path, *arguments: str, python: str = "python") -> subprocess.CompletedProcess:
    command = [python, "src/demo.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_card_is_of_this_file():
    model = FOLDER / "fashion_ddpm.pth"
    content = torch.load(model, weights_only=True)
    assert (file_sha256(model), model.stat().st_size) == (CARD["sha256"], CARD["bytes"])
    assert CARD["bytes"] <= 16 << 20
    assert {w.dtype for w in content["weights"].values()} == {torch.float16}
    assert sum(w.numel() for w in content["weights"].values()) == CARD["parameters"]
    assert content["unet"]["channels"] == CARD["params"]["train"]["model"]["channels"]
    text = (FOLDER / "README.md").read_text()
    assert CARD["sha256"] in text
    assert f"{CARD['metrics']['fid']:.4f}" in text
    made = CARD.get("metrics_when_made", CARD["metrics"])
    assert made["fid"] == pytest.approx(CARD["metrics_as_trained"]["fid"], rel=0.02)  # half precision costs nothing


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for():
    """By the evaluator, as often as the card says, but for the luck of 60 draws of half as many steps."""
    images, labels = published(60, seed=7, steps=CARD["params"]["sample"]["steps"] // 2)
    _, predicted = extract(evaluator(), images, torch.device("cpu"))
    assert (predicted == labels).float().mean() > CARD["metrics"]["class_accuracy"] - 0.07


@pytest.mark.slow
def test_the_demo_draws_a_grid_and_an_animation(folder):
    done = demo(folder, python=sys.executable)
    assert done.returncode == 0, done.stderr
    drawn = "output/demo.png and output/demo.gif, drawn by models/pretrained/fashion_ddpm.pth with seed 1\n"
    assert done.stdout == drawn + "`make serve` opens a page to draw more\n"
    with Image.open(folder / "output/demo.png") as grid:
        width, height = grid.size
    assert height > 10 * 56
    assert width > height  # ten of a class, and its name
    with Image.open(folder / "output/demo.gif") as animation:
        assert animation.n_frames == STEPS + 1
        first = np.asarray(animation.convert("L")).astype(float)
        animation.seek(animation.n_frames - 1)
        assert first.std() > np.asarray(animation.convert("L")).std() * 0.3
        assert abs(first - np.asarray(animation.convert("L"))).mean() > 20  # from noise to garments

    assert demo(folder, "bag", "9", "Bag").returncode == 0
    with Image.open(folder / "output/demo.png") as grid:
        assert 2 * 56 < grid.size[1] < 3 * 56
    before = (folder / "output/demo.png").read_bytes()
    (folder / "params.yaml").unlink()  # it has no part in this
    assert demo(folder, "bag", "9").returncode == 0
    assert (folder / "output/demo.png").read_bytes() == before
    assert demo(folder, "bag", "9", "--seed", "2").returncode == 0
    assert (folder / "output/demo.png").read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--seed", "-1"], 2, "argument --seed: -1 should be a whole number from 0 to 4294967295"),
        (["Hat"], 1, "error: classes: ['Hat'] should be a list of classes, by name or number; "),
    ],
)
def test_what_it_cannot_draw_is_told_in_a_line(folder, arguments, status, message):
    done = demo(folder, *arguments)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]
    assert not (folder / "output").exists()


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"params": {"sample": {"steps": 0}}}', b"[1]"])
def test_a_damaged_card_is_told_in_a_line(folder, content, monkeypatch):
    monkeypatch.chdir(folder)
    if content is None:
        paths.PRETRAINED_CARD.unlink()
    else:
        paths.PRETRAINED_CARD.write_bytes(content)
    with pytest.raises(UserError, match=r"^models/pretrained/card.json: missing or corrupt; `git checkout "):
        pretrained.pretrained_sampling()


@pytest.mark.slow
def test_the_sampling_stage_takes_it(folder):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["sample"] |= {"count": 20, "steps": STEPS}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    command = ["python", "src/sample.py", paths.PRETRAINED]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    samples = np.load(folder / "output/samples.npz")
    assert samples["labels"].tolist() == [*range(len(CLASSES))] * 2
    assert samples["checkpoint_sha256"] == CARD["sha256"]  # so that evaluation praises no other model for them
    assert samples["images"].std() > 50


@pytest.mark.slow
def test_its_runs_go_into_a_store_once(tmp_path):
    from mlflow import MlflowClient

    (tmp_path / ".dvc").mkdir()  # so that this is the project's root, where the store is
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = os.environ | {
        "DVC_ROOT": str(tmp_path),
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_EXPERIMENT_NAME": "shipped",
    }
    client = MlflowClient(address)
    for python in (sys.executable, "python"):
        command = [python, "src/ship.py", FOLDER / "runs.zip"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        experiment = client.get_experiment_by_name("shipped")
        runs = {r.data.tags["stage"]: r for r in client.search_runs([experiment.experiment_id])}
        assert len(client.search_runs([experiment.experiment_id])) == len(runs) == 3
        assert {r.info.status for r in runs.values()} == {"FINISHED"}
        train = runs["train"]
        assert {r.data.tags.get("mlflow.parentRunId") for r in runs.values()} == {None, train.info.run_id}
        losses = client.get_metric_history(train.info.run_id, "train/loss")
        assert len(losses) == len({m.step for m in losses})
        assert max(m.step for m in losses) == CARD["params"]["train"]["steps"]
        assert train.data.metrics["eval/fid"] == pytest.approx(CARD["metrics_as_trained"]["fid"], rel=1e-3)
    assert (FOLDER / "runs.zip").exists()
